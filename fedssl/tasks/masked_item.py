"""Masked item: some events of a window are hidden, and an encoder that reads both ways says which items they were.

Source: Sun et al. 2019 (BERT4Rec), https://arxiv.org/abs/1904.06690, section 3.6: the cloze. There some windows hide the newest event alone,
which is what a recommendation asks for; here every window hides it, beside others. Softmax over the catalogue or drawn candidates: as in `next_item`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedssl import views
from fedssl.config import TaskConfig
from fedssl.tasks import Chance, Task, UsersModel, Views


def masked_item(config: TaskConfig, *, num_items: int) -> Task:
    """The newest event is hidden, and each other with chance ``1 - config.keep``.

    At least one event is read (`fedssl.views.hide`), so a window of one event teaches nothing.
    ``config.negatives``: as in `next_item`.
    """

    def draw(windows_USBL1: NDArray[np.int64], chance: Chance) -> Views:
        # The last column is read too: a mask takes its place, as it does behind a history.
        wide = replace(chance, window=chance.window + 1)
        is_hidden = views.hide(windows_USBL1, config.keep, columns=wide.columns("hidden", *windows_USBL1.shape[1:]))
        # A window of one event is not read either: it asks nothing.
        is_read = ~is_hidden & is_hidden.any(-1, keepdims=True)
        sequences = {"read": np.where(is_read, windows_USBL1, 0), "target": np.where(is_hidden, windows_USBL1, 0)}
        if config.negatives == 0:
            return Views(sequences, ranks_all=True)
        return Views(sequences, candidates=1 + chance.integers("negatives", config.negatives, num_items))

    def loss(model: UsersModel, sequences: Mapping[str, Tensor]) -> Tensor:
        hidden_UBLD = model.encode(sequences["read"], sequences["target"] > 0)
        return model.softmax_loss(model.personal(hidden_UBLD), sequences["target"])

    return Task(draw, loss, encoder="bidirectional", is_by_window=True)
