"""Next item: at every position of a window, which item comes next.

Source: Kang and McAuley 2018 (SASRec), https://arxiv.org/abs/1808.09781, with softmax instead of one sampled negative.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedssl.config import TaskConfig
from fedssl.tasks import Chance, Task, UsersModel, Views


def next_item(config: TaskConfig, *, num_items: int) -> Task:
    """Softmax over the whole catalogue, or over ``config.negatives`` items drawn uniformly for each user.

    Negatives differ from user to user: a cohort then covers the catalogue.
    """

    def draw(windows_USBL1: NDArray[np.int64], chance: Chance) -> Views:
        sequences = {"read": windows_USBL1[..., :-1], "target": np.where(windows_USBL1[..., :-1] > 0, windows_USBL1[..., 1:], 0)}
        if config.negatives == 0:
            return Views(sequences, ranks_all=True)
        return Views(sequences, candidates=1 + chance.integers("negatives", config.negatives, num_items))

    def loss(model: UsersModel, sequences: Mapping[str, Tensor]) -> Tensor:
        return model.softmax_loss(model.personal(model.encode(sequences["read"])), sequences["target"])

    return Task(draw, loss, is_by_window=True)
