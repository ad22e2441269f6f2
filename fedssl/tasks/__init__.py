"""Pretext tasks, one a file: each says how its views are drawn and what its loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedssl import seeds


@dataclass(frozen=True)
class Chance:
    """Numbers for U users that depend on (seed, phase, round, task) and on each user's own number, and on nothing else."""

    base: tuple[str | int, ...]
    users_U: NDArray[np.int64]
    window: int

    def keys(self, purpose: str) -> NDArray[np.uint64]:
        """One key a user. Shape: (U,)."""
        return seeds.keys_of_users(seeds.key(*self.base, purpose), self.users_U)

    def uniform(self, purpose: str, *shape: int) -> NDArray[np.float64]:
        """Numbers in [0, 1). Shape: (U, *shape)."""
        return seeds.uniform(self.keys(purpose), int(np.prod(shape))).reshape(len(self.users_U), *shape)

    def columns(self, purpose: str, *shape: int) -> NDArray[np.float64]:
        """Numbers in [0, 1) for the columns of windows, the last of ``shape``. Shape: (U, *shape).

        They are drawn for the full window and cut on the left: how far a shard pads does not change them.
        """
        *lead, columns = shape
        return self.uniform(purpose, *lead, self.window)[..., self.window - columns :]

    def integers(self, purpose: str, count: int, high: int) -> NDArray[np.int64]:
        """Whole numbers in [0, high). Shape: (U, count)."""
        return seeds.integers(self.keys(purpose), count, high)


@dataclass(frozen=True)
class Views:
    """What a task reads, as catalogue rows.

    ``sequences``: named, each (U, S, B, L), padded with 0 on the left. ``candidates``: rows drawn for a softmax, (U, N),
    the same for all steps of the round, or None. ``ranks_all``: whether the loss ranks the whole catalogue.
    """

    sequences: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    candidates: NDArray[np.int64] | None = None
    ranks_all: bool = False


class UsersModel(Protocol):
    """What U users hold at one local step, as a task sees it."""

    def encode(self, rows_UBL: Tensor, is_hidden_UBL: Tensor | None = None) -> Tensor:
        """Hidden states (U, B, L, D), dropout applied. ``is_hidden_UBL``: places of row 0 that hide an item and are no padding."""

    def after(self, rows_UBL: Tensor) -> Tensor:
        """The hidden state that says what follows each window, (U, B, D); any encoder has one."""

    def personal(self, hidden_UBLD: Tensor) -> Tensor:
        """The hidden states as the user's own head reads them."""

    def softmax_loss(self, hidden_UBLD: Tensor, targets_UBL: Tensor) -> Tensor:
        """Cross entropy over real targets (> 0), reduced over positions as the recipe says. Shape: (U,)."""


class Task(NamedTuple):
    """``draw(windows_USBL1, chance)`` turns chance into data; ``loss(model, sequences of one step)`` is (U,), one a user.

    The windows have one event more than a causal encoder reads: the last target. ``encoder``: what kind the task can train; at
    every position of a bidirectional one the answer to "what comes next" would lie open, so a task asks for that kind by name.
    ``is_by_window``: the loss is a weighted mean of one loss a window, and none of these reads another window of the user; window-level
    privacy accepts no other task.
    """

    draw: Callable[[NDArray[np.int64], Chance], Views]
    loss: Callable[[UsersModel, Mapping[str, Tensor]], Tensor]
    encoder: Literal["causal", "bidirectional", "any"] = "causal"
    is_by_window: bool = False
