"""Windows: only training events, right-aligned, every start possible, and drawn without regard to company."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl import seeds
from fedssl.data.histories import Histories
from fedssl.data.windows import draw_windows


def histories_of(lengths: list[int]) -> Histories:
    """User u met 100 u + 1, 100 u + 2, ...: an item says whose it is, and when."""
    rows = [np.arange(1, length + 1) + 100 * user for user, length in enumerate(lengths)]
    cuts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Histories(np.concatenate([*rows, np.zeros(0, int)]).astype(np.int32), cuts, None, tuple(str(user) for user in range(len(lengths))))


def draw(histories: Histories, users: list[int], *, steps: int = 1, windows: int = 1, length: int = 5, round: int = 1) -> np.ndarray:
    some = np.array(users, dtype=np.int64)
    return draw_windows(histories, some, seeds.keys_of_users(seeds.key(round), some), steps=steps, windows=windows, length=length)


def test_windows_by_hand():
    """Of four events two are held out; of two none is; one event and none at all stand alone."""
    found = draw(histories_of([4, 2, 1, 0]), [0, 1, 2, 3])
    assert found[:, 0, 0].tolist() == [[1, 2], [101, 102], [0, 201], [0, 0]]
    assert draw(histories_of([7, 3]), [0, 1])[:, 0, 0].tolist() == [[1, 2, 3, 4, 5], [0, 0, 0, 0, 101]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_a_window_is_a_right_aligned_piece_of_the_training_events(lengths: list[int], length: int, steps: int, windows: int, round: int):
    histories = histories_of(lengths)
    users = list(range(len(lengths)))[::-1]
    found = draw(histories, users, steps=steps, windows=windows, length=length, round=round)
    assert found.dtype == np.int64
    assert found.shape[:3] == (len(users), steps, windows) and 2 <= found.shape[3] <= max(length + 1, 2)
    for user, windows_SBL in zip(users, found, strict=True):
        training = (100 * user + np.arange(1, histories.training_lengths[user] + 1)).tolist()
        for window in windows_SBL.reshape(steps * windows, -1).tolist():
            piece = [row for row in window if row]
            assert window == [0] * (len(window) - len(piece)) + piece
            assert len(piece) == min(len(training), length + 1)
            assert any(training[first : first + len(piece)] == piece for first in range(len(training) + 1))


def test_held_out_events_are_never_read():
    """The last two of ten are validation and test: in two hundred windows of four, neither turns up, and the eighth does."""
    found = draw(histories_of([10]), [0], steps=200, length=3)
    assert set(found.reshape(-1).tolist()) == set(range(1, 9))


def test_every_start_is_equally_likely_and_drawn_anew_each_step_window_and_round():
    starts = draw(histories_of([9]), [0], steps=300, windows=2, length=2)[0, :, :, 0] - 1
    counts = np.bincount(starts.reshape(-1), minlength=5)
    assert len(counts) == 5
    assert (np.abs(counts - 120) < 5 * (600 * 0.2 * 0.8) ** 0.5).all()
    assert (starts[:, 0] != starts[:, 1]).any() and (starts[0] != starts[1:]).any()
    assert (draw(histories_of([9]), [0], steps=300, length=2) != draw(histories_of([9]), [0], steps=300, length=2, round=2)).any()


def test_windows_do_not_depend_on_company():
    histories = histories_of([30, 4, 12, 0, 7])
    crowd = draw(histories, [0, 1, 2, 3, 4], steps=2, windows=3, length=10)
    for user in range(5):
        alone = draw(histories, [user], steps=2, windows=3, length=10)
        width = alone.shape[-1]
        assert (crowd[user, ..., -width:] == alone[0]).all()
        assert (crowd[user, ..., :-width] == 0).all()


def test_nobody_has_events():
    assert draw(histories_of([0, 0]), [0, 1]).tolist() == [[[[0, 0]]], [[[0, 0]]]]
    assert draw(histories_of([3]), []).shape == (0, 1, 1, 2)
