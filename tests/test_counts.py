"""Item-to-item counts against loops: which pairs count, how much one user may weigh, what is kept, what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.slow_counts import slow_scores, user_cells, user_steps
from small import dataset_of

from fedssl.config import CountsConfig
from fedssl.counts import Counts, CountsScorer, dense, from_cells, keep_top, merge_rows, most_popular, sum_items, sum_transitions
from fedssl.privacy.grid import grid_step
from fedssl.privacy.manifest import COUNTS_STEP, rows_of_block, squared_norm
from fedssl.records import Address, SparseSum, Upload
from fedssl.server_round import Sums, add, totals_of

ITEMS = 5
# Few items, so that pairs repeat; from no event to far more than the lags.
histories = st.lists(st.lists(st.integers(1, ITEMS), max_size=14), min_size=1, max_size=6)


def summed(rows: list[list[int]], config: CountsConfig, *, step: float = COUNTS_STEP, places: list[int] | None = None) -> SparseSum:
    events = dataset_of(*rows, num_items=ITEMS).histories
    return sum_transitions(events, np.arange(len(rows)) if places is None else np.array(places, dtype=np.int64), config, num_items=ITEMS, step=step)[0]


def cells_of(sparse: SparseSum) -> dict[tuple[int, int], int]:
    return {(int(row), int(column)): int(value) for row, column, value in zip(sparse.rows, sparse.columns, sparse.values, strict=True)}


def training(items: list[int]) -> list[int]:
    return items[:-2] if len(items) >= 3 else items


def test_a_pair_worked_by_hand():
    # Training events 1 2 1 2; at lag 1: 1>2 twice, 2>1 once; at lag 2, half a count each: 1>1 and 2>2.
    sparse = summed([[1, 2, 1, 2, 4, 5]], CountsConfig(lags=2, decay=0.5))
    assert {cell: value * COUNTS_STEP for cell, value in cells_of(sparse).items()} == {(1, 2): 2.0, (2, 1): 1.0, (1, 1): 0.5, (2, 2): 0.5}


def test_held_out_events_are_not_counted():
    assert cells_of(summed([[1, 2, 3]], CountsConfig())) == {}
    assert cells_of(summed([[1, 2, 3, 4]], CountsConfig())) == {(1, 2): round(1 / COUNTS_STEP)}
    # Nothing of two events is held out.
    assert cells_of(summed([[1, 2]], CountsConfig())) == {(1, 2): round(1 / COUNTS_STEP)}


@given(rows=histories, lags=st.integers(1, 6), decay=st.sampled_from([1.0, 0.5, 0.25]))
def test_raw_counts_are_those_of_a_loop(rows: list[list[int]], lags: int, decay: float):
    expected: dict[tuple[int, int], int] = {}
    for items in rows:
        for cell, value in user_steps(training(items), lags, decay, COUNTS_STEP).items():
            expected[cell] = expected.get(cell, 0) + value
    assert cells_of(summed(rows, CountsConfig(lags=lags, decay=decay))) == expected


@given(rows=histories, lags=st.integers(1, 6), decay=st.floats(0.05, 1.0))
def test_cells_are_sorted_and_each_listed_once(rows: list[list[int]], lags: int, decay: float):
    sparse = summed(rows, CountsConfig(lags=lags, decay=decay, clip_norm=0.7), step=grid_step(0.7))
    key = sparse.rows.astype(np.int64) * (ITEMS + 1) + sparse.columns
    assert (np.diff(key) > 0).all()
    assert sparse.shape == (ITEMS + 1, ITEMS + 1)
    assert len(sparse.rows) == 0 or (sparse.rows.min() >= 1 and sparse.columns.min() >= 1)


@given(items=st.lists(st.integers(1, ITEMS), min_size=4, max_size=40), lags=st.integers(1, 6), decay=st.floats(0.05, 1.0), clip=st.floats(1e-3, 50.0))
@settings(max_examples=200)
def test_no_user_is_longer_than_the_clip_exactly_in_whole_steps(items: list[int], lags: int, decay: float, clip: float):
    step = grid_step(clip)
    values = summed([items], CountsConfig(lags=lags, decay=decay, clip_norm=clip), step=step).values
    # A power of two divides exactly, so this is the norm itself and not its rounding.
    assert squared_norm(values) <= (clip / step) ** 2
    norm = np.sqrt(sum(value**2 for value in user_cells(training(items), lags, decay).values()))
    # Shortened to the clip, or left as it was: rounding takes less than a step a cell, the margin 2^-16.
    assert np.sqrt(squared_norm(values)) * step >= min(norm, clip) * (1 - 2.0**-15) - step * np.sqrt(len(values))


@given(items=st.lists(st.integers(1, ITEMS), min_size=4, max_size=40), clip=st.floats(1e-3, 50.0), decay=st.floats(0.05, 1.0))
def test_clipped_counts_keep_their_proportions(items: list[int], clip: float, decay: float):
    step = grid_step(clip)
    found = cells_of(summed([items], CountsConfig(lags=3, decay=decay, clip_norm=clip), step=step))
    wanted = user_cells(training(items), 3, decay)
    scale = min(clip * (1 - 2.0**-16) / np.sqrt(sum(value**2 for value in wanted.values())), 1.0) / step
    for cell, value in wanted.items():
        assert found.get(cell, 0) == pytest.approx(value * scale, abs=1 + 1e-9 * value * scale)


def test_a_pair_that_occurs_twice_is_clipped_as_one_cell():
    # 1 2 1 2 1 2: the pair 1>2 three times, 2>1 twice: norm sqrt(13), not sqrt(5).
    step = grid_step(1.0)
    found = cells_of(summed([[1, 2, 1, 2, 1, 2, 5, 5]], CountsConfig(lags=1, clip_norm=1.0), step=step))
    assert found[1, 2] * step == pytest.approx(3 / 13**0.5, rel=1e-4)
    assert found[2, 1] * step == pytest.approx(2 / 13**0.5, rel=1e-4)


def test_a_user_with_more_pairs_than_a_raw_cell_may_hold_counts_as_zero_and_others_stay():
    events = dataset_of([1, 1] * 150, [1, 2, 3, 4], num_items=ITEMS).histories
    sparse, is_broken = sum_transitions(events, np.arange(2), CountsConfig(lags=1), num_items=ITEMS, step=COUNTS_STEP)
    assert is_broken.tolist() == [True, False]
    assert cells_of(sparse) == {(1, 2): round(1 / COUNTS_STEP)}


@given(rows=histories, seed=st.integers(0, 100), clip=st.sampled_from([None, 0.8]))
def test_the_split_over_nodes_changes_no_number(rows: list[list[int]], seed: int, clip: float | None):
    config, step = CountsConfig(lags=3, decay=0.8, clip_norm=clip), COUNTS_STEP if clip is None else grid_step(clip)
    whole = summed(rows, config, step=step)
    order = np.random.default_rng(seed).permutation(len(rows))
    sums: Sums = {}
    for users in np.array_split(order, 3):
        part = summed(rows, config, step=step, places=np.sort(users).tolist())
        add(sums, Upload(Address("run", "counts", 1), "recipe", {"counts": part}))
    total = totals_of(sums)["counts"]
    assert isinstance(total, SparseSum)
    for name in ("rows", "columns", "values"):
        assert np.array_equal(getattr(total, name), getattr(whole, name))


@pytest.mark.parametrize("cells_at_once", [1 << 22, 50])
def test_more_users_and_cells_than_are_summed_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch, cells_at_once: int):
    monkeypatch.setattr("fedssl.counts.CELLS_AT_ONCE", cells_at_once)
    rows = [[1 + (user + place) % ITEMS for place in range(6)] for user in range(1100)]
    found = cells_of(summed(rows, CountsConfig(lags=1)))
    expected: dict[tuple[int, int], int] = {}
    for items in rows:
        for cell, value in user_steps(training(items), 1, 1.0, COUNTS_STEP).items():
            expected[cell] = expected.get(cell, 0) + value
    assert found == expected


@given(rows=histories, blocks=st.integers(1, ITEMS + 3), clip=st.sampled_from([None, 0.8]))
def test_blocks_of_rows_hold_each_cell_once_and_change_no_number(rows: list[list[int]], blocks: int, clip: float | None):
    config, step = CountsConfig(lags=3, decay=0.8, clip_norm=clip), COUNTS_STEP if clip is None else grid_step(clip)
    events, found = dataset_of(*rows, num_items=ITEMS).histories, {}
    for number in range(1, blocks + 1):
        block = rows_of_block(ITEMS + 1, blocks, number)
        part = sum_transitions(events, np.arange(len(rows)), config, num_items=ITEMS, step=step, block=block)[0]
        assert part.shape == (len(block), ITEMS + 1)
        here = {(block[row], column): value for (row, column), value in cells_of(part).items()}
        assert not here.keys() & found.keys()
        found |= here
    assert found == cells_of(summed(rows, config, step=step))


@given(
    cells=st.dictionaries(st.tuples(st.integers(1, ITEMS), st.integers(1, ITEMS)), st.integers(1, 9)),
    is_first=st.lists(st.booleans(), min_size=ITEMS + 1, max_size=ITEMS + 1),
)
def test_matrices_of_other_rows_are_merged_into_the_matrix_of_all(cells: dict[tuple[int, int], int], is_first: list[bool]):
    def matrix(chosen: dict[tuple[int, int], int]) -> Counts:
        rows, columns = (np.array([cell[side] for cell in sorted(chosen)], dtype=np.int64) for side in (0, 1))
        return from_cells(rows, columns, np.array([chosen[cell] for cell in sorted(chosen)], dtype=np.float64), num_items=ITEMS)

    one, other = (matrix({cell: value for cell, value in cells.items() if is_first[cell[0]] == which}) for which in (True, False))
    merged, whole = merge_rows(one, other), matrix(cells)
    for name in ("starts", "columns", "values"):
        assert (getattr(merged, name).dtype, getattr(merged, name).tolist()) == (getattr(whole, name).dtype, getattr(whole, name).tolist())


# ---- under a plan ----


@given(rows=histories, lags=st.integers(1, 4), kept=st.sets(st.integers(1, ITEMS), min_size=1))
def test_items_that_are_not_counted_are_passed_over_as_if_nobody_had_met_them(rows: list[list[int]], lags: int, kept: set[int]):
    counted, config = np.array(sorted(kept), dtype=np.int64), CountsConfig(lags=lags, decay=0.5)
    events = dataset_of(*rows, num_items=ITEMS).histories
    found = dense(sum_transitions(events, np.arange(len(rows)), config, num_items=ITEMS, step=COUNTS_STEP, rows=counted)[0])
    expected = np.zeros((ITEMS + 1, ITEMS + 1), dtype=np.int64)
    for items in rows:
        for (row, column), steps in user_steps([item for item in training(items) if item in kept], lags, 0.5, COUNTS_STEP).items():
            expected[row, column] += steps
    assert np.array_equal(found, expected[np.ix_(counted, counted)])


@given(rows=histories, clip=st.floats(1e-3, 3.0), user=st.integers(0, 5))
@settings(max_examples=200)
def test_one_user_more_or_less_changes_each_private_total_by_at_most_the_clip_in_whole_steps(rows: list[list[int]], clip: float, user: int):
    config, step, counted = CountsConfig(lags=3, decay=0.8, clip_norm=clip), grid_step(clip), np.array([1, 2, 4])
    events = dataset_of(*rows, num_items=ITEMS).histories
    everybody = np.arange(len(rows))
    others = np.delete(everybody, user % len(rows))
    for total in (
        lambda users: dense(sum_transitions(events, users, config, num_items=ITEMS, step=step, rows=counted)[0]),
        lambda users: sum_items(events, users, config, num_items=ITEMS, step=step),
    ):
        assert squared_norm(total(everybody) - total(others)) <= (clip / step) ** 2


def test_a_histogram_worked_by_hand():
    # Training events 1 2 1 2 2: two of item 1, three of item 2; the norm is root 13.
    events = dataset_of([1, 2, 1, 2, 2, 4, 5], [3, 3], num_items=ITEMS).histories
    found = sum_items(events, np.arange(2), CountsConfig(clip_norm=1.0), num_items=ITEMS, step=grid_step(1.0)) * grid_step(1.0)
    assert found.tolist() == pytest.approx([0, 2 / 13**0.5, 3 / 13**0.5, 1, 0, 0], abs=1e-4)


def test_the_most_popular_are_the_largest_and_of_equal_ones_the_smaller_rows():
    popularity = np.array([np.inf, 2.0, -1.0, 5.0, 2.0, 2.0], dtype=np.float32)
    assert most_popular(popularity, 3).tolist() == [1, 3, 4]
    assert most_popular(popularity, 99).tolist() == [1, 2, 3, 4, 5]


# ---- what is kept ----


def counts_of(table: Any) -> Counts:
    rows, columns = np.nonzero(table)
    return from_cells(rows, columns, np.asarray(table, dtype=np.float64)[rows, columns], num_items=len(table) - 1)


def table_of(counts: Counts) -> Any:
    side = counts.num_items + 1
    table = np.zeros((side, side))
    table[np.repeat(np.arange(side), np.diff(counts.starts)), counts.columns] = counts.values
    return table


TABLE = np.array([[0, 0, 0, 0, 0], [0, 3, 5, 5, 1], [0, 0, 0, 0, 0], [0, 2, 2, 2, 2], [0, 0, 0, 0, 7]], dtype=np.float64)


def test_cells_lie_by_rows():
    counts = counts_of(TABLE)
    assert counts.starts.tolist() == [0, 0, 4, 4, 8, 9]
    assert counts.columns.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 4]
    assert counts.values.tolist() == [3, 5, 5, 1, 2, 2, 2, 2, 7]
    assert (counts.columns.dtype, counts.values.dtype, counts.num_items) == (np.int32, np.float32, 4)


def test_of_each_row_the_largest_cells_stay_and_of_equal_ones_the_smaller_column():
    kept = table_of(keep_top(counts_of(TABLE), 2))
    assert kept.tolist() == [[0, 0, 0, 0, 0], [0, 0, 5, 5, 0], [0, 0, 0, 0, 0], [0, 2, 2, 0, 0], [0, 0, 0, 0, 7]]
    assert table_of(keep_top(counts_of(TABLE), 1))[1].tolist() == [0, 0, 5, 0, 0]


def test_a_top_of_zero_keeps_all():
    counts = counts_of(TABLE)
    assert keep_top(counts, 0) is counts


@given(seed=st.integers(0, 1000), top=st.integers(1, 6))
def test_the_top_of_a_random_table_is_that_of_a_sort(seed: int, top: int):
    table = np.random.default_rng(seed).integers(0, 4, size=(6, 6)).astype(np.float64)
    table[0], table[:, 0] = 0, 0
    kept = table_of(keep_top(counts_of(table), top))
    for row, before in zip(kept, table, strict=True):
        chosen = sorted((column for column in range(6) if before[column]), key=lambda column: (-before[column], column))[:top]
        assert row.tolist() == [before[column] if column in chosen else 0 for column in range(6)]


# ---- what they say ----


@pytest.mark.parametrize("form", ["log1p", "log-lift"])
@given(seed=st.integers(0, 1000), past=st.lists(st.lists(st.integers(1, 5), max_size=7), min_size=1, max_size=4), context=st.integers(1, 4))
def test_scores_are_those_of_a_dense_table(form: Any, seed: int, past: list[list[int]], context: int):
    chance = np.random.default_rng(seed)
    table = np.round(chance.random((6, 6)) * 8) * (chance.random((6, 6)) < 0.5) / 4
    table[0], table[:, 0] = 0, 0
    config = CountsConfig(form=form, context=context, context_decay=0.6, scale=2.5)
    found = CountsScorer(counts_of(table), config)([np.array(items, dtype=np.int32) for items in past])
    assert found.shape == (len(past), 6) and found.dtype == np.float32
    for scores, items in zip(found, past, strict=True):
        wanted = slow_scores(table, items, context=context, context_decay=0.6, form=form, scale=2.5, prior=config.prior)
        assert scores[1:].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("number", [0, 1, 31, 32, 33, 100])
def test_how_many_histories_are_read_at_once_changes_no_score(number: int):
    chance = np.random.default_rng(number)
    past = [chance.integers(1, 5, chance.integers(0, 6)).astype(np.int32) for _ in range(number)]
    scorer = CountsScorer(counts_of(TABLE), CountsConfig(form="log-lift"))
    found = scorer(past)
    assert found.shape == (number, 5)
    for scores, items in zip(found, past, strict=True):
        assert np.array_equal(scores, scorer([items])[0])


def test_an_item_met_twice_is_read_twice():
    scorer = CountsScorer(counts_of(TABLE), CountsConfig(context=2, context_decay=0.5, scale=1.0))
    once, twice = scorer([np.array([1], dtype=np.int32), np.array([1, 1], dtype=np.int32)])
    assert np.exp(once)[2] - 1 == pytest.approx(5.0, rel=1e-5)
    assert np.exp(twice)[2] - 1 == pytest.approx(7.5, rel=1e-5)


@pytest.mark.parametrize("form", ["log1p", "log-lift"])
def test_without_histories_or_without_cells_scores_are_finite(form: Any):
    empty = from_cells(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), num_items=4)
    assert CountsScorer(counts_of(TABLE), CountsConfig(form=form))([]).shape == (0, 5)
    for counts in (empty, counts_of(TABLE)):
        found = CountsScorer(counts, CountsConfig(form=form))([np.zeros(0, dtype=np.int32), np.array([3], dtype=np.int32)])
        assert np.isfinite(found[:, 1:]).all()
