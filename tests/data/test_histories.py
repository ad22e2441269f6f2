import hashlib
import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triples import coded

from fedssl.catalogue import Catalogue
from fedssl.data.histories import Histories, make_histories, shuffled_in_time, take_users
from fedssl.data.history_store import open_histories, write_histories
from fedssl.errors import CatalogueMismatch, DataError


def small() -> Histories:
    """Users of five, one, three, no and two events."""
    return Histories(
        items=np.array([3, 1, 3, 2, 5, 4, 1, 2, 3, 5, 5], dtype=np.int32),
        cuts=np.array([0, 5, 6, 9, 9, 11]),
        times=np.arange(11.0),
        names=("a", "b", "ć", "d", "e"),
    )


def test_users_stand_in_order_of_their_tokens_as_text_and_rows_in_order_of_first_appearance():
    histories, catalogue = make_histories(coded([("9", "p", 3), ("10", "q", 2), ("9", "r", 1), ("10", "p", 1)]))
    assert list(histories.names) == ["10", "9"]
    # User 10: p, q by time; user 9: r, p.
    assert catalogue.tokens == ("p", "q", "r")
    assert histories.items.tolist() == [1, 2, 3, 1]
    assert histories.cuts.tolist() == [0, 2, 4]
    assert histories.times is not None
    assert histories.times.tolist() == [1, 2, 1, 3]
    assert (histories.items.dtype, histories.cuts.dtype) == (np.int32, np.int64)


def test_equal_times_and_no_times_keep_the_order_of_the_file():
    triples = [("u", "c", 5.0), ("v", "a", 5.0), ("u", "a", 5.0), ("u", "b", 5.0), ("u", "z", 1.0)]
    histories, catalogue = make_histories(coded(triples))
    assert [catalogue.tokens[row - 1] for row in histories.of(0)] == ["z", "c", "a", "b"]
    histories, catalogue = make_histories(coded(triples, with_times=False))
    assert [catalogue.tokens[row - 1] for row in histories.of(0)] == ["c", "a", "b", "z"]
    assert histories.times is None


def test_repeated_items_stay():
    histories, _ = make_histories(coded([("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("u", "a", 4)]))
    assert histories.of(0).tolist() == [1, 2, 1, 1]


events = st.lists(st.tuples(st.sampled_from(["1", "10", "2", "b", "B", "ä"]), st.sampled_from("abcdef"), st.integers(0, 4).map(float)), max_size=25)


@settings(max_examples=100, deadline=None)
@given(events)
def test_histories_are_those_of_a_slow_obvious_sort(triples):
    histories, catalogue = make_histories(coded(triples))
    # Python's sort is stable, so file order settles equal times.
    ordered = sorted(triples, key=lambda triple: (triple[0], triple[2]))
    assert [catalogue.tokens[row - 1] for row in histories.items] == [item for _, item, _ in ordered]
    assert np.repeat(np.array(histories.names, dtype=object), histories.lengths).tolist() == [user for user, _, _ in ordered]
    assert catalogue.tokens == tuple(dict.fromkeys(item for _, item, _ in ordered))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=15), st.randoms(use_true_random=False))
def test_the_order_of_the_file_changes_nothing_where_times_differ(pairs, chance):
    triples = [(user, item, float(time)) for time, (user, item) in enumerate(pairs)]
    shuffled = chance.sample(triples, len(triples))
    assert make_histories(coded(triples))[0].fingerprint == make_histories(coded(shuffled))[0].fingerprint


def test_a_given_catalogue_fixes_the_rows_and_may_list_more_than_occurs():
    public = Catalogue(("z", "b", "a"), titles={"a": "A"})
    histories, catalogue = make_histories(coded([("u", "a", 1), ("u", "b", 2)]), public)
    assert catalogue is public
    assert histories.items.tolist() == [3, 2]


def test_an_item_outside_a_given_catalogue_is_an_error_that_names_it():
    with pytest.raises(CatalogueMismatch, match=r"item 'lamp' \(and 0 more\).*catalogue of 1 items"):
        make_histories(coded([("u", "tent", 1), ("u", "lamp", 2)]), Catalogue(("tent",)))


def test_the_last_event_is_test_the_one_before_validation_and_short_histories_only_train():
    histories = small()
    assert histories.lengths.tolist() == [5, 1, 3, 0, 2]
    assert histories.can_be_tested.tolist() == [True, False, True, False, False]
    assert histories.training_ends.tolist() == [3, 6, 7, 9, 11]
    assert histories.training_lengths.tolist() == [3, 1, 1, 0, 2]
    assert (histories.num_users, histories.num_events) == (5, 11)


def test_a_user_number_out_of_range_is_an_index_error():
    assert small().of(2).tolist() == [1, 2, 3]
    assert small().of(3).tolist() == []
    for user in (-1, 5):
        with pytest.raises(IndexError):
            small().of(user)


def test_the_fingerprint_speaks_of_items_and_cuts_alone():
    histories = small()
    assert replace(histories, times=None, names=("v", "w", "x", "y", "z")).fingerprint == histories.fingerprint
    other_items = histories.items.copy()
    other_items[0] = 1
    assert replace(histories, items=other_items).fingerprint != histories.fingerprint
    assert replace(histories, cuts=np.array([0, 4, 6, 9, 9, 11])).fingerprint != histories.fingerprint
    # Little-endian on every machine: one item of four bytes, two cuts of eight.
    one = Histories(np.array([1], dtype=np.int32), np.array([0, 1]), None, ("a",))
    assert one.fingerprint == hashlib.sha256(b"histories 1 1\n" + struct.pack("<iqq", 1, 0, 1)).hexdigest()


def test_taken_users_keep_their_events_times_and_names_in_the_order_asked_for():
    taken = take_users(small(), np.array([2, 3, 0]))
    assert taken.items.tolist() == [1, 2, 3, 3, 1, 3, 2, 5]
    assert taken.cuts.tolist() == [0, 3, 3, 8]
    assert taken.times is not None
    assert taken.times.tolist() == [6, 7, 8, 0, 1, 2, 3, 4]
    assert list(taken.names) == ["ć", "d", "a"]
    assert take_users(small(), np.array([], dtype=np.int64)).num_users == 0


def test_taken_users_in_a_row_of_a_store_stay_memory_mapped_and_are_the_same_as_any(tmp_path):
    write_histories(small(), tmp_path / "store")
    taken = take_users(open_histories(tmp_path / "store"), np.array([1, 2, 3]))
    assert isinstance(taken.items, np.memmap) and isinstance(taken.times, np.memmap)
    for name in ("items", "times"):
        assert getattr(taken, name).tolist() == getattr(small(), name)[5:9].tolist()
    assert taken.cuts.tolist() == [0, 1, 4, 4]
    assert list(taken.names) == ["b", "ć", "d"]
    slowly = take_users(small(), np.array([3, 2, 1]))
    assert [taken.of(user).tolist() for user in range(3)] == [slowly.of(2 - user).tolist() for user in range(3)]
    assert list(take_users(small(), np.array([4])).names) == ["e"]


def test_shuffling_in_time_keeps_each_users_events_and_changes_their_order():
    histories = Histories(np.tile(np.arange(1, 51, dtype=np.int32), 2), np.array([0, 50, 100]), np.arange(100.0), ("a", "b"))
    shuffled = shuffled_in_time(histories, seed=3)
    for user in range(2):
        assert sorted(shuffled.of(user)) == list(range(1, 51))
        assert shuffled.of(user).tolist() != histories.of(user).tolist()
    assert shuffled.of(0).tolist() != shuffled.of(1).tolist()
    assert shuffled.times is histories.times
    assert shuffled_in_time(histories, seed=3).fingerprint == shuffled.fingerprint
    assert shuffled_in_time(histories, seed=4).fingerprint != shuffled.fingerprint


@pytest.mark.parametrize("histories", [small(), replace(small(), times=None), Histories(np.array([], dtype=np.int32), np.array([0]), None, ())])
def test_a_store_opens_as_what_was_written(tmp_path, histories):
    write_histories(histories, tmp_path / "store")
    opened = open_histories(tmp_path / "store")
    assert opened.items.tolist() == histories.items.tolist()
    assert opened.cuts.tolist() == histories.cuts.tolist()
    assert (opened.times is None) == (histories.times is None)
    assert opened.times is None or opened.times.tolist() == histories.times.tolist()
    assert list(opened.names) == list(histories.names)
    assert opened.fingerprint == histories.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_stored_names_read_like_a_tuple(tmp_path):
    write_histories(small(), tmp_path / "store")
    names = open_histories(tmp_path / "store").names
    assert (names[2], names[-1], names[1:4], len(names), names.index("d")) == ("ć", "e", ("b", "ć", "d"), 5, 3)
    with pytest.raises(IndexError):
        names[5]


def test_a_store_is_mapped_and_not_read_into_memory(tmp_path):
    events = 8_000_000
    histories = Histories(np.ones(events, dtype=np.int32), np.array([0, 3, events]), np.zeros(events), ("a", "b"))
    write_histories(histories, tmp_path / "store")
    program = (
        "import resource, sys; from pathlib import Path; from fedssl.data.history_store import open_histories\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "histories = open_histories(Path(sys.argv[1])); assert histories.of(0).tolist() == [1, 1, 1]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run([sys.executable, "-c", program, str(tmp_path / "store")], capture_output=True, text=True, check=True).stdout
    assert int(grown) * 1024 < 0.1 * events * (4 + 8)


def test_a_store_opens_without_its_bytes_being_read_unless_that_is_asked_for(tmp_path):
    histories = Histories(np.ones(500_000, dtype=np.int32), np.array([0, 3, 500_000]), None, ("a", "b"))
    write_histories(histories, tmp_path / "store")
    assert open_histories(tmp_path / "store", verify="whole").fingerprint == histories.fingerprint
    raw = bytearray((tmp_path / "store" / "items.npy").read_bytes())
    # Pages are 7.4 KiB apart and 4 KiB long, so between the first two there is a gap.
    raw[6000] ^= 1
    (tmp_path / "store" / "items.npy").write_bytes(raw)
    assert open_histories(tmp_path / "store").fingerprint == histories.fingerprint
    with pytest.raises(DataError, match="fingerprint differs"):
        open_histories(tmp_path / "store", verify="whole")
    raw[-1] ^= 1
    (tmp_path / "store" / "items.npy").write_bytes(raw)
    with pytest.raises(DataError, match="fingerprint differs"):
        open_histories(tmp_path / "store")


def test_a_store_of_before_the_sample_is_read_whole(tmp_path):
    write_histories(small(), tmp_path / "store")
    about = json.loads((tmp_path / "store" / "histories.json").read_text())
    del about["sample"]
    (tmp_path / "store" / "histories.json").write_text(json.dumps(about))
    assert open_histories(tmp_path / "store").fingerprint == small().fingerprint
    np.save(tmp_path / "store" / "items.npy", np.arange(11, dtype=np.int32))
    with pytest.raises(DataError, match="fingerprint differs"):
        open_histories(tmp_path / "store")


def test_a_store_is_never_written_over(tmp_path):
    write_histories(small(), tmp_path / "store")
    with pytest.raises(DataError, match="already there"):
        write_histories(replace(small(), times=None), tmp_path / "store")
    assert open_histories(tmp_path / "store").times is not None


def test_a_store_that_breaks_off_leaves_nothing(tmp_path):
    class Breaks(tuple[str, ...]):
        def __iter__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_histories(replace(small(), names=Breaks(("a", "b", "c", "d", "e"))), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def cut_short(folder: Path, name: str) -> None:
    path = folder / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:-3])


def set_about(folder: Path, **values: object) -> None:
    path = folder / "histories.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        *((lambda folder, name=name: cut_short(folder, name), f"{name}.npy: missing, damaged or cut short") for name in ("items", "cuts", "times", "names")),
        (lambda folder: (folder / "items.npy").unlink(), "items.npy: missing, damaged or cut short"),
        (lambda folder: (folder / "items.npy").write_bytes(b""), "items.npy: missing, damaged or cut short"),
        (lambda folder: np.save(folder / "items.npy", np.arange(11.0)), "not a column of int32"),
        (lambda folder: np.save(folder / "items.npy", np.arange(11, dtype=np.int32)), "fingerprint differs"),
        (lambda folder: np.save(folder / "items.npy", np.arange(10, dtype=np.int32)), "does not cut 10 entries"),
        (lambda folder: np.save(folder / "times.npy", np.arange(10.0)), "different lengths"),
        (lambda folder: np.save(folder / "cuts.npy", np.array([0, 7, 6, 9, 9, 11])), "does not cut 11 entries"),
        (lambda folder: np.save(folder / "cuts.npy", np.array([], dtype=np.int64)), "does not cut 11 entries"),
        (lambda folder: (folder / "histories.json").unlink(), "this is not a store"),
        (lambda folder: (folder / "histories.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "histories.json").write_text("[]"), "no format number"),
        (lambda folder: set_about(folder, format=3), "format 3, this version reads up to 2"),
        (lambda folder: set_about(folder, format="x"), "no format number"),
    ],
)
def test_a_damaged_store_is_an_error_that_says_what_is_wrong(tmp_path, damage, says):
    write_histories(small(), tmp_path / "store")
    damage(tmp_path / "store")
    with pytest.raises(DataError, match=says):
        open_histories(tmp_path / "store")


def test_a_missing_store_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="not a store"):
        open_histories(tmp_path / "nowhere")
