"""Clipping every user's whole update, and adding it up in whole steps of the grid.

Float sums depend on order; whole numbers do not. Each user's update is shortened, divided by the step, rounded toward
zero and added exactly, so any order of users, chunks and nodes gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedssl.local_training import Trained
from fedssl.privacy.grid import CLIP_MARGIN, LARGEST_COORDINATE, USERS_IN_INT32
from fedssl.weights import ITEMS, Layout

USERS_AT_ONCE = 8


@dataclass(frozen=True)
class Clipped:
    """What is known of the users of a chunk after the clip: norms before it, and who was broken. Not private."""

    norms_U: Tensor
    is_broken_U: Tensor


class GridTotal:
    """A sum of updates in whole steps, over the flat vector of a layout."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._total_P = torch.zeros(layout.num_weights, dtype=torch.int64)
        self._block_P = torch.zeros(layout.num_weights, dtype=torch.int32)
        self._users = 0
        table = layout.shapes[layout.names.index(ITEMS)]
        self._scaled_KD, self._steps_KD = torch.empty(table), torch.empty(table, dtype=torch.int32)
        self._rows_ID = torch.zeros(table, dtype=torch.float64)

    @property
    def total_P(self) -> Tensor:
        """The sum so far, int64."""
        self._flush()
        self._total_P[self.layout.slice_of(ITEMS)] += self._rows_ID.view(-1).to(torch.int64)
        self._rows_ID.zero_()
        return self._total_P

    def add(self, trained: Trained, *, clip_norm: float | None, step: float, weight_U: Tensor) -> Clipped:
        """Clip, round and add the updates of a chunk.

        Guarantees:
          - under a clip no user enters longer than the clip norm, exactly, on the integer grid;
          - a short update passes unchanged up to rounding, a zero update stays zero;
          - a broken user (nan, inf, squares beyond float32, or without a clip a coordinate beyond the grid) counts as zero,
            the others stay.

        ``weight_U``: factors in [0, 1], 1 under a plan. Source: McMahan et al. 2018, https://arxiv.org/abs/1710.06963,
        algorithm 1. The norm is summed in float64 over float32 squares of 64 coordinates, so its error stays below 2^-18,
        inside the margin of 2^-16 that the clip keeps; rounding toward zero only shortens. Float32 has no squares below
        2^-149, so the settings refuse clips below 1e-12 and steps below 2^-60.
        """
        norms, broken = [], []
        U = len(trained.loss_U)
        places = [name for name in self.layout.names if name != ITEMS]
        split = self.layout.slice_of(ITEMS).start
        D = trained.items.shape[-1]
        for first in range(0, U, USERS_AT_ONCE):
            part = slice(first, first + USERS_AT_ONCE)
            body_BP = torch.cat([trained.update[name][part].reshape(-1, trained.update[name][0].numel()) for name in places], 1)
            items_BKD = trained.items[part]
            norm_B = (squared_norms(body_BP) + squared_norms(items_BKD.flatten(1))).sqrt()
            is_broken_B = ~norm_B.isfinite()
            if clip_norm is None:
                scale_B = torch.full_like(norm_B, 1 / step)
                if bool((norm_B >= step * LARGEST_COORDINATE).any()):
                    largest_B = torch.maximum(body_BP.abs().amax(1), items_BKD.abs().flatten(1).amax(1))
                    is_broken_B |= ~(largest_B < step * LARGEST_COORDINATE)
            else:
                scale_B = (clip_norm * (1 - CLIP_MARGIN) / norm_B).clamp(max=1.0) / step
            scale_B = (scale_B.float() * weight_U[part]).to(body_BP.dtype)
            if bool(is_broken_B.any()):
                scale_B = torch.where(is_broken_B, 0.0, scale_B)
                body_BP = torch.where(is_broken_B[:, None], 0.0, body_BP)
                items_BKD = torch.where(is_broken_B[:, None, None], 0.0, items_BKD)
            if self._users + len(norm_B) > USERS_IN_INT32:
                self._flush()
            self._users += len(norm_B)
            self._block_P[:split] += body_BP.mul_(scale_B[:, None]).to(torch.int32).sum(0, dtype=torch.int32)
            table = self._block_P[split:].view(-1, D)
            if trained.rows_UK is None:
                # A user at a time, in memory that stays: whole tables of many users leave the cache, and fresh pages cost more than the sums.
                for items_KD, scale in zip(items_BKD, scale_B, strict=True):
                    table += self._steps_KD.copy_(torch.mul(items_KD, scale, out=self._scaled_KD))
            else:
                # Float64 adds whole steps exactly, up to 2^29 users of 2^24 each, and scatters rows in a fraction of an integer's time.
                steps_BKD = (items_BKD * scale_B[:, None, None]).to(torch.int32).double()
                self._rows_ID.index_add_(0, trained.rows_UK[part].reshape(-1), steps_BKD.view(-1, D))
            norms.append(norm_B)
            broken.append(is_broken_B)
        return Clipped(torch.cat(norms), torch.cat(broken))

    def _flush(self) -> None:
        self._total_P += self._block_P
        self._block_P.zero_()
        self._users = 0


def squared_norms(x_BN: Tensor) -> Tensor:
    """Squared L2 norms in float64, with a relative error below 2^-17 where they are above 2^-110. Shape: (B,)."""
    whole = x_BN.shape[1] // 64 * 64
    if whole:
        norms_BN: Tensor = torch.linalg.vector_norm(x_BN[:, :whole].view(len(x_BN), -1, 64), dim=2)
        total_B = norms_BN.double().square().sum(1)
    else:
        total_B = torch.zeros(len(x_BN), dtype=torch.float64)
    return total_B + x_BN[:, whole:].double().square().sum(1)
