"""Masked item: some events are hidden, some are read, and what is hidden is asked."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedssl.config import TaskConfig
from fedssl.tasks import Chance, Views
from fedssl.tasks.masked_item import masked_item


def draw(windows: np.ndarray, *, keep: float = 0.6, negatives: int = 0, window: int | None = None, round: int = 1) -> Views:
    task = masked_item(TaskConfig(name="masked-item", keep=keep, negatives=negatives), num_items=50)
    return task.draw(windows, Chance((1, round), np.arange(len(windows)), window=window or windows.shape[-1] - 1))


def test_a_window_of_one_event_or_none_is_neither_read_nor_asked():
    for round in range(20):
        views = draw(np.array([[0, 0, 6], [0, 0, 0]])[:, None, None], round=round)
        assert not views.sequences["read"].any() and not views.sequences["target"].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_every_event_of_a_window_is_either_read_or_asked_and_there_is_one_of_each(lengths: list[int], keep: float, round: int):
    windows = np.zeros((len(lengths), 2, 3, 10), dtype=np.int64)
    for user, length in enumerate(lengths):
        windows[user, ..., 10 - length :] = np.arange(1, length + 1)
    views = draw(windows, keep=keep, round=round)
    read, target = views.sequences["read"], views.sequences["target"]
    assert not (read * target).any()
    for user, length in enumerate(lengths):
        assert (read[user] + target[user] == (windows[user] if length > 1 else 0)).all()
        if length > 1:
            assert (read[user] > 0).any(-1).all() and (target[user] > 0).any(-1).all()


def test_padding_and_company_change_nothing():
    windows = np.broadcast_to(np.arange(1, 9), (5, 2, 3, 8))
    padded = np.pad(windows, ((0, 0), (0, 0), (0, 0), (13, 0)))
    narrow, wide = draw(windows, window=20, negatives=3), draw(padded, window=20, negatives=3)
    for name in ("read", "target"):
        assert (wide.sequences[name][..., -8:] == narrow.sequences[name]).all() and not wide.sequences[name][..., :-8].any()
        assert (draw(windows[:2], window=20).sequences[name] == narrow.sequences[name][:2]).all()
    assert narrow.candidates is not None and wide.candidates is not None
    assert (wide.candidates == narrow.candidates).all() and not narrow.ranks_all and draw(windows).ranks_all


def test_every_window_hides_the_newest_event_and_the_asked_share_of_the_others():
    target = draw(np.broadcast_to(np.arange(1, 101), (200, 1, 10, 100)), keep=0.7).sequences["target"] > 0
    assert target[..., -1].all()
    others = target[..., :-1]
    assert abs(others.mean() - 0.3) < 5 * (0.21 / others.size) ** 0.5


def test_the_loss_is_the_models_softmax_where_items_are_hidden():
    class Model:
        """Arithmetic in place of an encoder: a hidden place reads 1,000 plus the sum of its window, a head adds 100."""

        def encode(self, rows_UBL: Tensor, is_hidden_UBL: Tensor | None = None) -> Tensor:
            assert is_hidden_UBL is not None
            return (rows_UBL.sum(-1, keepdim=True) + 1000 * is_hidden_UBL)[..., None].float()

        def after(self, rows_UBL: Tensor) -> Tensor:
            raise AssertionError("not asked by this task")

        def personal(self, hidden_UBLD: Tensor) -> Tensor:
            return hidden_UBLD + 100

        def softmax_loss(self, hidden_UBLD: Tensor, targets_UBL: Tensor) -> Tensor:
            return (hidden_UBLD[..., 0] * (targets_UBL > 0)).sum((1, 2))

    task = masked_item(TaskConfig(name="masked-item"), num_items=9)
    sequences = {"read": torch.tensor([[[3, 0, 4]], [[0, 5, 0]]]), "target": torch.tensor([[[0, 1, 0]], [[0, 0, 6]]])}
    assert task.loss(Model(), sequences).tolist() == [1107, 1105]
    assert task.encoder == "bidirectional"
