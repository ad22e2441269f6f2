import gzip
import sys
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triples import coded

from fedssl.data.interactions import Interactions
from fedssl.data.readers import find_format, read_interactions, read_items, write_inter, write_lines
from fedssl.errors import ConfigError, DataError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nanna\ttent\t5\t30\nben\tlamp\t3\t10.5\nanna\tlamp\t4\t20\n"
LINES = "anna lamp tent\nben lamp\n"

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, content: str | bytes, name: str = "data") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def events(interactions: Interactions) -> list[tuple[str, str, float | None]]:
    times = [None] * interactions.num_events if interactions.times is None else interactions.times.tolist()
    users = [interactions.user_tokens[code] for code in interactions.users.tolist()]
    items = [interactions.item_tokens[code] for code in interactions.items.tolist()]
    return list(zip(users, items, times, strict=True))


@pytest.mark.parametrize("content", [INTER, INTER.replace("\n", "\r\n"), INTER.rstrip("\n"), "\ufeff" + INTER, INTER.replace("\nben", "\n\nben")])
@pytest.mark.parametrize("pack", [str.encode, lambda text: gzip.compress(text.encode())])
def test_an_inter_file_reads_alike_in_every_dress(tmp_path, content, pack):
    # The name says nothing: the content decides on format and gzip.
    path = write(tmp_path, pack(content), "anything.csv")
    assert events(read_interactions(path)) == [("anna", "tent", 30.0), ("ben", "lamp", 10.5), ("anna", "lamp", 20.0)]


@pytest.mark.parametrize("content", [LINES, LINES.replace("\n", " \r\n"), "\n" + LINES, LINES.replace(" ", "  ")])
@pytest.mark.parametrize("pack", [str.encode, lambda text: gzip.compress(text.encode())])
def test_one_line_a_user_reads_alike_in_every_dress(tmp_path, content, pack):
    path = write(tmp_path, pack(content), "anything.inter.gz")
    assert events(read_interactions(path)) == [("anna", "lamp", None), ("anna", "tent", None), ("ben", "lamp", None)]


def test_columns_may_stand_in_any_order_and_times_may_be_missing(tmp_path):
    path = write(tmp_path, "price:float\titem_id:token\tuser_id:token\n\ttent\tanna\n1\tlamp\tben\n")
    assert events(read_interactions(path)) == [("anna", "tent", None), ("ben", "lamp", None)]


def test_tokens_may_hold_spaces_quotes_and_any_letters(tmp_path):
    path = write(tmp_path, 'user_id:token\titem_id:token\nö 1\t"Die" Hüter\u2028 (1999)\n')
    assert events(read_interactions(path)) == [("ö 1", '"Die" Hüter\u2028 (1999)', None)]


def test_repeated_items_and_equal_times_stay_in_file_order(tmp_path):
    path = write(tmp_path, "user_id:token\titem_id:token\ttimestamp:float\na\ty\t1\na\tx\t1\na\ty\t1\n")
    assert events(read_interactions(path)) == [("a", "y", 1.0), ("a", "x", 1.0), ("a", "y", 1.0)]
    assert events(read_interactions(write(tmp_path, "a y x y\n"))) == [("a", "y", None), ("a", "x", None), ("a", "y", None)]


def test_a_file_of_many_blocks_reads_as_one_of_one(tmp_path, monkeypatch):
    path = write(tmp_path, INTER + "".join(f"u{n % 7}\ti{n % 11}\t1\t{n}\n" for n in range(300)))
    whole = events(read_interactions(path))
    monkeypatch.setattr("fedssl.data.readers.text.BLOCK_BYTES", 13)
    assert events(read_interactions(path)) == whole
    assert len(whole) == 303


@pytest.mark.parametrize(
    ("content", "format", "says"),
    [
        ("", "auto", ["the file is empty"]),
        ("\n\n", "auto", ["blank lines only"]),
        ("  \n", "lines", ["blank lines only"]),
        ("user_id:token\titem_id:token\n", "auto", ["header without events"]),
        ("user_id:token\tname:token\na\tb\n", "auto", ["no column item_id among user_id, name"]),
        ("user_id:token\titem_id:token\titem_id:token\na\tb\tc\n", "auto", ["names a column twice"]),
        (INTER + "ben\ttent\n", "auto", ["line 5: 2 fields where the header has 4", "'ben\\ttent'"]),
        ("\n" + INTER + "\n\nben\ttent\n", "auto", ["line 8: 2 fields where the header has 4"]),
        (INTER + "\n\nben\ttent\t5\tnoon\n", "auto", ["line 7: timestamp 'noon' is not a finite number"]),
        (INTER + "ben\ttent\t5\tnan\n", "auto", ["line 5: timestamp 'nan'"]),
        (INTER + "ben\ttent\t5\t\n", "auto", ["line 5: timestamp ''"]),
        (INTER + "ben\t\t5\t7\n", "auto", ["line 5: an empty item token"]),
        (INTER + "\tlamp\t5\t7\n", "auto", ["line 5: an empty user token"]),
        (LINES + "carl\n", "auto", ["line 3: 'carl' has no items"]),
        (LINES + "\nanna tent\n", "auto", ["line 4: user 'anna' is already on line 1"]),
        (LINES, "inter", ["'anna lamp tent', is not a RecBole header"]),
        (INTER, "lines", ["RecBole atomic file", "format = 'inter'"]),
        ("196\t242\t3\t881250949\n", "auto", ["surely none of inter, lines", "it could be lines or tsv: set [data] format"]),
        ("user item rating\n1 2 3\n", "auto", ["it could be lines: set"]),
        ("user item\n1 2\n1 3\n", "auto", ["it could be lines or pairs: set"]),
        ("1::1193::978300760\n", "auto", ["surely none of", "convert it"]),
        ("who,what,when\na,b,1\n", "auto", ["it could be csv: set [data] format, and [data] columns"]),
        ('{"user": 1}\n', "auto", ["it could be jsonl: set"]),
        (INTER.encode() + b"ben\tcaf\xe9\t5\t7\n", "auto", ["line 5: byte 0xe9 is not UTF-8"]),
        (gzip.compress(INTER.encode(), mtime=0)[:-12], "auto", ["damaged or cut short gzip"]),
        (b"\x1f\x8bnothing", "auto", ["damaged or cut short gzip"]),
        (gzip.compress(b"", mtime=0), "auto", ["the file is empty"]),
    ],
)
def test_a_bad_file_is_an_error_that_says_where_and_why(tmp_path, content, format, says):
    path = write(tmp_path, content)
    with pytest.raises(DataError) as error:
        read_interactions(path, format)
    for part in [str(path), *says]:
        assert part in str(error.value)


def test_a_missing_path_says_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSSL_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"nor in .*\(FEDSSL_DATA\)") as error:
        read_interactions("nowhere.inter")
    assert str(tmp_path) in str(error.value)
    monkeypatch.delenv("FEDSSL_DATA")
    with pytest.raises(DataError, match=r"FEDSSL_DATA, which could name a folder of data, is not set"):
        read_interactions("nowhere.inter")
    with pytest.raises(DataError, match="no such file"):
        read_interactions(tmp_path / "nowhere.inter")
    with pytest.raises(DataError, match="path is empty"):
        read_interactions("")
    with pytest.raises(DataError, match="a folder, not a file"):
        read_interactions(tmp_path)
    with pytest.raises(DataError):
        read_interactions("a\0b")
    with pytest.raises(DataError):
        read_interactions("a" * 5000)


def test_a_bare_name_is_found_in_the_data_folder_and_a_file_at_hand_wins(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "here").mkdir()
    write(tmp_path / "far", "far item\n")
    monkeypatch.setenv("FEDSSL_DATA", str(tmp_path / "far"))
    monkeypatch.chdir(tmp_path / "here")
    assert read_interactions("data").user_tokens == ("far",)
    write(tmp_path / "here", "near item\n")
    assert read_interactions("data").user_tokens == ("near",)


def test_a_format_of_ones_own_is_a_function_by_object_or_by_name(tmp_path, monkeypatch):
    def read_pairs(path: Path) -> Interactions:
        users, items = zip(*(line.split(",") for line in path.read_text().split()), strict=True)
        return Interactions(np.arange(len(users)), np.arange(len(items)), None, users, items)

    module = types.ModuleType("my_formats")
    module.read_pairs, module.number, module.broken = read_pairs, 3, lambda path: None
    monkeypatch.setitem(sys.modules, "my_formats", module)
    path = write(tmp_path, "a,x b,y")
    assert events(read_interactions(path, read_pairs)) == events(read_interactions(path, "my_formats:read_pairs")) == [("a", "x", None), ("b", "y", None)]
    for name, says in {
        "xlsx": r"there is no \[data\] format 'xlsx'; there is csv, inter, jsonl, lines",
        "my_formats:absent": "cannot be loaded",
        "no_such_module:read": "cannot be loaded",
        ":read": "cannot be loaded",
        "my_formats:number": "not a function",
        "my_formats:broken": "returned NoneType",
    }.items():
        with pytest.raises(ConfigError, match=says):
            read_interactions(path, name)


def test_the_format_is_found_by_looking(tmp_path):
    assert find_format(write(tmp_path, INTER, "x.txt")) == "inter"
    assert find_format(write(tmp_path, LINES, "x.inter")) == "lines"


tokens = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n"), min_size=1, max_size=8)
words = st.text(st.characters(codec="utf-8", exclude_characters=" \t\r\n"), min_size=1, max_size=8)
# A byte order mark at the start of a file is no part of the first token.
users_of_lines = words.filter(lambda token: not token.startswith("\ufeff"))


@quick
@given(st.lists(st.tuples(tokens, tokens, st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=12), st.booleans())
def test_an_inter_file_reads_back_as_it_was_written(tmp_path, triples, with_times):
    written = coded(triples, with_times)
    write_inter(written, tmp_path / "x")
    read = read_interactions(tmp_path / "x")
    assert events(read) == events(written)
    assert (read.user_tokens, read.item_tokens) == (written.user_tokens, written.item_tokens)


@quick
@given(st.dictionaries(users_of_lines, st.lists(words, min_size=1, max_size=6), min_size=1, max_size=6))
def test_one_line_a_user_reads_back_as_it_was_written(tmp_path, histories):
    written = coded([(user, item, 0.0) for user, items in histories.items() for item in items], False)
    write_lines(written, tmp_path / "x")
    assert events(read_interactions(tmp_path / "x", "lines")) == events(written)


def test_lines_are_written_in_order_of_time_then_file_order(tmp_path):
    write_lines(coded([("a", "late", 9.0), ("b", "x", 1.0), ("a", "early", 2.0), ("a", "early-too", 2.0)], True), tmp_path / "x")
    assert (tmp_path / "x").read_text() == "a early early-too late\nb x\n"


@pytest.mark.parametrize(("writer", "token"), [(write_inter, "a\tb"), (write_inter, "a\r"), (write_inter, ""), (write_lines, "a b"), (write_lines, "a\n")])
def test_a_token_that_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, writer, token):
    with pytest.raises(DataError, match="token"):
        writer(coded([("u", token, 0.0)], False), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_user_without_events_cannot_be_written_as_a_line(tmp_path):
    with pytest.raises(DataError, match="without events"):
        write_lines(Interactions(np.array([0]), np.array([0]), None, ("a", "b"), ("x",)), tmp_path / "x")


def check_ends_well(path: Path, format: str) -> None:
    with suppress(DataError):
        read = read_interactions(path, format)
        assert read.num_events > 0
        assert len(read.items) == read.num_events
    with suppress(DataError):
        titles, attributes = read_items(path)
        assert set(titles) <= set(attributes)


@quick
@given(st.binary(max_size=80), st.sampled_from([b"", INTER.encode(), LINES.encode(), b"\x1f\x8b", b"item_id:token\tname:token\n"]))
@pytest.mark.parametrize("format", ["auto", "inter", "lines"])
def test_random_bytes_end_in_a_data_error_or_a_valid_result(tmp_path, format, noise, start):
    check_ends_well(write(tmp_path, start + noise), format)
    check_ends_well(write(tmp_path, gzip.compress(start + noise, 1)), format)


@pytest.mark.parametrize("whole", [INTER.encode(), LINES.encode(), gzip.compress(INTER.encode(), mtime=0), gzip.compress(LINES.encode(), mtime=0)])
def test_a_file_cut_anywhere_ends_in_a_data_error_or_a_valid_result(tmp_path, whole):
    for end in range(len(whole)):
        check_ends_well(write(tmp_path, whole[:end]), "auto")


@quick
@given(st.integers(2, 60), st.integers(0, 255))
def test_a_gzip_with_one_wrong_byte_ends_in_a_data_error_or_a_valid_result(tmp_path, at, value):
    packed = bytearray(gzip.compress(INTER.encode(), mtime=0))
    packed[at] = value
    check_ends_well(write(tmp_path, bytes(packed)), "auto")


def test_an_item_file_gives_titles_and_attributes_and_leaves_out_what_is_empty(tmp_path):
    path = write(tmp_path, "item_id:token\tmovie_title:token_seq\tyear:float\tgenre:token\n1\tToy Story\t1995\t\n2\t\t\tDrama\n1\tAgain\t\t\n")
    assert read_items(path) == ({"1": "Toy Story"}, {"1": {"year": "1995"}, "2": {"genre": "Drama"}})


def test_an_item_file_without_items_is_refused(tmp_path):
    with pytest.raises(DataError, match="no column item_id"):
        read_items(write(tmp_path, INTER.replace("item_id", "thing")))
    with pytest.raises(DataError, match="line 2: an empty item token"):
        read_items(write(tmp_path, "item_id:token\tname:token\n\tx\n"))
