import json
from pathlib import Path

import pytest

from fedssl.config import DataConfig
from fedssl.data.dataset import load_dataset, write_dataset
from fedssl.data.describe import describe, describe_text
from fedssl.errors import DataError

# In time: anna x(1) y(2) x(2) z(9); ben y(1) y(3) z(3). In the file: anna's 2 and 2 follow 9, ben's 1 follows 3 and 3.
INTER = (
    "user_id:token\titem_id:token\ttimestamp:float\nanna\tx\t1\nanna\tz\t9\nben\ty\t3\nanna\ty\t2\nanna\tx\t2\nben\tz\t3\nben\ty\t1\ncarl\tq\t5\ncarl\tx\t6\n"
)


def config(folder: Path, min_events: int = 2) -> DataConfig:
    (folder / "data").write_text(INTER)
    return DataConfig(path=str(folder / "data"), min_events=min_events)


def test_the_facts_of_a_small_file_are_those_counted_by_hand(tmp_path):
    facts = describe(config(tmp_path))
    # q has one event and goes, then carl has one and goes: x keeps two.
    assert facts["dropped"] == {"users": 1, "items": 1, "events": 2}
    assert (facts["users"], facts["items"], facts["catalogue"], facts["events"]) == (2, 3, 3, 7)
    assert facts["density"] == pytest.approx(5 / 6)
    assert facts["lengths"] == {"min": 3, "5%": pytest.approx(3.05), "25%": 3.25, "median": 3.5, "75%": 3.75, "95%": 3.95, "max": 4, "mean": 3.5}
    assert facts["testable_users"] == 2
    assert facts["repeated_events"] == 2
    assert facts["equal_times"] == 2
    assert facts["out_of_order"] == 3
    assert json.loads(json.dumps(facts)) == facts


def test_a_store_knows_everything_but_the_order_of_the_file(tmp_path):
    dataset = load_dataset(config(tmp_path))
    write_dataset(dataset, tmp_path / "store")
    from_file, from_store = describe(config(tmp_path)), describe(tmp_path / "store")
    assert from_store == {**from_file, "path": str(tmp_path / "store"), "out_of_order": None}
    assert describe(dataset) == {**from_file, "out_of_order": None}


def test_a_file_without_times_has_no_equal_times(tmp_path):
    (tmp_path / "lines").write_text("a x y z x y\nb x y z x y z\n")
    facts = describe(DataConfig(path=str(tmp_path / "lines"), min_events=1))
    assert (facts["equal_times"], facts["out_of_order"], facts["repeated_events"]) == (None, None, 5)


# Users by time: ann a b c d e, ben b a d, carl e a, dora a b, eve c d a; the cuts are 5 and 8, and of ann's events c is at 5, d at 8.
TIMES = "ann,a,1 ann,b,2 ann,c,5 ann,d,8 ann,e,9 ben,b,1 ben,a,4 ben,d,6 carl,e,9 carl,a,10 dora,a,2 dora,b,3 eve,c,6 eve,d,7 eve,a,8"


def test_a_split_by_time_says_who_and_what_is_cold(tmp_path):
    (tmp_path / "data.csv").write_text("user,item,time\n" + TIMES.replace(" ", "\n") + "\n")
    facts = describe(DataConfig(path=str(tmp_path / "data.csv"), min_events=1, split="global-time", validation_from=5, test_from=8))
    assert facts["split"] == {"name": "global-time", "validation_from": 5.0, "test_from": 8.0}
    # a and b alone are trained: ann a b, ben b a, dora a b. Targets: c of ann and d of ben (validation), d of ann and a of eve (test).
    assert facts["training"] == {"users": 3, "events": 6, "untrained_items": 3}
    assert facts["validation"] == {"users": 2, "cold_items": 2, "cold_users": 0}
    assert facts["test"] == {"users": 2, "cold_items": 1, "cold_users": 1}
    assert (facts["testable_users"], facts["unseen_users"]) == (2, 1)
    text = describe_text(facts)
    for part in (
        "global-time, validation from 5, test from 8",
        "2 users; 1 of the targets are cold items, 1 of the users have no",
        "1 more begin after the cut",
    ):
        assert part in text


def test_bad_lines_and_duplicates_are_counted(tmp_path):
    # b met x and y as a did; c met x twice at one time.
    (tmp_path / "data.csv").write_text("user,item,time\na,x,1\na,y,2\nbroken\nb,x,5\nb,y,6\nc,x,1\nc,x,1\nc,x\nd,x,1\nd,y,3\nd,z,4\n")
    settings = DataConfig(path=str(tmp_path / "data.csv"), min_events=1, skip_bad_lines=True)
    facts = describe(settings)
    assert facts["bad_lines"] == 2
    assert facts["first_bad"].endswith("data.csv, line 4: 1 fields where the header has 3: 'broken'")
    assert (facts["duplicate_users"], facts["duplicate_events"], facts["repeated_events"]) == (1, 1, 1)
    assert "2; the first: " in describe_text(facts)
    write_dataset(load_dataset(settings), tmp_path / "store")
    stored = describe(DataConfig(path=str(tmp_path / "store"), min_events=1))
    assert stored == {**facts, "path": str(tmp_path / "store"), "out_of_order": None}
    with pytest.raises(DataError, match="line 4"):
        describe(settings.model_copy(update={"skip_bad_lines": False}))


def test_the_text_shows_the_facts_to_a_person(tmp_path):
    text = describe_text(describe(config(tmp_path)))
    for part in ("data\n", "users ", "2, 2 of them", "83.333%", "median 3.5", "2 (28.6%)", "3 (42.9%)", "1 users, 1 items, 2 events"):
        assert part in text
