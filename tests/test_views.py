"""Views of a window: worked by hand, and what holds for every window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedssl.views import any_of, crop, hide, mask, reorder, reverse

TEN = np.arange(1, 11)


def a(*numbers: float) -> np.ndarray:
    return np.array(numbers)


def test_a_crop_by_hand():
    """Six items, half of them are three; they begin at one of four places and move to the right edge."""
    window = a(0, 0, 1, 2, 3, 4, 5, 6)
    for where, piece in ((0.0, [1, 2, 3]), (0.25, [2, 3, 4]), (0.5, [3, 4, 5]), (0.75, [4, 5, 6]), (0.999, [4, 5, 6])):
        assert crop(window, 0.5, where=a(where)[0]).tolist() == [0, 0, 0, 0, 0, *piece]


def test_a_crop_keeps_its_share_rounded_up():
    for length, keep, kept in ((5, 0.5, 3), (1, 0.1, 1), (10, 0.6, 6), (10, 1.0, 10), (10, 0.61, 7)):
        assert (crop(TEN[:length], keep, where=a(0.3)[0]) > 0).sum() == kept
    assert (crop(np.arange(1, 101), 0.07, where=a(0.3)[0]) > 0).sum() == 7


def test_a_mask_by_hand():
    window = a(0, 4, 5, 6, 7)
    assert mask(window, 0.6, columns=a(0.1, 0.59, 0.6, 0.0, 0.9)).tolist() == [0, 4, 0, 6, 7]


def test_a_reordering_by_hand():
    """Ten items, four of them move; they begin at one of seven places and stand in the order of their numbers."""
    columns = a(0.9, 0.1, 0.5, 0.3, 0.9, 0.1, 0.5, 0.3, 0.9, 0.1)
    assert reorder(TEN, 0.6, columns=columns, where=a(0.0)[0]).tolist() == [2, 4, 3, 1, 5, 6, 7, 8, 9, 10]
    assert reorder(TEN, 0.6, columns=columns, where=a(0.999)[0]).tolist() == [1, 2, 3, 4, 5, 6, 10, 8, 7, 9]
    short = np.concatenate([np.zeros(5, int), TEN[:5]])
    assert reorder(short, 0.6, columns=columns, where=a(0.0)[0]).tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert reorder(short, 0.6, columns=a(*[0] * 5, 0.9, 0.1, 0, 0, 0), where=a(0.0)[0]).tolist() == [0, 0, 0, 0, 0, 2, 1, 3, 4, 5]


def test_a_reordering_moves_what_a_crop_would_drop():
    """.8 of ten are eight, though 1 - .8 in floats is less than a fifth: two items move."""
    found = reorder(TEN, 0.8, columns=np.linspace(0.9, 0.0, 10), where=a(0.0)[0])
    assert found.tolist() == [2, 1, 3, 4, 5, 6, 7, 8, 9, 10]


def test_a_choice_is_crop_mask_or_reorder_each_a_third():
    windows, chances = np.tile(TEN, (6, 1)), {"columns": np.tile(np.linspace(0.9, 0.0, 10), (6, 1)), "where": np.full(6, 0.4)}
    found = any_of(windows, 0.5, choice=a(0.0, 0.33, 0.34, 0.66, 0.67, 0.999), **chances)
    cropped, masked, reordered = (
        crop(TEN, 0.5, where=chances["where"][0]),
        mask(TEN, 0.5, columns=chances["columns"][0]),
        reorder(TEN, 0.5, columns=chances["columns"][0], where=chances["where"][0]),
    )
    assert len({tuple(view) for view in (cropped, masked, reordered)}) == 3
    assert found.tolist() == [view.tolist() for view in (cropped, cropped, masked, masked, reordered, reordered)]


@st.composite
def windows_and_chances(draw: st.DrawFn) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """Windows (2, B, L) with any padding and distinct items within each, a share, and chances."""
    B, L = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    windows = np.zeros((2, B, L), dtype=np.int64)
    for row in windows.reshape(-1, L):
        length = draw(st.integers(0, L))
        row[L - length :] = 1 + rng.permutation(30)[:length]
    largest = 1 - 2.0**-53
    columns = rng.choice([0.0, 0.5, largest, *rng.random(5)], (2, B, L))
    where = rng.choice([0.0, 0.5, largest, *rng.random(5)], (2, B))
    return windows, draw(st.floats(0.01, 1.0)), columns, where


def is_piece(piece: list[int], whole: list[int]) -> bool:
    return any(whole[first : first + len(piece)] == piece for first in range(len(whole) + 1))


@given(windows_and_chances())
def test_a_crop_is_a_contiguous_piece_at_the_right_edge(case: tuple):
    windows, keep, _, where = case
    found = crop(windows, keep, where=where)
    assert found.shape == windows.shape
    for view, window in zip(found.reshape(-1, windows.shape[-1]).tolist(), windows.reshape(-1, windows.shape[-1]).tolist(), strict=True):
        whole, piece = [row for row in window if row], [row for row in view if row]
        assert view == [0] * (len(view) - len(piece)) + piece
        assert is_piece(piece, whole)
        assert len(piece) == pytest.approx(keep * len(whole), abs=1) and (len(piece) > 0) == (len(whole) > 0)


@given(windows_and_chances())
def test_a_mask_only_empties_places_and_never_the_newest(case: tuple):
    windows, keep, columns, _ = case
    found = mask(windows, keep, columns=columns)
    assert ((found == windows) | (found == 0)).all()
    assert (found[..., -1] == windows[..., -1]).all()
    assert ((found == windows) | (columns >= keep)).all()
    assert ((found == 0) | (columns < keep))[..., :-1].all()


@given(windows_and_chances())
def test_a_reordering_permutes_one_piece_and_nothing_else(case: tuple):
    windows, keep, columns, where = case
    found = reorder(windows, keep, columns=columns, where=where)
    for view, window in zip(found.reshape(-1, windows.shape[-1]), windows.reshape(-1, windows.shape[-1]), strict=True):
        assert sorted(view) == sorted(window)
        assert ((view == 0) == (window == 0)).all()
        moved = np.flatnonzero(view != window)
        span = moved[-1] - moved[0] + 1 if len(moved) else 0
        assert span <= (window > 0).sum() * (1 - keep) + 1e-6


@pytest.mark.parametrize(
    ("window", "columns", "hidden"),
    [
        ([3, 1, 4, 1, 5], [0, 0.9, 0, 0.7, 0.5], [0, 1, 0, 1, 1]),  # the newest whatever its column says
        ([3, 1, 4, 1, 5], [0.9] * 5, [0, 0, 0, 0, 1]),  # nothing would be left
        ([3, 1, 4, 1, 5], [0.1] * 5, [0, 0, 0, 0, 1]),
        ([0, 0, 0, 7, 8], [0.9, 0.9, 0.9, 0.1, 0.1], [0, 0, 0, 0, 1]),  # padding is not hidden
        ([0, 0, 0, 0, 6], [0.9] * 5, [0, 0, 0, 0, 0]),
        ([0, 0, 0, 0, 0], [0.9] * 5, [0, 0, 0, 0, 0]),
    ],
)
def test_a_cloze_by_hand(window: list[int], columns: list[float], hidden: list[int]):
    """A keep of 0.6: columns from there on are hidden."""
    assert hide(np.array([window]), 0.6, columns=a(*columns)[None]).tolist() == [[bool(cell) for cell in hidden]]


@given(windows_and_chances())
def test_a_view_never_changes_the_window_it_reads(case: tuple):
    windows, keep, columns, where = case
    before = windows.copy()
    any_of(windows, keep, columns=columns, where=where, choice=where)
    assert (windows == before).all()


def test_every_begin_of_a_crop_and_of_a_piece_is_equally_likely():
    where = (np.arange(700) + 0.5) / 700
    begins = crop(np.tile(TEN, (700, 1)), 0.4, where=where)[:, -4]
    assert np.bincount(begins, minlength=8)[1:].tolist() == [100] * 7
    found = reorder(np.tile(TEN, (700, 1)), 0.6, columns=np.tile(np.linspace(0.9, 0, 10), (700, 1)), where=where)
    first = (found != TEN).argmax(1)
    assert np.bincount(first).tolist() == [100] * 7


def test_a_window_read_backwards_keeps_its_padding_on_the_left():
    windows = np.array([[[3, 1, 4, 2], [0, 0, 5, 6], [0, 0, 0, 7], [0, 0, 0, 0]]])
    assert reverse(windows).tolist() == [[[2, 4, 1, 3], [0, 0, 6, 5], [0, 0, 0, 7], [0, 0, 0, 0]]]
    assert (reverse(reverse(windows)) == windows).all()
