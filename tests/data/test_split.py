"""A split by time, worked by hand: nothing of a later time is trained on, by anybody, and a target is read from what came before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from fedssl_simulations.baselines import run_baselines
from fedssl_simulations.run import simulate
from fedssl_simulations.scorers import markov, popularity
from hypothesis import given, settings
from hypothesis import strategies as st
from small import learned, recipe_of, small_config, small_dataset, train

from fedssl.checking import check
from fedssl.client_round import open_shard, write_shard
from fedssl.config import CountsConfig, DataConfig
from fedssl.counts import sum_transitions
from fedssl.data.dataset import Dataset, load_dataset, make_dataset, open_dataset, write_dataset
from fedssl.data.histories import HeldFrom, Histories, take_users
from fedssl.data.history_store import open_histories, write_histories
from fedssl.data.interactions import Interactions
from fedssl.data.split import check_has_targets, hold_out
from fedssl.data.windows import draw_windows
from fedssl.errors import ConfigError, DataError
from fedssl.evaluation import evaluate, training_counts

# Items a to e are rows 1 to 5. Validation begins at 5, test at 8, both included.
PEOPLE = {
    "ann": [(1, 1), (2, 2), (3, 5), (4, 8), (5, 9)],  # trains 1 2, validation 3, test 4 after 1 2 3; 5 is never used
    "ben": [(2, 1), (1, 4), (4, 6)],  # trains 2 1, validation 4, no test
    "carl": [(5, 9), (1, 10)],  # begins after the cut: nothing to read, no target
    "dora": [(1, 2), (2, 3)],  # trains 1 2, no target
    "eve": [(3, 6), (4, 7), (1, 8)],  # trains nothing, so no validation; test 1 after 3 4
}
BY_TIME = DataConfig(split="global-time", validation_from=5, test_from=8)


def histories_of(people: dict[str, list[tuple[int, int]]]) -> Histories:
    cuts = np.concatenate([[0], np.cumsum([len(events) for events in people.values()])]).astype(np.int64)
    items, times = np.array([event for events in people.values() for event in events]).reshape(-1, 2).T
    return Histories(items.astype(np.int32), cuts, times.astype(np.float64), tuple(people))


PLAIN = histories_of(PEOPLE)
SPLIT = hold_out(PLAIN, BY_TIME, "here")


def parts(histories: Histories, user: str) -> tuple[list[int], int | None, int | None]:
    """Training items, validation target and test target of a user."""
    number = list(histories.names).index(user)
    training = histories.items[histories.cuts[number] : histories.training_ends[number]].tolist()
    validation, test = (int(histories.target_places(split)[number]) for split in ("validation", "test"))
    return training, *(int(histories.items[place]) if place >= 0 else None for place in (validation, test))


def test_everybody_trains_up_to_the_cut_and_is_tested_on_the_first_event_after_it():
    assert parts(SPLIT, "ann") == ([1, 2], 3, 4)
    assert parts(SPLIT, "ben") == ([2, 1], 4, None)
    assert parts(SPLIT, "carl") == ([], None, None)
    assert parts(SPLIT, "dora") == ([1, 2], None, None)
    assert parts(SPLIT, "eve") == ([], None, 1)
    assert SPLIT.can_be_tested.tolist() == [True, False, False, False, True]


def test_users_rows_and_events_stay_where_they_were():
    assert SPLIT.items is PLAIN.items and SPLIT.cuts is PLAIN.cuts and SPLIT.names is PLAIN.names
    assert hold_out(PLAIN, DataConfig(), "here") is PLAIN
    back = hold_out(SPLIT, DataConfig(), "here")
    assert back.fingerprint == PLAIN.fingerprint != SPLIT.fingerprint
    assert back.training_ends.tolist() == PLAIN.training_ends.tolist() == [3, 6, 10, 12, 13]


def test_leave_one_out_has_its_targets_at_the_last_two_events():
    assert PLAIN.target_places("validation").tolist() == [3, 6, -1, -1, 13]
    assert PLAIN.target_places("test").tolist() == [4, 7, -1, -1, 14]


def test_a_target_is_read_from_everything_before_it():
    read: dict[str, list[int]] = {}

    def scorer(past, users):
        read.update({SPLIT.names[user]: row.tolist() for user, row in zip(users, past, strict=True)})
        import torch

        return torch.arange(6.0).expand(len(past), -1)

    test = evaluate(scorer, SPLIT, "test")
    assert read == {"ann": [1, 2, 3], "eve": [3, 4]}
    assert test.targets.tolist() == [4, 1]
    # Items score as their number: 5 is above ann's 4; eve's 1 is below 2, and below 3, 4, which she has met, and 5.
    assert (test.all["score"].tolist(), test.unseen["score"].tolist()) == ([2, 5], [2, 3])
    read.clear()
    assert evaluate(scorer, SPLIT, "validation").targets.tolist() == [3, 4]
    assert read == {"ann": [1, 2], "ben": [2, 1]}
    with pytest.raises(DataError, match="test: none of 1 users has an event in this period and one before it"):
        evaluate(scorer, SPLIT, "test", users=np.array([1]))


def test_windows_counts_and_baselines_read_training_events_alone():
    windows = draw_windows(SPLIT, np.arange(5), np.arange(5, dtype=np.uint64), steps=1, windows=1, length=4)[:, 0, 0]
    assert windows.tolist() == [[1, 2], [2, 1], [0, 0], [1, 2], [0, 0]]
    cells, broken = sum_transitions(SPLIT, np.arange(5), CountsConfig(lags=3), num_items=5, step=1.0)
    assert list(zip(cells.rows, cells.columns, cells.values)) == [(1, 2, 2), (2, 1, 1)]
    assert not broken.any()
    assert training_counts(SPLIT, 5).tolist() == [0, 3, 3, 0, 0, 0]
    for make in (popularity, markov):
        scores = make(SPLIT, 5)([np.array([1], np.int32)], np.array([0]))
        assert (scores[0, 3:] == 0).all() and (scores[0, 1:3] > 0).all()


@pytest.mark.parametrize(("share_validation", "share_test"), [(0.4, 0.7), (0.45, 0.68), (0.4, 8), (5, 0.7)])
def test_a_share_of_events_is_the_time_of_the_event_at_that_place(share_validation, share_test):
    # 15 events at 1 1 2 2 3 4 5 6 6 7 8 8 9 9 10: number 6 (from 0) is at 5, number 10 at 8.
    found = hold_out(PLAIN, DataConfig(split="global-time", validation_from=share_validation, test_from=share_test), "here")
    assert found.held_from == HeldFrom(5.0, 8.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 12)), min_size=4, max_size=40),
    st.floats(0.05, 0.95),
    st.floats(0.05, 0.95),
)
def test_no_training_event_is_later_than_the_cut_and_no_target_earlier(events, first, second):
    users, items, times = (np.array(column) for column in zip(*events))
    interactions = Interactions(users, items, times.astype(float), tuple("uvwxyz"), tuple("abcdefg"))
    shares = DataConfig(split="global-time", validation_from=min(first, second), test_from=max(first, second) + 1e-9, min_events=1)
    in_order = np.sort(times)
    if in_order[int(shares.validation_from * len(times))] == in_order[int(shares.test_from * len(times))]:
        with pytest.raises(DataError, match="wanted an earlier validation_from"):
            make_dataset(interactions, shares)
        return
    histories = make_dataset(interactions, shares).histories
    validation_from, test_from = histories.held_from
    assert (histories.times < validation_from).mean() <= min(first, second) + 1e-9
    for user in range(histories.num_users):
        begin, end = histories.cuts[user], histories.cuts[user + 1]
        is_trained = np.arange(begin, end) < histories.training_ends[user]
        assert (is_trained == (histories.times[begin:end] < validation_from)).all()
        splits: list[tuple[Literal["validation", "test"], float, float]] = [("validation", validation_from, test_from), ("test", test_from, np.inf)]
        for split, since, until in splits:
            place = histories.target_places(split)[user]
            inside = [at for at in range(begin, end) if since <= histories.times[at] < until]
            has_past = begin < end and histories.times[begin] < since
            assert place == (inside[0] if inside and has_past else -1)


def test_a_store_a_node_and_some_of_the_users_keep_the_split(tmp_path):
    some = take_users(SPLIT, np.array([4, 0]))
    assert some.held_from == SPLIT.held_from
    assert parts(some, "ann") == parts(SPLIT, "ann") and parts(some, "eve") == parts(SPLIT, "eve")
    write_histories(SPLIT, tmp_path / "store")
    opened = open_histories(tmp_path / "store")
    assert opened.held_from == SPLIT.held_from and opened.fingerprint == SPLIT.fingerprint
    write_shard(tmp_path / "node", SPLIT, np.array([0, 1]))
    assert open_shard(tmp_path / "node").events.training_ends.tolist() == [2, 7]
    # A store without the split is as it was.
    write_histories(PLAIN, tmp_path / "plain")
    assert '"format": 1' in (tmp_path / "plain" / "histories.json").read_text()
    assert "held_from" not in (tmp_path / "plain" / "histories.json").read_text()
    (tmp_path / "store" / "histories.json").write_text((tmp_path / "store" / "histories.json").read_text().replace("8.0", '"x"'))
    with pytest.raises(DataError, match="a split by time without its two times"):
        open_histories(tmp_path / "store")


def test_a_file_and_its_store_are_split_alike(tmp_path):
    rows = [f"{user},{item},{time}" for user, events in PEOPLE.items() for item, time in events]
    (tmp_path / "data.csv").write_text("\n".join(["user,item,time", *rows]))
    settings = DataConfig(path=str(tmp_path / "data.csv"), min_events=1, split="global-time", validation_from=0.4, test_from=0.7)
    from_file = load_dataset(settings)
    assert from_file.histories.held_from == HeldFrom(5.0, 8.0)
    write_dataset(load_dataset(DataConfig(path=str(tmp_path / "data.csv"), min_events=1)), tmp_path / "store")
    from_store = load_dataset(settings.model_copy(update={"path": str(tmp_path / "store")}))
    assert from_store.histories.fingerprint == from_file.histories.fingerprint
    write_dataset(from_store, tmp_path / "split")
    assert open_dataset(tmp_path / "split").histories.held_from == HeldFrom(5.0, 8.0)
    # What [data] split asks for wins over what a store was split by.
    assert load_dataset(DataConfig(path=str(tmp_path / "split"), min_events=1)).histories.held_from is None


@pytest.mark.parametrize(
    ("cuts", "says"),
    [
        ({"validation_from": 0.5, "test_from": 0.5}, "validation_from = 0.5 is not before test_from = 0.5"),
        ({"validation_from": 9, "test_from": 8}, "validation_from = 9 is not before"),
        ({"columns": ["user"]}, "wanted two or three different names"),
        ({"columns": ["user", "user"]}, "wanted two or three different names"),
    ],
)
def test_settings_that_make_no_sense_are_refused(cuts, says):
    with pytest.raises(ConfigError, match=says):
        check(DataConfig, {"split": "global-time", **cuts}, where="here")


def test_data_that_cannot_be_split_or_tested_is_refused_with_what_to_do():
    with pytest.raises(DataError, match="the events have no times"):
        hold_out(replace(PLAIN, times=None), BY_TIME, "here")
    with pytest.raises(DataError, match=r"test_from = 0\.5 is 6; wanted an earlier validation_from"):
        hold_out(PLAIN, DataConfig(split="global-time", validation_from=9, test_from=0.5), "here")
    for cuts, says in {
        (1, 8): "where validation begins.*set another .data. validation_from",
        (5, 11): "where test begins.*set another .data. test_from",
    }.items():
        with pytest.raises(DataError, match=says):
            check_has_targets(hold_out(PLAIN, DataConfig(split="global-time", validation_from=cuts[0], test_from=cuts[1]), "here"), "here")


def by_time() -> Dataset:
    """The small data set with everybody active from the first day to the last, half of it training."""
    dataset = small_dataset()
    histories = dataset.histories
    place = np.arange(histories.num_events) - np.repeat(histories.cuts[:-1], histories.lengths)
    times = (place + np.repeat(np.linspace(0.0, 0.9, histories.num_users), histories.lengths)) / np.repeat(histories.lengths, histories.lengths)
    settings = DataConfig(split="global-time", validation_from=0.5, test_from=0.75)
    return replace(dataset, histories=hold_out(replace(histories, times=times), settings, "here"))


COUNTS = {"counts": {"lags": 2}}


@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_held_out_moves_no_weight_and_no_count(shards):
    config, dataset = small_config(COUNTS), by_time()
    histories = dataset.histories
    is_held = np.arange(histories.num_events) >= np.repeat(histories.training_ends, histories.lengths)
    assert 0.4 < is_held.mean() < 0.6
    other = replace(histories, items=np.where(is_held, 1 + histories.items % dataset.catalogue.num_items, histories.items).astype(np.int32))
    state, _ = train(config, dataset, shards=shards)
    changed, _ = train(config, replace(dataset, histories=other), shards=shards)
    assert (state.weights_P == changed.weights_P).all()
    assert (state.counts.values == changed.counts.values).all()
    # The same, with one trained event another: the test can fail.
    first = int(np.flatnonzero(histories.training_lengths >= 2)[0])
    items = histories.items.copy()
    items[histories.cuts[first]] = 1 + items[histories.cuts[first]] % dataset.catalogue.num_items
    moved, _ = train(config, replace(dataset, histories=replace(histories, items=items)), shards=shards)
    assert not (state.counts.values.shape == moved.counts.values.shape and (state.counts.values == moved.counts.values).all())


def test_a_run_and_its_baselines_go_through_and_resume_alike(tmp_path: Path):
    config = small_config(COUNTS, {"evaluation": {"every": 1, "users": 5}, "head": {"name": "user-vector"}, "system": {"checkpoint_every": 1}})
    dataset = by_time()
    run = simulate(config, out=tmp_path / "run", dataset=dataset)
    validated = (dataset.histories.target_places("validation") >= 0).sum()
    tested = dataset.histories.can_be_tested.sum()
    assert validated > 5 and tested > 5
    assert sum(group["users"] for group in run.report["groups"]["activity"].values()) == tested
    assert run.report["data"]["fingerprint"] == dataset.histories.fingerprint
    asked = iter([False, False, True])
    stopped = simulate(config, out=tmp_path / "again", dataset=dataset, should_stop=lambda: next(asked))
    assert not stopped.is_finished
    assert simulate(resume=tmp_path / "again", dataset=dataset).is_finished
    assert learned(tmp_path / "again") == learned(tmp_path / "run")
    rows = run_baselines(config, dataset, names=("popularity", "each alone"))
    assert rows["each alone"]["about"]["users"] == tested
    assert 0 < rows["popularity"]["test"]["unseen"]["mrr"] < 1
    assert recipe_of(config, dataset).hash == recipe_of(config, small_dataset()).hash
