"""Next item: targets are the events that follow, negatives differ from user to user."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedssl.config import TaskConfig
from fedssl.tasks import Chance, Views
from fedssl.tasks.next_item import next_item

WINDOWS = np.array([[3, 1, 4, 1, 5], [0, 0, 0, 9, 2], [0, 0, 0, 0, 6], [0, 0, 0, 0, 0]])[:, None, None]


def draw(*, negatives: int = 0, num_items: int = 50) -> Views:
    return next_item(TaskConfig(name="next-item", negatives=negatives), num_items=num_items).draw(WINDOWS, Chance((1, 2), np.arange(4), window=4))


def test_targets_are_the_next_events():
    views = draw()
    assert views.ranks_all and views.candidates is None
    assert views.sequences["read"][:, 0, 0].tolist() == [[3, 1, 4, 1], [0, 0, 0, 9], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert views.sequences["target"][:, 0, 0].tolist() == [[1, 4, 1, 5], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_negatives_are_items_and_differ_from_user_to_user():
    views = draw(negatives=20)
    assert not views.ranks_all and views.candidates is not None
    assert views.candidates.shape == (4, 20)
    assert views.candidates.min() >= 1 and views.candidates.max() <= 50
    assert len({tuple(sorted(rows)) for rows in views.candidates.tolist()}) == 4


def test_negatives_reach_the_first_item_and_the_last_equally_often():
    views = draw(negatives=2000, num_items=5)
    assert views.candidates is not None
    counts = np.bincount(views.candidates.reshape(-1), minlength=6)
    assert counts[0] == 0 and len(counts) == 6
    assert (np.abs(counts[1:] - 1600) < 5 * (8000 * 0.2 * 0.8) ** 0.5).all()


def test_the_loss_is_the_models_softmax_of_personal_hidden_states():
    class Model:
        """Arithmetic in place of an encoder: hidden states are the rows' numbers, a head adds 100."""

        def encode(self, rows_UBL: Tensor) -> Tensor:
            return rows_UBL[..., None].float()

        def personal(self, hidden_UBLD: Tensor) -> Tensor:
            return hidden_UBLD + 100

        def softmax_loss(self, hidden_UBLD: Tensor, targets_UBL: Tensor) -> Tensor:
            return (hidden_UBLD[..., 0] * (targets_UBL > 0)).sum((1, 2))

    task = next_item(TaskConfig(name="next-item"), num_items=9)
    sequences = {name: torch.from_numpy(rows[:, 0]) for name, rows in draw().sequences.items()}
    assert task.loss(Model(), sequences).tolist() == [pytest.approx(409), pytest.approx(109), 0, 0]
