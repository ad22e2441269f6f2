import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fedssl.catalogue import Catalogue, write_catalogue
from fedssl.config import DataConfig
from fedssl.data.dataset import load_dataset, open_dataset, write_dataset
from fedssl.errors import CatalogueMismatch, DataError

LINES = "ben lamp tent stove\nanna tent lamp stove rope\ncarl lamp tent\n"
ITEMS = "item_id:token\tmovie_title:token\tclass:token\ntent\tA tent\tcamping\nlamp\tA lamp\t\nboat\tA boat\twater\n"


def write(folder: Path, text: str, name: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def config(folder: Path, text: str = LINES, **settings: object) -> DataConfig:
    return DataConfig(path=write(folder, text, "data"), **{"min_events": 1, **settings})


def test_a_file_becomes_filtered_numbered_histories_and_says_what_was_dropped(tmp_path):
    dataset = load_dataset(config(tmp_path, min_events=2))
    # rope has one event and goes; then all have two or more.
    assert dict(dataset.dropped) == {"users": 0, "items": 1, "events": 1}
    assert dataset.catalogue.tokens == ("tent", "lamp", "stove")
    assert list(dataset.histories.names) == ["anna", "ben", "carl"]
    assert dataset.histories.items.tolist() == [1, 2, 3, 2, 1, 3, 2, 1]
    assert dataset.path == str(tmp_path / "data")


def test_titles_and_attributes_come_from_the_item_file_for_items_that_occur(tmp_path):
    catalogue = load_dataset(config(tmp_path, items=write(tmp_path, ITEMS, "items"))).catalogue
    assert catalogue.titles == {"tent": "A tent", "lamp": "A lamp"}
    assert catalogue.attributes == {"tent": {"class": "camping"}, "lamp": {}}
    assert catalogue.title(catalogue.row("rope")) == "rope"


def test_an_item_file_of_other_items_is_refused(tmp_path):
    with pytest.raises(DataError, match="names no item of the data; items here are like 'tent', there like 'boat'"):
        load_dataset(config(tmp_path, items=write(tmp_path, "item_id:token\tname:token\nboat\tA boat\n", "items")))


def test_attributes_of_users_stay_beside_the_histories_and_out_of_the_catalogue(tmp_path):
    people = write(tmp_path, "user_id:token\tage:float\nben\t30\nzoe\t4\nanna\t\n", "people")
    dataset = load_dataset(config(tmp_path, users=people))
    assert dataset.user_attributes == {"anna": {}, "ben": {"age": "30"}}
    assert dataset.catalogue == load_dataset(config(tmp_path)).catalogue
    write_dataset(dataset, tmp_path / "store")
    assert open_dataset(tmp_path / "store").user_attributes == dataset.user_attributes
    # A side file named for a store counts, as it does for a file.
    newer = write(tmp_path, "user,age\nben,31\n", "newer.csv")
    assert load_dataset(DataConfig(path=str(tmp_path / "store"), min_events=1, users=newer)).user_attributes == {"ben": {"age": "31"}}
    with pytest.raises(DataError, match="names no user of the data; users here are like 'anna', there like 'zoe'"):
        load_dataset(config(tmp_path, users=write(tmp_path, "user,age\nzoe,31\n", "others.csv")))
    (tmp_path / "store" / "users.jsonl").write_text('{"user": "ben"}\n')
    with pytest.raises(DataError, match=r"users\.jsonl: damaged"):
        open_dataset(tmp_path / "store")


def test_a_public_catalogue_fixes_rows_and_refuses_items_it_does_not_list(tmp_path):
    write_catalogue(Catalogue(("stove", "rope", "boat", "lamp", "tent"), {"rope": "Rope\u2028of two lines"}), tmp_path / "c.jsonl")
    dataset = load_dataset(config(tmp_path, catalogue=str(tmp_path / "c.jsonl")))
    assert dataset.catalogue.num_items == 5
    assert dataset.catalogue.title(2) == "Rope\u2028of two lines"
    assert dataset.histories.of(0).tolist() == [5, 4, 1, 2]
    write_catalogue(Catalogue(("stove", "lamp", "tent")), tmp_path / "c.jsonl")
    with pytest.raises(CatalogueMismatch, match="'rope'"):
        load_dataset(config(tmp_path, catalogue=str(tmp_path / "c.jsonl")))


def test_data_that_cannot_be_tested_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"none of the 2 users has three events.*give longer histories"):
        load_dataset(config(tmp_path, "a x\nb x y\n"))
    with pytest.raises(DataError, match=r"none of the 9 events is left.*min_events = 5; lower it"):
        load_dataset(config(tmp_path, min_events=5))


def test_a_user_of_one_event_stays_beside_one_who_can_be_tested(tmp_path):
    histories = load_dataset(config(tmp_path, "a x\nb x y x\n")).histories
    assert histories.can_be_tested.tolist() == [False, True]


def test_a_store_opens_memory_mapped_as_the_file_it_was_made_from(tmp_path):
    settings = config(tmp_path, items=write(tmp_path, ITEMS, "items"), min_events=2)
    made = load_dataset(settings)
    write_dataset(made, tmp_path / "store")
    opened = load_dataset(DataConfig(path=str(tmp_path / "store"), min_events=2))
    assert isinstance(opened.histories.items, np.memmap)
    assert opened.histories.fingerprint == made.histories.fingerprint
    assert list(opened.histories.names) == list(made.histories.names)
    assert opened.catalogue.tokens == made.catalogue.tokens
    assert opened.catalogue.titles == made.catalogue.titles
    assert dict(opened.dropped) == dict(made.dropped)
    assert opened.path == str(tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "items", "store"]


def test_a_store_that_breaks_the_promise_of_min_events_is_refused(tmp_path):
    write_dataset(load_dataset(config(tmp_path)), tmp_path / "store")
    with pytest.raises(DataError, match=r"users with 2 and items with 1 events, .* min_events asks for 2; set min_events = 1"):
        load_dataset(DataConfig(path=str(tmp_path / "store"), min_events=2))


def test_a_store_of_another_catalogue_than_the_public_one_is_refused(tmp_path):
    write_dataset(load_dataset(config(tmp_path)), tmp_path / "store")
    write_catalogue(Catalogue(("tent", "lamp")), tmp_path / "c.jsonl")
    with pytest.raises(CatalogueMismatch, match="another catalogue than"):
        load_dataset(DataConfig(path=str(tmp_path / "store"), min_events=1, catalogue=str(tmp_path / "c.jsonl")))
    same = str(tmp_path / "store" / "catalogue.jsonl")
    assert load_dataset(DataConfig(path=str(tmp_path / "store"), min_events=1, catalogue=same)).histories.num_users == 3


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "not a store"),
        (lambda folder: (folder / "dataset.json").write_text(json.dumps({"format": 9})), "format 9, this version reads up to 1"),
        (lambda folder: write_catalogue(Catalogue(("x",)), folder / "catalogue.jsonl"), "not the catalogue that was written"),
        (lambda folder: (folder / "catalogue.jsonl").unlink(), "cannot be read as a catalogue"),
        (lambda folder: (folder / "catalogue.jsonl").write_text('{"row": 0, "token": null}\n{"row": 1, "token": ["x"]}\n'), "line 2: not a JSON object"),
    ],
)
def test_a_damaged_store_is_an_error_that_says_what_is_wrong(tmp_path, damage, says):
    write_dataset(load_dataset(config(tmp_path)), tmp_path / "store")
    damage(tmp_path / "store")
    with pytest.raises(DataError, match=says):
        open_dataset(tmp_path / "store")


def test_a_folder_that_is_no_store_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="not a store"):
        load_dataset(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "items_file", "users", "items", "events"),
    [
        ("ml-1m.inter.gz", "ml-1m.item.gz", 6040, 3416, 999_611),
        ("ml-100k.inter.gz", "ml-100k.item.gz", 943, 1349, 99_287),
        ("beauty.txt.gz", "", 22_363, 12_101, 198_502),
    ],
)
def test_real_data_has_the_published_size_after_the_five_core(file, items_file, users, items, events):
    folder = os.environ.get("FEDSSL_DATA", "")
    if not folder or not (Path(folder) / file).exists():
        pytest.skip(f"{file} is not in the folder that FEDSSL_DATA names")
    dataset = load_dataset(DataConfig(path=file, items=items_file))
    assert (dataset.histories.num_users, dataset.catalogue.num_items, dataset.histories.num_events) == (users, items, events)
    assert len(dataset.catalogue.titles) == (items if items_file else 0)
    if file == "beauty.txt.gz":
        with gzip.open(Path(folder) / file, "rt") as lines:
            user, *tokens = next(line for line in lines if line.startswith("10 ")).split()
        number = list(dataset.histories.names).index(user)
        assert [dataset.catalogue.tokens[row - 1] for row in dataset.histories.of(number)] == tokens
