"""Local SGD for every user of a chunk at once: the users axis at work.

A batch holds the drawn views of U users, already in numbers of the rows they touch; training turns it into one update a
user. What is drawn depends on (seed, phase, round, user), so a user trains alike alone, in a crowd and under any padding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedssl import seeds
from fedssl.config import LocalConfig
from fedssl.data.windows import Events, draw_windows
from fedssl.encoders import Encoder
from fedssl.item_table import ItemTable, rows_at
from fedssl.losses import softmax_loss
from fedssl.tasks import Chance, Task, Views
from fedssl.users_axis import Descent
from fedssl.weights import ITEMS, Weights

POOL = 1 << 20


@dataclass(frozen=True)
class Batch:
    """Drawn views of U users.

    ``sequences``: for each task, named, (U, S, B, L) in row numbers of ``rows_UK``, 0 is padding. ``rows_UK``: the DISTINCT
    catalogue rows a user touches, filled up with row 0; None: the whole catalogue, and row numbers are catalogue rows.
    ``bias_UN``: what the score of each row but the padding gets added (`fedssl.item_table`). ``positions_U``: real positions of the windows, over all steps:
    events that have a next one.
    """

    users_U: NDArray[np.int64]
    base: tuple[str | int, ...]
    sequences: tuple[Mapping[str, Tensor], ...]
    rows_UK: Tensor | None
    bias_UN: Tensor | None
    positions_U: NDArray[np.int64]

    @property
    def is_idle_U(self) -> Tensor:
        """Whether a user has nothing to learn from: no task reads a single item. Shape: (U,)."""
        return ~torch.stack([(rows > 0).flatten(1).any(1) for named in self.sequences for rows in named.values()]).any(0)


@dataclass(frozen=True)
class Trained:
    """What training leaves: one update a user.

    ``update`` leads with U; ``items`` is (U, K, D) at ``rows_UK`` (None: all rows). ``heads_UD`` are the new heads, or None.
    ``loss_U`` is that of the first step, before anything was learned, the sum of tasks.
    """

    update: Weights
    items: Tensor
    rows_UK: Tensor | None
    heads_UD: Tensor | None
    loss_U: Tensor


def make_batch(
    tasks: Sequence[tuple[Task, float]],
    events: Events,
    places_U: NDArray[np.int64],
    users_U: NDArray[np.int64],
    *,
    base: tuple[str | int, ...],
    local: LocalConfig,
    window: int,
    num_items: int,
) -> Batch:
    """Windows and views of the users at ``places_U`` of ``events``, whose stable numbers are ``users_U``."""
    keys_U = seeds.keys_of_users(seeds.key(*base, "windows"), users_U)
    windows_USBL1 = draw_windows(events, places_U, keys_U, steps=local.steps, windows=local.windows, length=window)
    return batch_of(tasks, windows_USBL1, users_U, base=base, window=window, num_items=num_items)


def batch_of(
    tasks: Sequence[tuple[Task, float]],
    windows_USBL1: NDArray[np.int64],
    users_U: NDArray[np.int64],
    *,
    base: tuple[str | int, ...],
    window: int,
    num_items: int,
) -> Batch:
    """Views of these windows; ``users_U`` says whose chance draws them."""
    drawn = [task.draw(windows_USBL1, Chance((*base, number), users_U, window)) for number, (task, _) in enumerate(tasks)]
    positions_U = ((windows_USBL1[..., 1:] > 0) & (windows_USBL1[..., :-1] > 0)).sum((1, 2, 3))
    if any(views.ranks_all for views in drawn):
        sequences = tuple({name: torch.from_numpy(np.ascontiguousarray(rows)) for name, rows in views.sequences.items()} for views in drawn)
        return Batch(users_U, base, sequences, None, None, positions_U)
    sequences, rows_UK, first_candidate, is_real_UN = distinct_rows(drawn)
    # Each drawn candidate stands for (catalogue - own items) / drawn of the items that were not drawn.
    own_UM = rows_UK[:, 1:first_candidate] > 0
    stands_for_U1 = (num_items - own_UM.sum(1, keepdim=True)) / is_real_UN.sum(1, keepdim=True).clamp(min=1)
    bias_UN = torch.cat([torch.zeros(own_UM.shape), stands_for_U1.log().expand(is_real_UN.shape)], 1)
    bias_UN[~torch.cat([own_UM, is_real_UN], 1)] = -math.inf
    return Batch(users_U, base, sequences, rows_UK, bias_UN, positions_U)


def distinct_rows(drawn: Sequence[Views]) -> tuple[tuple[dict[str, Tensor], ...], Tensor, int, Tensor]:
    """Views in numbers of the distinct rows each user touches, laid out ``[padding | own items | candidates]``.

    A candidate that is one of the user's own items, or that was drawn before, becomes filler and is no candidate.
    Returns the sequences, rows (U, K), the first candidate's column, and which candidates are real (U, N).
    """
    flat = [rows.reshape(rows.shape[0], -1) for views in drawn for rows in views.sequences.values()]
    own_UM = np.concatenate(flat, axis=1)
    U = len(own_UM)
    candidates = [views.candidates for views in drawn if views.candidates is not None]
    candidates_UN = np.concatenate(candidates, axis=1) if candidates else np.zeros((U, 0), dtype=np.int64)

    order = np.argsort(own_UM, axis=1)
    sorted_UM = np.take_along_axis(own_UM, order, 1)
    is_new = sorted_UM > 0
    is_new[:, 1:] &= sorted_UM[:, 1:] != sorted_UM[:, :-1]
    number_UM = np.cumsum(is_new, axis=1)
    widest = int(number_UM[:, -1].max(initial=0))
    local_UM = np.empty_like(own_UM)
    np.put_along_axis(local_UM, order, np.where(sorted_UM > 0, number_UM, 0), 1)
    rows_UK = np.zeros((U, 1 + widest + candidates_UN.shape[1]), dtype=np.int64)
    user, place = np.nonzero(is_new)
    rows_UK[user, number_UM[user, place]] = sorted_UM[user, place]

    sorted_UN = np.sort(candidates_UN, axis=1)
    is_real_UN = np.ones(sorted_UN.shape, dtype=bool)
    is_real_UN[:, 1:] = sorted_UN[:, 1:] != sorted_UN[:, :-1]
    if candidates_UN.shape[1]:
        stride = max(int(own_UM.max(initial=0)), int(candidates_UN.max())) + 1
        shift_U1 = np.arange(U)[:, None] * stride
        ours = (sorted_UM + shift_U1).reshape(-1)
        theirs = (sorted_UN + shift_U1).reshape(-1)
        found = np.minimum(np.searchsorted(ours, theirs), len(ours) - 1)
        is_real_UN &= (ours[found] != theirs).reshape(sorted_UN.shape)
        rows_UK[:, 1 + widest :] = np.where(is_real_UN, sorted_UN, 0)

    sequences: list[dict[str, Tensor]] = []
    start = 0
    for views in drawn:
        named: dict[str, Tensor] = {}
        for name, rows in views.sequences.items():
            size = int(np.prod(rows.shape[1:]))
            named[name] = torch.from_numpy(local_UM[:, start : start + size].reshape(rows.shape))
            start += size
        sequences.append(named)
    return tuple(sequences), torch.from_numpy(rows_UK), 1 + widest, torch.from_numpy(is_real_UN)


class UsersModel:
    """What the users of a batch hold at one local step; tasks read it (`fedssl.tasks.UsersModel`).

    ``sum_over``: positions of a full window where softmax losses are sums over positions divided by that; None: means.
    """

    def __init__(self, encoder: Encoder, weights_U: Weights, table: ItemTable, heads_UD: Tensor | None, masks: Masks | None, *, sum_over: int | None = None):
        self._sum_over = sum_over
        self._encoder, self._weights, self._table, self._heads, self._masks = encoder, weights_U, table, heads_UD, masks

    def encode(self, rows_UBL: Tensor, is_hidden_UBL: Tensor | None = None) -> Tensor:
        """Hidden states (U, B, L, D), dropout applied. ``is_hidden_UBL``: places of row 0 that hide an item and are no padding."""
        U, B, L = rows_UBL.shape
        rows_UBLD = self._table.look_up(rows_UBL.reshape(U, B * L)).view(U, B, L, self._table.rows_UKD.shape[-1])
        is_padding_UBL = rows_UBL == 0
        if is_hidden_UBL is not None:
            is_padding_UBL = is_padding_UBL & ~is_hidden_UBL
            rows_UBLD = torch.where(is_hidden_UBL[..., None], self._weights["mask"][:, None, None], rows_UBLD)
        masks = self._masks.draw(B, L) if self._masks is not None else ()
        return self._encoder.encode(self._weights, rows_UBLD, is_padding_UBL, masks)

    def after(self, rows_UBL: Tensor) -> Tensor:
        """The hidden state that says what follows each window, (U, B, D): of the newest event, or of a mask put behind it."""
        if self._encoder.is_causal:
            return self.encode(rows_UBL)[:, :, -1]
        longer_UBL = F.pad(rows_UBL, (0, 1))
        is_hidden_UBL = torch.zeros_like(longer_UBL, dtype=torch.bool)
        is_hidden_UBL[..., -1] = True
        return self.encode(longer_UBL, is_hidden_UBL)[:, :, -1]

    def personal(self, hidden_UBLD: Tensor) -> Tensor:
        """The hidden states as the user's own head reads them: its vector added, where there is one."""
        return hidden_UBLD if self._heads is None else hidden_UBLD + self._heads[:, None, None]

    def softmax_loss(self, hidden_UBLD: Tensor, targets_UBL: Tensor) -> Tensor:
        """Cross entropy over real targets (> 0): their mean, or their sum over the positions that full windows have. Shape: (U,)."""
        U, B, L, D = hidden_UBLD.shape
        is_real_UM = (targets_UBL > 0).reshape(U, B * L).to(hidden_UBLD.dtype)
        full = None if self._sum_over is None else B * self._sum_over
        weight_UM = is_real_UM / (is_real_UM.sum(1, keepdim=True).clamp(min=1) if full is None else full)
        return softmax_loss(hidden_UBLD.reshape(U, B * L, D), self._table, targets_UBL.reshape(U, B * L), weight_UM)


class Masks:
    """Dropout masks of one (batch, task, step): slices of a pool drawn once a run, at offsets drawn per user.

    Drawn at full window and trimmed on the left, so padding changes nothing; given as data, so company changes nothing.
    """

    def __init__(self, encoder: Encoder, base: tuple[str | int, ...], users_U: NDArray[np.int64], *, seed: int, rate: float, window: int, width: int):
        self._sites, self._base, self._users, self._window, self._width = encoder.dropout_sites, base, users_U, window, width
        self._size = max(POOL, 2 * window * width)
        self._pool = _pool(seed, rate, self._size)
        self._calls = 0

    def draw(self, B: int, L: int) -> tuple[Tensor, ...]:
        """Masks for one call of the encoder: a tensor (U, B, L, D) a site, already scaled by 1 / (1 - rate)."""
        keys_U = seeds.keys_of_users(seeds.key(*self._base, "dropout", self._calls), self._users)
        self._calls += 1
        full = self._window * self._width
        offset = seeds.integers(keys_U, self._sites * B, self._size - full) + (self._window - L) * self._width
        pieces = np.lib.stride_tricks.sliding_window_view(self._pool, L * self._width)[offset]
        masks = torch.from_numpy(pieces.reshape(len(self._users), self._sites, B, L, self._width))
        return masks.unbind(1)


@lru_cache(maxsize=4)
def _pool(seed: int, rate: float, size: int) -> NDArray[np.float32]:
    uniform = seeds.uniform(np.array([seeds.key(seed, "dropout pool")], dtype=np.uint64), size)[0]
    return np.where(uniform >= rate, 1.0 / (1.0 - rate), 0.0).astype(np.float32)


def train_users(
    encoder: Encoder,
    tasks: Sequence[tuple[Task, float]],
    weights: Weights,
    batch: Batch,
    *,
    local: LocalConfig,
    window: int,
    dropout: float = 0.0,
    seed: int = 0,
    heads_UD: Tensor | None = None,
    head_lr: float = 0.0,
) -> Trained:
    """``local.steps`` steps of SGD for every user of the batch, from the same weights.

    Guarantees:
      - a user's update depends on its own history, its number and the weights, not on who shares the batch or the padding;
      - a user with nothing to learn from (`Batch.is_idle_U`) has an update and a loss of exactly 0;
      - weight decay acts on the encoder and on touched rows only;
      - the proximal term pulls back what moved, at every step after the first: the encoder and rows that the loss reads, never a
        head. It is the slope of ``proximal / 2 * |weights - weights at the start|^2`` (FedProx: Li et al. 2020,
        https://arxiv.org/abs/1812.06127, equation 2).

    Shapes: weights have no users axis ("items" is (I + 1, D)); see `Trained`. Source: McMahan et al. 2017,
    https://arxiv.org/abs/1602.05629, ClientUpdate of algorithm 1.
    """
    U = len(batch.users_U)
    body = {name: leaf.expand(U, *leaf.shape) for name, leaf in weights.items() if name != ITEMS}
    table_ID = weights[ITEMS]
    start_UKD = table_ID.expand(U, *table_ID.shape) if batch.rows_UK is None else rows_at(table_ID, batch.rows_UK)
    update: Weights = {}
    items: Tensor | None = None
    first_loss: Tensor | None = None
    for step in range(local.steps):
        now = {name: (leaf + update[name] if update else leaf).detach().requires_grad_() for name, leaf in body.items()}
        table = ItemTable(start_UKD if items is None else start_UKD + items, bias_UN=batch.bias_UN)
        if local.proximal:
            # The slope of the pull at what moved. No row is left out: one that the loss does not read has not moved, and is not pulled.
            for moved in (*update.values(), *([] if items is None else [items])):
                moved.mul_(1 - local.lr * local.proximal)
        descents = {name: Descent(local.lr, update.get(name)) for name in now}
        for name, leaf in now.items():
            leaf.descent = descents[name]  # type: ignore[attr-defined]
        head = heads_UD.detach().requires_grad_() if heads_UD is not None else None
        losses = []
        for number, (task, weight) in enumerate(tasks):
            masks = (
                Masks(encoder, (*batch.base, number, step), batch.users_U, seed=seed, rate=dropout, window=encoder.columns(window), width=table_ID.shape[1])
                if dropout
                else None
            )
            model = UsersModel(encoder, now, table, head, masks, sum_over=window if local.reduction == "sum" else None)
            losses.append(task.loss(model, {name: rows[:, step] for name, rows in batch.sequences[number].items()}) * weight)
        loss_U = torch.stack(losses).sum(0)
        if first_loss is None:
            first_loss = loss_U.detach()
        leaves = [*now.values(), *([head] if head is not None else [])]
        slopes = torch.autograd.grad(loss_U.sum(), [*leaves, table.anchor], allow_unused=True)
        owners = Counter(slope.untyped_storage().data_ptr() for slope in slopes if slope is not None)
        for (name, leaf), slope in zip(now.items(), slopes, strict=False):
            descent = descents[name]
            if slope is not None:
                # In place, but where leaves share one slope: those that an encoder adds up.
                descent.take(slope, may_overwrite=owners[slope.untyped_storage().data_ptr()] == 1 and slope.is_contiguous())
            if local.weight_decay:
                descent.take(local.weight_decay * leaf.detach())
            update[name] = torch.zeros(leaf.shape) if descent.update_U is None else descent.update_U
        of_items = Descent(local.lr, items)
        of_items.take(table.finish(), may_overwrite=True)
        if local.weight_decay:
            of_items.take(local.weight_decay * _touched(batch, table))
        items = of_items.update_U
        if head is not None and heads_UD is not None and slopes[len(now)] is not None:
            heads_UD = heads_UD - head_lr * slopes[len(now)]
    assert items is not None and first_loss is not None
    is_idle_U = batch.is_idle_U
    if is_idle_U.any():
        for leaf in (*update.values(), items, first_loss):
            leaf[is_idle_U] = 0.0
    return Trained(update, items, batch.rows_UK, heads_UD, first_loss)


def _touched(batch: Batch, table: ItemTable) -> Tensor:
    """The rows a user touches, zero elsewhere: where the whole catalogue is at hand, those of its own windows."""
    if batch.rows_UK is not None:
        return table.rows_UKD * (batch.rows_UK > 0)[..., None]
    is_touched = torch.zeros(table.rows_UKD.shape[:2], dtype=torch.bool)
    for named in batch.sequences:
        for rows in named.values():
            is_touched.scatter_(1, rows.reshape(len(rows), -1), True)
    is_touched[:, 0] = False
    return table.rows_UKD * is_touched[..., None]
