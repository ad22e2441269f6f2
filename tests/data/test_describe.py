import json
from pathlib import Path

import pytest

from fedssl.config import DataConfig
from fedssl.data.dataset import load_dataset, write_dataset
from fedssl.data.describe import describe, describe_text

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
    assert facts["lengths"] == {"min": 3, "25%": 3.25, "median": 3.5, "75%": 3.75, "95%": 3.95, "max": 4, "mean": 3.5}
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


def test_the_text_shows_the_facts_to_a_person(tmp_path):
    text = describe_text(describe(config(tmp_path)))
    for part in ("data\n", "users ", "2, 2 of them", "83.333%", "median 3.5", "2 (28.6%)", "3 (42.9%)", "1 users, 1 items, 2 events"):
        assert part in text
