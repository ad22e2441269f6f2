"""A personal vector rebuilt from a person's own history: the mean of its items' vectors. Nothing is trained for it, kept, or sent.

It is added to the hidden state before items are scored. In training a position gets the mean of its window so far, so that the encoder
learns what the mean does not say; a recommendation gets that of the whole history, however long, of which the encoder reads one window.
Sources: a person as the mean of their items: Kabbur et al. 2013 (FISM), https://doi.org/10.1145/2487575.2487589; a local part rebuilt
from the person's own data whenever it is needed: Singhal et al. 2021 (FedRecon), https://arxiv.org/abs/2102.03448.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedssl.encoders import Encoder
from fedssl.weights import Weights


def with_history(encoder: Encoder, strength: float) -> Encoder:
    """A causal encoder whose hidden states have ``strength`` times the mean of the item vectors so far added."""
    assert encoder.is_causal

    def encode(weights: Weights, rows_UBLD: Tensor, is_padding_UBL: Tensor, masks: Sequence[Tensor]) -> Tensor:
        is_item_UBL1 = ~is_padding_UBL[..., None]
        mean_UBLD = (rows_UBLD * is_item_UBL1).cumsum(2) / is_item_UBL1.cumsum(2).clamp(min=1)
        return encoder.encode(weights, rows_UBLD, is_padding_UBL, masks) + strength * mean_UBLD

    return encoder._replace(encode=encode)


def history_vectors(histories: Sequence[NDArray[np.integer[Any]]], table_ID: Tensor) -> Tensor:
    """The mean of the table's rows over each whole history, (n, D); zero over an empty one."""
    if not histories:
        return table_ID.new_zeros(0, table_ID.shape[1])
    rows = torch.from_numpy(np.concatenate(histories).astype(np.int64))
    first_N = np.cumsum([0, *(len(history) for history in histories[:-1])])
    return F.embedding_bag(rows, table_ID, torch.from_numpy(first_N), mode="mean")
