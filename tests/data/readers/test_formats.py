"""Every format that ships: what is written is read back, found by looking, and anything else ends in a clear error."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedssl.data.interactions import Interactions
from fedssl.data.readers import FORMATS, find_format, read_events, read_interactions, read_items, read_users
from fedssl.errors import ConfigError, DataError

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

Event = tuple[str, str, float]
EVENTS: list[Event] = [("ann", "tent", 30.0), ("ben", "lamp", 10.0), ("ann", "lamp", 20.0)]


def text_of(separator: str, header: str = "") -> Callable[[list[Event]], bytes]:
    return lambda events: "".join([header, *(separator.join([user, item, f"{time:.17g}"]) + "\n" for user, item, time in events)]).encode()


def as_csv(events: list[Event]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([("userId", "movieId", "rating", "timestamp"), *((u, i, 4.5, f"{t:.17g}") for u, i, t in events)])
    return file.getvalue().encode()


def as_ratings(events: list[Event]) -> bytes:
    return "".join(f"{user}::{item}::5::{time:.17g}\n" for user, item, time in events).encode()


def as_pairs(events: list[Event]) -> bytes:
    return "".join(f"{user} {item}\n" for user, item, _ in events).encode()


def as_lines(events: list[Event]) -> bytes:
    users = dict.fromkeys(user for user, _, _ in events)
    return "".join(" ".join([user, *(item for owner, item, _ in events if owner == user)]) + "\n" for user in users).encode()


def as_reviews(events: list[Event]) -> bytes:
    return "".join(json.dumps({"asin": i, "reviewText": "x", "reviewerID": u, "unixReviewTime": t}) + "\n" for u, i, t in events).encode()


def as_parquet(events: list[Event]) -> bytes:
    file = io.BytesIO()
    users, items, times = (list(column) for column in zip(*events)) if events else ([], [], [])
    table = pa.table(
        {"item": pa.array(items, pa.string()), "rating": [1] * len(users), "time": pa.array(times, pa.float64()), "user": pa.array(users, pa.string())}
    )
    pq.write_table(table, file)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[Event]], bytes]] = {
    "inter": text_of("\t", "user_id:token\titem_id:token\ttimestamp:float\n"),
    "lines": as_lines,
    "pairs": as_pairs,
    "movielens": as_ratings,
    "csv": as_csv,
    "tsv": text_of("\t", "user_id\titem_id\ttimestamp\n"),
    "jsonl": as_reviews,
    "parquet": as_parquet,
}
# What a token cannot hold in a format; a byte order mark at the start of a file is no part of a token.
FORBIDDEN = {"inter": "\t\r\n", "tsv": "\t\r\n", "csv": "\r\n", "lines": " \t\r\n\ufeff", "pairs": " \t\r\n\ufeff", "movielens": ":\r\n\ufeff"}
WITHOUT_TIMES = ("lines", "pairs")


def write(folder: Path, content: str | bytes, name: str = "data") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def events_of(read: Interactions) -> list[tuple[str, str, float | None]]:
    times = [None] * read.num_events if read.times is None else read.times.tolist()
    return [(read.user_tokens[user], read.item_tokens[item], time) for user, item, time in zip(read.users, read.items, times, strict=True)]


def wanted(format: str, events: list[Event]) -> list[tuple[str, str, float | None]]:
    if format == "lines":  # A user's events stand together.
        users = list(dict.fromkeys(user for user, _, _ in events))
        events = sorted(events, key=lambda event: users.index(event[0]))
    return [(user, item, None if format in WITHOUT_TIMES else time) for user, item, time in events]


def test_every_format_that_ships_is_tried_here():
    assert set(WRITERS) == set(FORMATS)


@pytest.mark.parametrize("format", WRITERS)
@quick
@given(data=st.data())
def test_what_is_written_is_read_back(tmp_path, format, data):
    tokens = st.text(st.characters(codec="utf-8", exclude_characters=FORBIDDEN.get(format, "")), min_size=1, max_size=6)
    times = st.floats(allow_nan=False, allow_infinity=False)
    events = data.draw(st.lists(st.tuples(tokens, tokens, times), min_size=1, max_size=8))
    whole = WRITERS[format](events)
    read = read_interactions(write(tmp_path, whole), format)
    assert events_of(read) == wanted(format, events)
    assert (read.bad_lines, read.first_bad) == (0, "")
    if format != "parquet":
        assert events_of(read_interactions(write(tmp_path, gzip.compress(whole, 1)), format)) == wanted(format, events)


@pytest.mark.parametrize("format", WRITERS)
def test_a_format_is_found_by_looking_whatever_the_name(tmp_path, format):
    path = write(tmp_path, WRITERS[format](EVENTS), "data.xyz")
    assert find_format(path) == format
    assert events_of(read_interactions(path)) == wanted(format, EVENTS)


@pytest.mark.parametrize("format", WRITERS)
def test_blocks_hold_the_same_events_and_count_bad_lines_as_they_come(tmp_path, monkeypatch, format):
    monkeypatch.setattr("fedssl.data.readers.text.BLOCK_BYTES", 16)
    monkeypatch.setattr("fedssl.data.readers.parquet.ROWS", 2)
    bad_event = b"one two three\n" if format == "pairs" else b"x\n"
    whole = WRITERS[format](EVENTS) + (b"" if format == "parquet" else bad_event)
    blocks, bad = read_events(write(tmp_path, whole), format, skip_bad_lines=True)
    assert bad.count == 0
    found = [event for block in blocks for event in zip(block.users, block.items, [None] * len(block.users) if block.times is None else block.times)]
    assert found == wanted(format, EVENTS)
    assert bad.count == (0 if format == "parquet" else 1)


# ---- names of columns ----

NAMED = {
    "csv": "who,what,rating,when\nann,tent,5,30\n",
    "tsv": "who\twhat\trating\twhen\nann\ttent\t5\t30\n",
    "jsonl": '{"when": 30, "what": "tent", "who": "ann"}\n',
    "inter": "who:token\twhat:token\twhen:float\nann\ttent\t30\n",
}


@pytest.mark.parametrize("format", [*NAMED, "parquet"])
def test_columns_are_found_by_the_names_that_are_given(tmp_path, format):
    if format == "parquet":
        pq.write_table(pa.table({"what": ["tent"], "when": [30], "who": ["ann"]}), tmp_path / "data")
    else:
        write(tmp_path, NAMED[format])
    path = tmp_path / "data"
    assert find_format(path, ("who", "what", "when")) == format
    assert events_of(read_interactions(path, columns=("who", "what", "when"))) == [("ann", "tent", 30.0)]
    assert events_of(read_interactions(path, format, columns=("who", "what"))) == [("ann", "tent", None)]
    with pytest.raises(DataError, match=r"no column whom among .*name user, item and perhaps time"):
        read_interactions(path, format, columns=("whom", "what"))
    with pytest.raises(DataError, match=r"called as a user usually is; name user|no column user_id and item_id"):
        read_interactions(path, format)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("user,item,user_id", "user and user_id could both be the user"),
        ("user,item,time,timestamp", "time and timestamp could both be the time"),
        ("user,item,x,x", "names a column twice"),
        ("user,item,", "wanted a header that names every column"),
    ],
)
def test_a_header_that_leaves_a_doubt_is_refused(tmp_path, header, says):
    with pytest.raises(DataError, match=says):
        read_interactions(write(tmp_path, header + "\na,b,1,2\n"), "csv")


def test_a_format_without_named_columns_refuses_names_and_a_reader_of_ones_own_refuses_to_skip(tmp_path):
    path = write(tmp_path, "a b c\n")
    with pytest.raises(ConfigError, match="has no columns with names"):
        read_interactions(path, "lines", columns=("a", "b"))
    with pytest.raises(ConfigError, match="decides on bad lines itself"):
        read_interactions(path, lambda path: None, skip_bad_lines=True)
    with pytest.raises(ConfigError, match="only formats that ship are read in blocks"):
        read_events(path, "builtins:open")


def test_amazon_reviews_of_2023_are_about_the_parent_and_in_milliseconds(tmp_path):
    review = {"rating": 5.0, "asin": "B1", "parent_asin": "B0", "user_id": "AG", "timestamp": 1588687728923, "verified_purchase": True}
    assert events_of(read_interactions(write(tmp_path, json.dumps(review) + "\n"))) == [("AG", "B0", 1588687728923.0)]


def test_pairs_and_lines_are_told_apart_by_a_user_who_comes_twice(tmp_path):
    assert find_format(write(tmp_path, "1 5\n1 6\n2 5\n")) == "pairs"
    assert find_format(write(tmp_path, "1 5\n2 6\n3 5 6\n")) == "lines"
    # Where nobody comes twice both give the same.
    once = write(tmp_path, "1 5\n2 6\n")
    assert events_of(read_interactions(once, "lines")) == events_of(read_interactions(once, "pairs"))


def test_a_binary_file_is_said_to_be_no_text(tmp_path):
    with pytest.raises(DataError, match=r"data, line 1: byte 0xff is not UTF-8"):
        read_interactions(write(tmp_path, b"\xff\xfe\x00 elf\n1 2\n1 3\n"))
    # Named, such a line is bad like others.
    found = read_interactions(tmp_path / "data", "pairs", skip_bad_lines=True)
    assert (found.num_events, found.bad_lines) == (2, 1)


def test_csv_hides_commas_and_quotes_in_quotes_and_tsv_does_not(tmp_path):
    assert events_of(read_interactions(write(tmp_path, 'user,item\nann,"a ""b"", c"\n'))) == [("ann", 'a "b", c', None)]
    assert events_of(read_interactions(write(tmp_path, 'user\titem\nann\t"a\n'))) == [("ann", '"a', None)]


def test_a_parquet_file_of_numbers_dates_and_categories_reads_as_text_and_seconds(tmp_path):
    times = pa.array([0, 86_400_500], pa.timestamp("ms"))
    users = pa.array(["ann", "ben"]).dictionary_encode()
    pq.write_table(pa.table({"user_id": users, "item_id": pa.array([7, 8], pa.int32()), "timestamp": times}), tmp_path / "data")
    assert events_of(read_interactions(tmp_path / "data")) == [("ann", "7", 0.0), ("ben", "8", 86400.5)]
    pq.write_table(pa.table({"user_id": users, "item_id": [7, 8], "timestamp": pa.array([0, 1], pa.date32())}), tmp_path / "data")
    assert events_of(read_interactions(tmp_path / "data")) == [("ann", "7", 0.0), ("ben", "8", 86400.0)]
    for column, values, says in [("item_id", [0.5, 1.5], "is of type double; wanted text"), ("timestamp", ["a", "b"], "is of type string; wanted a number")]:
        pq.write_table(pa.table({"user_id": ["a", "b"], "item_id": [7, 8], "timestamp": [1, 2], column: values}), tmp_path / "data")
        with pytest.raises(DataError, match=says):
            read_interactions(tmp_path / "data")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path, as_parquet(EVENTS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow; install it with: pip install 'fedssl\[sim\]'"):
        read_interactions(path)


# ---- bad lines ----

CSV = "user,item,time\nann,tent,30\n"
JSON = '{"user": "ann", "item": "tent", "time": 30}\n'
RATING = "ann::tent::5::30\n"
BAD = [
    ("csv", CSV, "ben,lamp\n", "line 3: 2 fields where the header has 3: 'ben,lamp'"),
    ("csv", CSV, 'ben,"lamp,3\n', "line 3: not CSV on one line (unexpected end of data): 'ben,\"lamp,3'"),
    ("csv", CSV, ",lamp,3\n", "line 3: an empty user token"),
    ("csv", CSV, '"",lamp,3\n', "line 3: an empty user token"),
    ("csv", CSV + "\n", "ben,lamp,soon\n", "line 4: timestamp 'soon' is not a finite number"),
    ("csv", CSV, b"ben,caf\xe9,3\n", "line 3: byte 0xe9 is not UTF-8"),
    ("tsv", CSV.replace(",", "\t"), "ben\tlamp\n", "line 3: 2 fields where the header has 3"),
    ("inter", "user_id:token\titem_id:token\nann\ttent\n", "ben\n", "line 3: 1 fields where the header has 2"),
    ("lines", "ann tent\n", "ben\n", "line 2: 'ben' has no items"),
    ("lines", "ann tent\n", "ann lamp\n", "line 2: user 'ann' is already on line 1"),
    ("pairs", "ann tent\n", "ben\n", "line 2: 1 tokens in 'ben'; wanted `user item`"),
    ("pairs", "ann tent\n", "ben lamp tent\n", "line 2: 3 tokens"),
    ("movielens", RATING, "ben::lamp::5\n", "line 2: 3 fields where `user::item::rating::time` was wanted"),
    ("movielens", RATING, "ben::lamp::5::inf\n", "line 2: timestamp 'inf' is not a finite number"),
    ("jsonl", JSON, '{"user": \n', "line 2: not JSON ("),
    ("jsonl", JSON, "[1]\n", "line 2: not a JSON object"),
    ("jsonl", JSON, '{"user": "ben", "item": "lamp"}\n', "line 2: no key time in"),
    ("jsonl", JSON, '{"user": null, "item": "lamp", "time": 1}\n', "line 2: an empty user token"),
    ("jsonl", JSON, '{"user": ["x"], "item": "lamp", "time": 1}\n', "line 2: an empty user token"),
    ("jsonl", JSON, '{"user": "\\ud800", "item": "lamp", "time": 1}\n', "line 2: an empty user token"),
    ("jsonl", JSON, '{"user": "ben", "item": "lamp", "time": true}\n', "line 2: timestamp '' is not a finite number"),
    ("jsonl", JSON, "[" * 100_000 + "\n", "line 2: not JSON ("),
]


@pytest.mark.parametrize(("format", "good", "bad", "says"), BAD, ids=[f"{row[0]}-{row[2][:12]!r}" for row in BAD])
def test_a_bad_line_stops_with_file_line_and_reason_or_is_counted(tmp_path, format, good, bad, says):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    # The good event again, as another user where a user has one line.
    again = good.splitlines(keepends=True)[-1] if format != "csv" else "ann,tent,30\n"
    again = again.replace("ann", "eve")
    path = write(tmp_path, good.encode() + bad + again.encode())
    with pytest.raises(DataError) as error:
        read_interactions(path, format)
    assert str(error.value).startswith(f"{path}, {says}")
    found = read_interactions(path, format, skip_bad_lines=True)
    assert [(user, item) for user, item, _ in events_of(found)] == [("ann", "tent"), ("eve", "tent")]
    assert (found.bad_lines, found.first_bad) == (1, str(error.value))


def test_a_bad_row_of_a_parquet_file_stops_with_its_number_or_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("fedssl.data.readers.parquet.ROWS", 2)
    table = {"user": ["a", "b", None, "d", "e"], "item": ["x", "y", "z", "", "w"], "time": [1.0, 2.0, 3.0, 4.0, float("nan")]}
    pq.write_table(pa.table(table), tmp_path / "data")
    with pytest.raises(DataError, match=r"data, row 3: an empty user token"):
        read_interactions(tmp_path / "data")
    found = read_interactions(tmp_path / "data", skip_bad_lines=True)
    assert events_of(found) == [("a", "x", 1.0), ("b", "y", 2.0)]
    assert found.bad_lines == 3 and "row 3" in found.first_bad


@pytest.mark.parametrize("format", ["csv", "tsv", "inter", "jsonl", "movielens"])
@quick
@given(places=st.sets(st.integers(0, 30), max_size=8), block=st.integers(5, 200))
def test_bad_lines_among_good_ones_are_all_counted_and_no_good_one_is_lost(tmp_path, monkeypatch, format, places, block):
    # Pushed by blocks of any size: what is bad depends on the line alone.
    monkeypatch.setattr("fedssl.data.readers.text.BLOCK_BYTES", block)
    events = [(f"u{number % 5}", f"i{number}", float(number)) for number in range(31)]
    lines = WRITERS[format](events).splitlines(keepends=True)
    header = len(lines) - len(events)
    for place in sorted(places, reverse=True):
        lines.insert(header + place, b'broken"\n')
    found = read_interactions(write(tmp_path, b"".join(lines)), format, skip_bad_lines=True)
    assert (events_of(found), found.bad_lines) == (events, len(places))


def test_a_file_of_bad_lines_alone_is_an_error_even_where_they_are_skipped(tmp_path):
    with pytest.raises(DataError, match=r"none of its 2 lines can be read; the first: .*line 2: 1 fields"):
        read_interactions(write(tmp_path, "user,item\nx\ny\n"), "csv", skip_bad_lines=True)


# ---- anything at all ----


def check_ends_well(path: Path, format: str, skip: bool) -> None:
    with suppress(DataError):
        read = read_interactions(path, format, skip_bad_lines=skip)
        assert read.num_events > 0
    with suppress(DataError):
        titles, attributes = read_items(path)
        assert set(titles) <= set(attributes)
    with suppress(DataError):
        assert all(read_users(path))


@pytest.mark.parametrize("format", ["auto", *WRITERS])
@quick
@given(noise=st.binary(max_size=60), start=st.sampled_from(["", *WRITERS]), skip=st.booleans())
@example(b'{"user": 1e400, "item": "x", "time": 1}', "", False)
@example(b'{"asin": "x", "categories": [[[["a"]], 1]]}\n{\'asin\': __import__}', "", False)
@example(b"PAR1", "", True)
def test_random_bytes_end_in_a_data_error_or_a_valid_result(tmp_path, format, noise, start, skip):
    whole = (WRITERS[start](EVENTS) if start else b"") + noise
    check_ends_well(write(tmp_path, whole), format, skip)
    check_ends_well(write(tmp_path, gzip.compress(whole, 1)), format, skip)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("format", WRITERS)
def test_a_file_cut_anywhere_ends_in_a_data_error_or_a_valid_result(tmp_path, format, skip):
    whole = WRITERS[format](EVENTS)
    for end in range(0, len(whole), 1 + len(whole) // 200):
        check_ends_well(write(tmp_path, whole[:end]), format, skip)
    packed = gzip.compress(whole, mtime=0)
    for end in range(0, len(packed), 1 + len(packed) // 50):
        with pytest.raises(DataError):
            read_interactions(write(tmp_path, packed[:end]), format, skip_bad_lines=skip)


@settings(quick, max_examples=150)
@given(st.integers(0, 2000), st.integers(0, 255), st.sampled_from(["auto", "parquet"]))
def test_a_parquet_file_with_one_wrong_byte_ends_in_a_data_error_or_a_valid_result(tmp_path, at, value, format):
    whole = bytearray(as_parquet(EVENTS))
    whole[at % len(whole)] = value
    check_ends_well(write(tmp_path, bytes(whole)), format, False)


# ---- side files ----


def test_movies_dat_of_movielens_1m_is_read_in_latin_1(tmp_path):
    path = write(tmp_path, b"1::Toy Story (1995)::Animation|Comedy\n" + "2::Les Misérables (1995)::Drama\n".encode("latin-1"))
    assert read_items(path) == (
        {"1": "Toy Story (1995)", "2": "Les Misérables (1995)"},
        {"1": {"genres": "Animation|Comedy"}, "2": {"genres": "Drama"}},
    )


@pytest.mark.parametrize("separator", [",", "\t"])
def test_movies_csv_gives_titles_and_attributes_and_leaves_out_what_is_empty(tmp_path, separator):
    title = '"American President, The (1995)"' if separator == "," else "American President, The (1995)"
    rows = [["movieId", "title", "genres"], ["11", title, "Comedy"], ["12", "Dracula", ""], ["12", "Again", "x"]]
    path = write(tmp_path, "".join(separator.join(row) + "\n" for row in rows))
    assert read_items(path) == ({"11": "American President, The (1995)", "12": "Dracula"}, {"11": {"genres": "Comedy"}, "12": {}})


def test_amazon_metadata_of_every_year_gives_title_categories_brand_and_price(tmp_path):
    of_2014 = "{'asin': 'A', 'title': 'Soap', 'price': 9.5, 'categories': [['Beauty', 'Bath'], ['Beauty']], 'related': {'x': []}}"
    of_2018 = json.dumps({"asin": "B", "title": "Comb", "category": ["Beauty", "Hair"], "brand": "Comby", "price": "$3", "description": ["long"]})
    of_2023 = json.dumps({"parent_asin": "C", "title": "Oil", "categories": [], "store": "Oily", "price": None})
    titles, attributes = read_items(write(tmp_path, "\n".join([of_2014, of_2018, of_2023])))
    assert titles == {"A": "Soap", "B": "Comb", "C": "Oil"}
    assert attributes == {
        "A": {"categories": "Beauty|Bath", "price": "9.5"},
        "B": {"categories": "Beauty|Hair", "brand": "Comby", "price": "$3"},
        "C": {"brand": "Oily"},
    }


@pytest.mark.parametrize(
    "content",
    [
        "1::F::1::10::48067\n2::M::56::16::\n",
        "user_id:token\tgender:token\tage:float\toccupation:token\tzip_code:token\n1\tF\t1\t10\t48067\n2\tM\t56\t16\t\n",
        "userId,gender,age,occupation,zip_code\n1,F,1,10,48067\n2,M,56,16,\n",
    ],
)
def test_user_files_give_attributes(tmp_path, content):
    assert read_users(write(tmp_path, content)) == {
        "1": {"gender": "F", "age": "1", "occupation": "10", "zip_code": "48067"},
        "2": {"gender": "M", "age": "56", "occupation": "16"},
    }


@pytest.mark.parametrize(
    ("content", "reader", "says"),
    [
        ("1::Toy Story\n", read_items, "no column item_id among 1::Toy Story"),
        ("1::A::B\n2::A\n", read_items, "line 2: 2 fields where `item_id::title::genres` was wanted"),
        ("1::F::1::10::48067\n::F::1::10::4\n", read_users, "line 2: an empty user token"),
        ("name,age\nx,1\n", read_users, "no column user_id among name, age"),
        ("item_id,a,a\n1,2,3\n", read_items, "names a column twice"),
        ('{"asin": "A"}\n{"title": "B"}\n', read_items, "line 2: no key asin or parent_asin"),
        ('{"asin": "A"}\n{broken\n', read_items, "line 2: not JSON"),
    ],
)
def test_a_bad_side_file_says_where_and_why(tmp_path, content, reader, says):
    path = write(tmp_path, content)
    with pytest.raises(DataError) as error:
        reader(path)
    assert str(path) in str(error.value) and says in str(error.value)


def test_no_time_is_lost_in_the_types(tmp_path):
    found = read_interactions(write(tmp_path, as_csv(EVENTS)))
    assert found.times is not None and found.times.dtype == np.float64
    assert found.users.dtype == found.items.dtype == np.int64
