"""Contrast: one history is enough, and an invented history is never the real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.config import EncoderConfig, LocalConfig, RunConfig, TaskConfig
from fedssl.data.histories import Histories
from fedssl.local_training import make_batch, train_users
from fedssl.parts import initial_weights, make_parts
from fedssl.recipe import make_recipe
from fedssl.tasks import Chance, Views
from fedssl.tasks.contrastive import contrastive


def draw(windows: np.ndarray, *, num_items: int, negatives: int = 4, keep: float = 0.6, window: int = 8, round: int = 1) -> Views:
    task = contrastive(TaskConfig(name="contrastive", negatives=negatives, keep=keep), num_items=num_items)
    return task.draw(windows, Chance(("test", round), np.arange(len(windows)), window))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 6), st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_an_invented_history_never_equals_the_real_one_and_ends_in_another_item(num_items: int, length: int, keep: float, round: int):
    windows = np.zeros((3, 1, 2, 6), dtype=np.int64)
    windows[..., 6 - length :] = 1 + np.random.default_rng(round).integers(0, num_items, (3, 1, 2, length))
    invented = draw(windows, num_items=num_items, keep=keep, round=round).sequences["invented"]
    real = windows[:, :, -1:]
    assert invented.shape == (3, 1, 4, 6)
    assert (invented[..., -1] != real[..., -1]).all()
    assert ((invented == 0) == (real == 0)).all()
    assert invented.max() <= num_items


def test_an_invented_history_keeps_about_the_asked_share_and_replaces_by_any_other_item():
    windows = np.full((200, 1, 1, 8), 3)
    invented = draw(windows, num_items=5, keep=0.6).sequences["invented"]
    older, newest = invented[..., :-1], invented[..., -1]
    assert abs((older == 3).mean() - 0.6) < 5 * (0.24 / older.size) ** 0.5
    for part in (older[older != 3], newest):
        counts = np.bincount(part.reshape(-1), minlength=6)
        assert counts[0] == counts[3] == 0
        assert (np.abs(counts[[1, 2, 4, 5]] / counts.sum() - 0.25) < 5 * (0.1875 / counts.sum()) ** 0.5).all()


def test_the_two_views_are_of_the_window_and_drawn_apart():
    windows = np.tile(np.arange(1, 9), (50, 1, 1, 1))
    views = draw(windows, num_items=20)
    left, right = views.sequences["left"], views.sequences["right"]
    assert left.shape == right.shape == (50, 1, 1, 8)
    assert set(left.reshape(-1).tolist()) == set(range(9))
    assert (left != right).any(-1).mean() > 0.9
    assert views.candidates is None and not views.ranks_all


def test_views_do_not_depend_on_padding():
    """The windows have one column more than the encoder reads; where they are shorter, all of them is read."""
    short = np.array([[[[1, 2, 3, 4]]], [[[0, 0, 5, 6]]]])
    padded = np.pad(short, ((0, 0), (0, 0), (0, 0), (5, 0)))
    narrow, wide = draw(short, num_items=9), draw(padded, num_items=9)
    for name in ("left", "right", "invented"):
        assert wide.sequences[name].shape[-1] == 8
        assert (wide.sequences[name][..., -4:] == narrow.sequences[name]).all()
        assert (wide.sequences[name][..., :-4] == 0).all()


def test_the_oldest_event_of_a_whole_window_is_left_to_the_next_item_task():
    windows = np.arange(1, 10)[None, None, None]
    views = draw(windows, num_items=20, keep=1.0)
    assert views.sequences["left"].tolist() == [[[list(range(2, 10))]]]


@pytest.mark.parametrize("events", [1, 2, 6])
def test_a_client_with_one_history_and_one_window_has_a_slope(events: int):
    encoder = EncoderConfig(width=8, window=8, hidden=8, blocks=1)
    config = RunConfig(encoder=encoder, task=(TaskConfig(name="contrastive", negatives=2),), local=LocalConfig(lr=1.0))
    recipe = make_recipe(config, num_items=30, catalogue="")
    parts = make_parts(recipe)
    items = np.array([*range(1, events + 1), 29, 30], dtype=np.int32)
    histories = Histories(items, np.array([0, len(items)]), None, ("only",))
    one = np.array([0])
    batch = make_batch(parts.tasks, histories, one, one, base=(1,), local=config.local, window=8, num_items=30)
    trained = train_users(parts.encoder, parts.tasks, initial_weights(recipe), batch, local=config.local, window=8)
    assert float(trained.loss_U) > 0
    assert trained.items.abs().max() > 1e-3
    assert all(torch.isfinite(leaf).all() for leaf in trained.update.values())
    assert trained.update["block0.qkv"].abs().max() > 1e-6
