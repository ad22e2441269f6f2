"""Local training as a plain loop over users, windows and steps, in ordinary torch: what `train_users` must equal.

No users axis, no padding (a window begins at its oldest item), no distinct rows (the whole item table is one leaf), no
hand-written slopes. It shares with the engine the drawn views, as data, and the documented address of dropout masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from oracles.plain_encoders import bert4rec, gru4rec, hgrn
from torch import Tensor

from fedssl import seeds
from fedssl.config import EncoderConfig, LocalConfig, TaskConfig
from fedssl.local_training import POOL
from fedssl.tasks import Views
from fedssl.weights import ITEMS, Weights

MasksOf = Callable[[int, int, int], Tensor]
"""Dropout masks (sites, B, window, D) of a task's number, a step and a call of the encoder."""


class One(NamedTuple):
    """What one user leaves: the update of the encoder, of the whole table (I + 1, D), the new head, the first step's loss."""

    update: Weights
    items_ID: Tensor
    head_D: Tensor | None
    loss: float


def encode(
    weights: Mapping[str, Tensor], table_ID: Tensor, rows_L: Tensor, config: EncoderConfig, masks_SLD: Tensor | None = None, hidden_L: Tensor | None = None
) -> Tensor:
    """The encoder that ``config`` names over one window with an event first; gaps are not read. ``hidden_L``: where a mask stands. Shape: (L, D)."""
    is_there_L = rows_L > 0 if hidden_L is None else (rows_L > 0) | hidden_L
    assert is_there_L[0]
    vectors_LD = F.embedding(rows_L, table_ID)
    if hidden_L is not None:
        vectors_LD = torch.where(hidden_L[:, None], weights["mask"], vectors_LD)
    return PLAIN[config.name](weights, vectors_LD, is_there_L, config, masks_SLD)


def sasrec(weights: Mapping[str, Tensor], vectors_LD: Tensor, is_item_L: Tensor, config: EncoderConfig, masks_SLD: Tensor | None) -> Tensor:
    """Pre-norm, positions from the right edge."""
    L, D, heads = len(vectors_LD), config.width, config.heads
    drop = iter([] if masks_SLD is None else masks_SLD[:, -L:])

    def dropped(x_LD: Tensor) -> Tensor:
        return x_LD if masks_SLD is None else x_LD * next(drop)

    def norm(x_LD: Tensor, name: str) -> Tensor:
        return F.layer_norm(x_LD, (D,), weights[f"{name}.gain"], weights[f"{name}.bias"])

    def split(x_LD: Tensor) -> Tensor:
        return x_LD.view(L, heads, D // heads).transpose(0, 1)

    x_LD = (vectors_LD * D**0.5 + weights["positions"][-L:]) * is_item_L[:, None]
    x_LD = dropped(x_LD)
    is_read_LL = torch.ones(L, L, dtype=torch.bool).tril() & is_item_L
    for block in range(config.blocks):
        name = f"block{block}."
        query, key, value = (norm(x_LD, name + "norm1") @ weights[name + "qkv"]).chunk(3, -1)
        read_LD = F.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=is_read_LL).transpose(0, 1).reshape(L, D)
        x_LD = x_LD + dropped(read_LD @ weights[name + "out"])
        wide_LF = F.relu(F.linear(norm(x_LD, name + "norm2"), weights[name + "up"].T, weights[name + "up.bias"]))
        x_LD = x_LD + dropped(F.linear(wide_LF, weights[name + "down"].T, weights[name + "down.bias"]))
    return norm(x_LD, "norm")


PLAIN = {"sasrec": sasrec, "gru4rec": gru4rec, "bert4rec": bert4rec, "hgrn": hgrn}


def train_one_user(
    weights: Weights,
    drawn: Sequence[Views],
    tasks: Sequence[TaskConfig],
    encoder: EncoderConfig,
    local: LocalConfig,
    *,
    masks: MasksOf | None = None,
    head_D: Tensor | None = None,
    head_lr: float = 0.0,
) -> One:
    """``local.steps`` steps of SGD on the views of one user: sequences (S, B, L) and candidates (N,), in catalogue rows."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in weights.items()}
    head = head_D.clone().requires_grad_() if head_D is not None else None
    num_items = len(weights[ITEMS]) - 1
    own = sorted({int(row) for views in drawn for rows in views.sequences.values() for row in rows.reshape(-1)} - {0})
    candidates = sorted({int(row) for views in drawn if views.candidates is not None for row in views.candidates} - set(own))
    is_touched = torch.zeros(num_items + 1, 1)
    is_touched[own + candidates] = 1.0
    first_loss = 0.0
    for step in range(local.steps):
        losses = []
        for number, (config, views) in enumerate(zip(tasks, drawn, strict=True)):
            named = {name: torch.from_numpy(np.ascontiguousarray(rows[step])) for name, rows in views.sequences.items()}
            given = [masks(number, step, call) if masks is not None else None for call in range(len(CALLS[config.name]))]
            hidden_BL = named["target"] > 0 if config.name == "masked-item" else None
            if config.name == "contrastive" and encoder.name == "bert4rec":
                named = {name: F.pad(rows_BL, (0, 1)) for name, rows_BL in named.items()}
                hidden_BL = torch.arange(next(iter(named.values())).shape[1]) == next(iter(named.values())).shape[1] - 1
            hidden = {name: read(leaves, named[name], encoder, given[call], hidden_BL) for call, name in enumerate(CALLS[config.name])}
            if config.name == "contrastive":
                loss = contrast(hidden, config)
            else:
                targets = [rows_L[rows_L > 0] for rows_L in named["target"]]
                if config.name == "masked-item":
                    # Only what was hidden is asked; the loss below takes one hidden state a target.
                    hidden["read"] = [h_LD[rows_L[-len(h_LD) :] > 0] for h_LD, rows_L in zip(hidden["read"], has_targets(named["target"]), strict=True)]
                corrections = math.log((num_items - len(own)) / len(candidates)) if candidates else 0.0
                loss = next_item(hidden["read"], targets, leaves[ITEMS], head, None if views.ranks_all else (own, candidates), corrections)
            if loss is not None:
                losses.append(config.weight * loss)
        if step == 0:
            first_loss = sum(float(loss.detach()) for loss in losses)
        if not losses:
            continue
        sum(losses[1:], losses[0]).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, leaf in leaves.items():
                decayed = leaf * is_touched if name == ITEMS else leaf
                slope = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
                leaf -= local.lr * (slope + local.weight_decay * decayed + local.proximal * (leaf - weights[name]))
                leaf.grad = None
            if head is not None and head.grad is not None:
                head -= head_lr * head.grad
                head.grad = None
    update = {name: (leaf - weights[name]).detach() for name, leaf in leaves.items()}
    items_ID = update.pop(ITEMS)
    return One(update, items_ID, head.detach() if head is not None else None, first_loss)


CALLS = {"next-item": ("read",), "masked-item": ("read",), "contrastive": ("left", "right", "invented")}
"""What each task lets the encoder read, in this order."""


def read(weights: Weights, rows_BL: Tensor, config: EncoderConfig, masks_SBLD: Tensor | None, hidden_BL: Tensor | None = None) -> list[Tensor]:
    """Hidden states of each window from its oldest event on; windows without items are left out."""
    hidden = []
    for window, rows_L in enumerate(rows_BL):
        if (rows_L > 0).any():
            hidden_L = None if hidden_BL is None else hidden_BL.expand(rows_BL.shape)[window]
            first = int(((rows_L > 0) if hidden_L is None else (rows_L > 0) | hidden_L).int().argmax())
            masks_SLD = masks_SBLD[:, window] if masks_SBLD is not None else None
            hidden.append(encode(weights, weights[ITEMS], rows_L[first:], config, masks_SLD, None if hidden_L is None else hidden_L[first:]))
    return hidden


def has_targets(target_BL: Tensor) -> list[Tensor]:
    """Those windows that hide an item."""
    return [rows_L for rows_L in target_BL if (rows_L > 0).any()]


def next_item(
    hidden: list[Tensor], targets: list[Tensor], table_ID: Tensor, head_D: Tensor | None, ranked: tuple[list[int], list[int]] | None, correction: float
) -> Tensor | None:
    """Mean cross entropy over all targets: among rows 1 .. I, or among the user's own and the candidates."""
    if not hidden:
        return None
    hidden_MD, targets_M = torch.cat(hidden), torch.cat([rows for rows in targets if len(rows)])
    if head_D is not None:
        hidden_MD = hidden_MD + head_D
    if ranked is None:
        return F.cross_entropy(hidden_MD @ table_ID[1:].T, targets_M - 1)
    own, candidates = ranked
    scores = torch.cat([hidden_MD @ table_ID[own].T, hidden_MD @ table_ID[candidates].T + correction], 1)
    return F.cross_entropy(scores, torch.tensor([own.index(target) for target in targets_M.tolist()]))


def contrast(hidden: Mapping[str, list[Tensor]], config: TaskConfig) -> Tensor | None:
    """InfoNCE by cosines of the last hidden states, a mean over windows."""
    if not hidden["left"]:
        return None
    left_BD, right_BD, invented_ND = (torch.stack([window_LD[-1] for window_LD in hidden[name]]) for name in CALLS["contrastive"])
    alike_B1 = F.cosine_similarity(left_BD, right_BD, dim=-1)[:, None]
    apart_BN = F.cosine_similarity(left_BD[:, None], invented_ND[None], dim=-1)
    return F.cross_entropy(torch.cat([alike_B1, apart_BN], 1) / config.temperature, torch.zeros(len(left_BD), dtype=torch.long))


@lru_cache(maxsize=4)
def _pool(seed: int, rate: float) -> NDArray[np.float32]:
    uniform = seeds.uniform(np.array([seeds.key(seed, "dropout pool")], dtype=np.uint64), POOL)[0]
    pool = np.zeros(POOL, dtype=np.float32)
    pool[uniform >= rate] = 1 / (1 - rate)
    return pool


def masks_of(base: tuple[str | int, ...], user: int, windows: Callable[[int, int], int], *, seed: int, encoder: EncoderConfig, sites: int) -> MasksOf:
    """The masks of one user as documented: full-width slices of the pool, at offsets keyed by (base, task, step, call, user).

    ``windows(number, call)``: how many windows that call of that task reads.
    """
    columns = encoder.window + (encoder.name == "bert4rec")
    full = columns * encoder.width
    pool = _pool(seed, encoder.dropout)

    def masks(number: int, step: int, call: int) -> Tensor:
        B = windows(number, call)
        key = seeds.keys_of_users(seeds.key(*base, number, step, "dropout", call), np.array([user]))
        offsets = seeds.integers(key, sites * B, POOL - full)[0].tolist()
        slices = np.stack([pool[offset : offset + full] for offset in offsets])
        return torch.from_numpy(slices).view(sites, B, columns, encoder.width)

    return masks
