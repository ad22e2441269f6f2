"""A chunk of a node's users: windows drawn, trained, clipped and added up in whole steps.

Users of like length share a chunk. Chunks are cut before they are dealt to workers, and whole numbers add exactly, so which worker
trains which chunk changes no byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedssl.data.windows import Events
from fedssl.local_training import Batch, make_batch, train_users
from fedssl.parts import Parts, make_parts
from fedssl.privacy.adaptive_clip import WITHIN, WITHIN_CLIP, WITHIN_STEP
from fedssl.privacy.clipping import GridTotal
from fedssl.privacy.local_noise import LocalNoise
from fedssl.privacy.manifest import WEIGHT_STEP, DeclaredSum, declared_sums
from fedssl.privacy.window_chance import WindowChance
from fedssl.recipe import Recipe
from fedssl.records import Address, Ints
from fedssl.weights import Weights
from fedssl.workers import MappedArray

MOST_WINDOWS = 16
"""With weights by windows: a user of more weighs as one of so many, so that nobody outweighs a cohort and a share is whole steps."""

POSITIONS_A_USER = 50
"""A chunk of longer windows than this holds fewer users, so that a chunk is about the same work, and its activations stay in the cache."""

FEWEST_USERS = 6
"""What a chunk costs beside its users would be too large a part of smaller ones."""


class Chunk(NamedTuple):
    """Users to train: their places among the node's users, their stable numbers, their heads (U, D) or None."""

    places_U: NDArray[np.int64]
    users_U: NDArray[np.int64]
    heads_UD: NDArray[np.float32] | None


@dataclass
class ChunkResult:
    """What is known of a chunk beside its part of the sum: whole steps of the other sums, new heads, and notes for the researcher."""

    users_U: NDArray[np.int64]
    heads_UD: NDArray[np.float32] | None
    weight_steps: int
    loss_steps: int
    within_steps: int
    norms_U: NDArray[np.float64]
    losses_U: NDArray[np.float64]
    broken: int


@dataclass(frozen=True)
class ChunkJob:
    """What all chunks of an exchange have in common. ``noise``: where every user adds their own; ``windows``: where windows are protected."""

    address: Address
    recipe: Recipe
    clip_norm: float | None
    events: Events
    weights: Weights
    noise: LocalNoise | None = None
    windows: WindowChance | None = None

    @property
    def window(self) -> int:
        """Positions that the encoder reads."""
        return self.recipe.encoder.window

    def declared(self, parts: Parts) -> dict[str, DeclaredSum]:
        """The sums that may leave."""
        return declared_sums(self.recipe, "training", num_weights=parts.layout.num_weights, clip_norm=self.clip_norm)


class MappedEvents(NamedTuple):
    """`Events` of mapped arrays."""

    items: NDArray[np.int32]
    cuts: NDArray[np.int64]
    training_ends: NDArray[np.int64]


class MappedJob(NamedTuple):
    """A `ChunkJob` on its way to another process: arrays by where they are mapped."""

    address: Address
    recipe: Recipe
    clip_norm: float | None
    events: dict[str, MappedArray]
    weights: dict[str, MappedArray]
    noise: LocalNoise | None = None
    windows: WindowChance | None = None


def cut_chunks(lengths_U: NDArray[np.int64], users_U: NDArray[np.int64], *, window: int, windows: int, users_per_chunk: int) -> list[NDArray[np.int64]]:
    """Places of the users, those of like length together, the longest first: at most ``users_per_chunk`` of them, fewer of long windows.

    A chunk is at most half of the work that is left, so that workers end together, but no smaller than `FEWEST_USERS`.
    ``window``, ``windows``: the positions of one, and how many a user trains on in a step.
    """
    order = np.lexsort((users_U, lengths_U))[::-1]
    widths = np.minimum(lengths_U[order], window).clip(1) * windows
    left = widths[::-1].cumsum()[::-1]
    chunks, first = [], 0
    while first < len(order):
        width = int(widths[first])
        size = min(users_per_chunk, max(users_per_chunk * POSITIONS_A_USER // width, 1))
        size = min(size, max(-(-int(left[first]) // (2 * width)), FEWEST_USERS))
        chunks.append(order[first : first + size])
        first += size
    return chunks


def begin_chunks(job: ChunkJob) -> tuple[Callable[[Chunk], ChunkResult], Callable[[], Ints]]:
    """How to train one chunk, and how to get the sum of all that were trained: the flat update in whole steps."""
    torch.set_num_threads(1)
    parts = make_parts(job.recipe)
    declared, total = job.declared(parts), GridTotal(parts.layout)
    return lambda chunk: train_chunk(job, parts, declared, chunk, total), lambda: narrow(total.total_P.numpy())


def begin_mapped_chunks(job: MappedJob) -> tuple[Callable[[Chunk], ChunkResult], Callable[[], Ints]]:
    """`begin_chunks` in a worker process, on arrays that it maps."""
    return begin_chunks(unmapped(job))


def unmapped(job: MappedJob) -> ChunkJob:
    """The job over arrays that this process maps."""
    events = MappedEvents(**{name: array.open() for name, array in job.events.items()})
    weights = {name: torch.from_numpy(array.open()) for name, array in job.weights.items()}
    return ChunkJob(job.address, job.recipe, job.clip_norm, events, weights, job.noise, job.windows)


def train_chunk(job: ChunkJob, parts: Parts, declared: dict[str, DeclaredSum], chunk: Chunk, total: GridTotal) -> ChunkResult:
    """Train the users of a chunk and add their clipped updates to ``total``, under local privacy each with noise of the user's own."""
    recipe, address = job.recipe, job.address
    batch = make_batch(
        parts.tasks,
        job.events,
        chunk.places_U,
        chunk.users_U,
        base=(recipe.seed, address.phase, address.round),
        local=recipe.local,
        window=job.window,
        num_items=recipe.num_items,
    )
    heads_UD = torch.from_numpy(chunk.heads_UD) if chunk.heads_UD is not None else None
    trained = train_users(
        parts.encoder,
        parts.tasks,
        job.weights,
        batch,
        local=recipe.local,
        window=job.window,
        dropout=recipe.encoder.dropout,
        seed=recipe.seed,
        heads_UD=heads_UD,
        head_lr=recipe.head.lr,
    )
    # Without a plan the weight is a declared sum: whole steps, so that numerator and denominator agree exactly.
    steps_U = np.rint(_shares(job, batch, chunk.places_U) / WEIGHT_STEP).astype(np.int64)
    weight_U = torch.from_numpy((steps_U * WEIGHT_STEP).astype(np.float32))
    update = declared["update"]
    clipped = total.add(trained, clip_norm=update.clip_norm, step=update.step, weight_U=weight_U)
    is_well_U = ~clipped.is_broken_U.numpy()
    losses_U = trained.loss_U.double().numpy()
    loss_steps = 0
    if "loss" in declared:
        counted_U = np.where(is_well_U & np.isfinite(losses_U), losses_U, 0.0).clip(0.0, 100.0) * steps_U * WEIGHT_STEP
        loss_steps = int(np.rint(counted_U / declared["loss"].step).sum())
    within_steps = 0
    if WITHIN in declared:
        # Half a step of weight either way; a broken user says nothing.
        is_within_U = clipped.norms_U.numpy() <= update.clip_norm
        within_steps = int(np.where(is_within_U, steps_U, -steps_U)[is_well_U].sum()) * round(WITHIN_CLIP * WEIGHT_STEP / WITHIN_STEP)
    if job.noise is not None:
        # Of every user who was asked: a broken one sends noise alone.
        total_P = total.total_P
        for user in chunk.users_U.tolist():
            total_P += torch.from_numpy(job.noise.steps(user, update, parts.layout.num_weights))
            within_steps += int(job.noise.steps(user, declared[WITHIN], 1)[0]) if WITHIN in declared else 0
    new_UD = None
    if heads_UD is not None and trained.heads_UD is not None:
        is_finite_U1 = trained.heads_UD.isfinite().all(1, keepdim=True) & ~clipped.is_broken_U[:, None]
        new_UD = torch.where(is_finite_U1, trained.heads_UD, heads_UD).numpy()
    weight_steps, broken = int(steps_U[is_well_U].sum()), int(clipped.is_broken_U.sum())
    return ChunkResult(chunk.users_U, new_UD, weight_steps, loss_steps, within_steps, clipped.norms_U.numpy(), losses_U, broken)


def _shares(job: ChunkJob, batch: Batch, places_U: NDArray[np.int64]) -> NDArray[np.float64]:
    """How much each user weighs beside the heaviest there can be, from 0 to 1; 0 where there is nothing to learn from. Shape: (U,).

    Under a plan everybody weighs 1: who came, and with how much, is not told.
    """
    if job.recipe.privacy.has_plan:
        return np.ones(len(places_U))
    local, weighting = job.recipe.local, job.recipe.server.weighting
    if weighting == "positions":
        return batch.positions_U / (local.steps * local.windows * job.window)
    has_work_U: NDArray[np.float64] = (~batch.is_idle_U).numpy().astype(np.float64)
    if weighting == "windows":
        positions_U = job.events.training_ends[places_U] - job.events.cuts[places_U] - 1
        has_work_U *= np.minimum(np.ceil(positions_U.clip(1) / job.window), MOST_WINDOWS) / MOST_WINDOWS
    return has_work_U


def narrow(total: NDArray[np.int64]) -> Ints:
    """int32 where it fits: one device's upload always does."""
    largest = int(np.abs(total).max(initial=0))
    return total.astype(np.int32) if largest < 2**31 else total
