"""Sequence encoders, one a file, written with the operations of the users axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedssl.weights import Weights


class Encoder(NamedTuple):
    """A pair of pure functions, and how many dropout masks one call takes.

    ``init(rng)`` gives the weights, without a users axis. ``encode(weights, rows_UBLD, is_padding_UBL, masks)`` gives
    hidden_UBLD; there every weight leads with U. ``masks`` are ``dropout_sites`` tensors (U, B, L, D), already scaled, or
    empty. More padding on the left must change nothing.

    ``is_causal``: a position reads itself and earlier ones, and the newest one says what comes next. An encoder that is not
    reads both ways and has a weight ``mask`` (D,): the model (`fedssl.local_training.UsersModel`) puts it in place of hidden
    items, and one place more after the newest event, where it says what comes next.
    """

    init: Callable[[torch.Generator], Weights]
    encode: Callable[[Weights, Tensor, Tensor, Sequence[Tensor]], Tensor]
    dropout_sites: int
    is_causal: bool = True

    def columns(self, window: int) -> int:
        """The most positions one call reads: those of a window, and the mask behind it where there is one."""
        return window if self.is_causal else window + 1
