import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.catalogue import Catalogue, write_catalogue
from fedssl.config import DataConfig
from fedssl.data.convert import convert
from fedssl.data.dataset import load_dataset, write_dataset
from fedssl.errors import CatalogueMismatch, DataError, FedSSLError

LINES = "ben lamp tent stove\nanna tent lamp stove rope\ncarl lamp tent\n"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_same(config: DataConfig, folder: Path) -> None:
    """Both ways give the same bytes, or the same error."""
    expected: FedSSLError | None = None
    try:
        write_dataset(load_dataset(config), folder / "in-memory")
    except FedSSLError as error:
        expected = error
    if expected is None:
        opened = convert(config, folder / "streamed")
        assert bytes_of(folder / "streamed") == bytes_of(folder / "in-memory")
        assert opened.path == str(folder / "streamed")
    else:
        with pytest.raises(type(expected)) as raised:
            convert(config, folder / "streamed")
        assert str(raised.value) == str(expected)
        assert not (folder / "streamed").exists()
    assert not list(folder.glob(".*"))


EVENTS = st.lists(
    st.tuples(st.sampled_from(["1", "10", "2", "b", "B", "ä", "a b", "日", "\U0001f600"]), st.sampled_from("uvwxyz"), st.integers(0, 4)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_a_streamed_store_has_the_bytes_of_one_made_in_memory(events, min_events, at_once, has_times):
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr("fedssl.data.convert.EVENTS_AT_ONCE", at_once)
        patch.setattr("fedssl.data.readers.text.BLOCK_BYTES", 64)
        patch.setattr("fedssl.data.convert.PARTS", 3)
        header, rows = ("user,item,time", [f"{u},{i},{t}" for u, i, t in events]) if has_times else ("user,item", [f"{u},{i}" for u, i, _ in events])
        (folder / "data").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        check_same(DataConfig(path=str(folder / "data"), min_events=min_events), folder)


def write(folder: Path, text: str, name: str = "data") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_side_files_a_public_catalogue_bad_lines_and_a_split_end_in_the_same_bytes(tmp_path):
    text = "user,item,time\n" + "".join(
        f"{u},{i},{t}\n" for t, (u, i) in enumerate([("b", "x"), ("a", "y"), ("b", "z"), ("a", "x"), ("b", "y"), ("a", "z"), ("b", "x")])
    )
    plain = {"path": write(tmp_path, text + "no event\n"), "min_events": 1, "skip_bad_lines": True}
    write_catalogue(Catalogue(("z", "w", "x", "y"), {"w": "W"}), tmp_path / "c.jsonl")
    items = write(tmp_path, "item_id:token\ttitle:token\nx\tAn x\n", "items")
    users = write(tmp_path, "user_id:token\tage:token\na\t7\n", "users")
    for number, extra in enumerate(
        ({}, {"catalogue": str(tmp_path / "c.jsonl")}, {"items": items, "users": users}, {"split": "global-time", "validation_from": 0.4, "test_from": 0.7})
    ):
        (tmp_path / str(number)).mkdir()
        check_same(DataConfig(**plain, **extra), tmp_path / str(number))
        assert json.loads((tmp_path / str(number) / "streamed" / "dataset.json").read_text())["bad_lines"] == 1


@pytest.mark.parametrize(
    ("text", "extra"),
    [
        ("user,item\na,x\n\n", {}),  # nobody to test
        ("user,item\n", {}),
        ("user,item\nbad\n", {"skip_bad_lines": True}),
        ("user,item\na,x\nbad\n", {}),
        (LINES, {"min_events": 5}),
        (LINES, {"items": "nowhere"}),
    ],
)
def test_what_cannot_be_converted_is_the_same_error_and_leaves_nothing(tmp_path, text, extra):
    config = DataConfig(**{"path": write(tmp_path, text), "min_events": 1, **extra})
    try:
        load_dataset(config)
    except FedSSLError as error:
        says = type(error)
    with pytest.raises(says):
        convert(config, tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_an_item_outside_a_public_catalogue_is_named(tmp_path):
    write_catalogue(Catalogue(("stove", "lamp", "tent")), tmp_path / "c.jsonl")
    with pytest.raises(CatalogueMismatch, match=r"item 'rope' \(and 0 more\)"):
        convert(DataConfig(path=write(tmp_path, LINES), min_events=1, catalogue=str(tmp_path / "c.jsonl")), tmp_path / "store")


def test_tokens_with_line_ends_and_quotes_survive(tmp_path):
    lines = [{"user": user, "item": item, "time": time} for time, (user, item) in enumerate([('a\n"', "x\ny"), ('a\n"', "\u2028"), ('a\n"', "z"), ("b", "z")])]
    check_same(DataConfig(path=write(tmp_path, "".join(json.dumps(line) + "\n" for line in lines)), min_events=1), tmp_path)


def test_a_store_that_is_there_is_never_written_over(tmp_path):
    config = DataConfig(path=write(tmp_path, LINES), min_events=1)
    convert(config, tmp_path / "store")
    with pytest.raises(DataError, match="already there"):
        convert(config, tmp_path / "store")


def test_a_store_and_a_reader_of_ones_own_are_converted_too(tmp_path, monkeypatch):
    config = DataConfig(path=write(tmp_path, LINES), min_events=1)
    made = convert(config, tmp_path / "one")
    again = convert(DataConfig(path=str(tmp_path / "one"), min_events=1), tmp_path / "two")
    assert np.array_equal(made.histories.items, again.histories.items)
    (tmp_path / "reads_lines.py").write_text(
        "from fedssl.data.readers import read_interactions\ndef read(path):\n    return read_interactions(path, 'lines')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = convert(DataConfig(path=config.path, format="reads_lines:read", min_events=1), tmp_path / "three")
    assert own.histories.fingerprint == made.histories.fingerprint


def test_memory_does_not_grow_with_the_tokens_of_users(tmp_path):
    # In a process of its own, after a first time: else the names of files, which Python keeps once for all, and what other tests' threads allocate would count.
    program = """
import gc, sys, tracemalloc
from pathlib import Path
import fedssl.data.convert as convert
from fedssl.data.readers.blocks import Block
convert.EVENTS_AT_ONCE = 1000
gc.disable()  # what only a cycle keeps would be freed at any time, or never
for number, blocks in enumerate((20, 5, 20)):
    spill = Path(sys.argv[1]) / str(number)
    spill.mkdir()
    tracemalloc.start()
    _, events, _ = convert._deal((Block([f"user-{block}-{user}" for user in range(1000)], ["x"] * 1000, None) for block in range(blocks)), spill)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(sum, events)) == 1000 * blocks
    print(peak)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    _, of_few, of_many = map(int, done.stdout.split())
    assert of_many < 1.5 * of_few
