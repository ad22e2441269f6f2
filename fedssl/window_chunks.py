"""A chunk of a node's users under window-level privacy: windows drawn by the device's key, their gradients clipped, added up and noised.

There are two ways to the same law. A device follows its own noise from local step to local step, by Opacus. Where there is one step, a
simulation adds up the windows of all its users as whole numbers, and the noise of all at once (`client_round`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.chunk_training import Chunk, ChunkJob, ChunkResult, MappedJob, narrow, unmapped
from fedssl.data.windows import count_pieces
from fedssl.local_training import Trained
from fedssl.parts import Parts, make_parts
from fedssl.privacy.clipping import GridTotal
from fedssl.privacy.grid import grid_step
from fedssl.privacy.manifest import window_scale
from fedssl.privacy.window_chance import WindowChance
from fedssl.records import Ints
from fedssl.weights import ITEMS, Weights
from fedssl.window_training import window_gradients

WINDOWS_AT_ONCE = 32
DENSE_AT_ONCE = 1 << 23
"""Coordinates of windows' gradients that are spread over all weights at once: 32 MB."""


def begin_window_chunks(job: ChunkJob) -> tuple[Callable[[Chunk], ChunkResult], Callable[[], Ints]]:
    """How to train one chunk, and how to get the sum over all: in whole steps of one window's clip (`manifest.window_scale` makes an update of it)."""
    torch.set_num_threads(1)
    parts = make_parts(job.recipe)
    total = GridTotal(parts.layout)
    train = follow_devices if _chance(job).is_apart else add_windows
    return lambda chunk: train(job, parts, chunk, total), lambda: narrow(total.total_P.numpy())


def begin_mapped_window_chunks(job: MappedJob) -> tuple[Callable[[Chunk], ChunkResult], Callable[[], Ints]]:
    """`begin_window_chunks` in a worker process, on arrays that it maps."""
    return begin_window_chunks(unmapped(job))


def add_windows(job: ChunkJob, parts: Parts, chunk: Chunk, total: GridTotal) -> ChunkResult:
    """Clip and add the gradients of all windows that the users read in their only step. No noise: it follows once for all users."""
    clip_norm = _clip(job)
    users_W, numbers_W = _read_windows(job, chunk, step=0)
    seen = []
    for part in _cut(len(users_W), WINDOWS_AT_ONCE):
        trained = _gradients(job, parts, job.weights, chunk, users_W[part], numbers_W[part], step=0)
        clipped = total.add(trained, clip_norm=clip_norm, step=grid_step(clip_norm), weight_U=torch.ones(len(trained.loss_U)))
        seen.append((clipped.norms_U, trained.loss_U))
    return _result(chunk, seen)


def follow_devices(job: ChunkJob, parts: Parts, chunk: Chunk, total: GridTotal) -> ChunkResult:
    """Each user's local steps by Opacus, every one noised from the user's own stream."""
    from fedssl.privacy.dp_sgd import train_device

    recipe, chance, clip_norm = job.recipe, _chance(job), _clip(job)
    most = max(DENSE_AT_ONCE // parts.layout.num_weights, 1)
    seen: list[tuple[Tensor, Tensor]] = []
    for place, user in zip(chunk.places_U, chunk.users_U.tolist(), strict=True):
        alone = Chunk(np.array([place]), np.array([user]), None)

        def gradients(step: int, now: Weights, alone: Chunk = alone) -> Iterator[Weights]:
            users_W, numbers_W = _read_windows(job, alone, step=step)
            for part in _cut(len(users_W), min(most, WINDOWS_AT_ONCE)):
                trained = _gradients(job, parts, now, alone, users_W[part], numbers_W[part], step=step)
                dense = _dense(trained, now)
                seen.append((torch.stack([leaf.flatten(1).double().square().sum(1) for leaf in dense.values()]).sum(0).sqrt(), trained.loss_U))
                yield dense

        def noise(step: int, count: int, user: int = user) -> NDArray[np.float64]:
            return chance.normal(user, step, count)

        released_P, history = train_device(
            job.weights,
            parts.layout,
            steps=recipe.local.steps,
            lr=window_scale(recipe),
            rate=recipe.privacy.window_rate,
            clip_norm=clip_norm,
            noise_multiplier=recipe.privacy.noise_multiplier,
            grid=grid_step(clip_norm),
            gradients=gradients,
            noise=noise,
        )
        # What Opacus counted is what the device's ledger was charged.
        assert history == [(recipe.privacy.noise_multiplier, recipe.privacy.window_rate, recipe.local.steps)], history
        sum_P = total.total_P
        sum_P -= torch.from_numpy(released_P)
    return _result(chunk, seen)


def _read_windows(job: ChunkJob, chunk: Chunk, *, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Windows that a local step reads, the full ones first: whose, as places in the chunk, and which of theirs."""
    chance, rate = _chance(job), job.recipe.privacy.window_rate
    counts_U = count_pieces(job.events, chunk.places_U, length=job.window)
    chosen = [chance.chosen(user, step, count, rate) for user, count in zip(chunk.users_U.tolist(), counts_U.tolist(), strict=True)]
    users_W = np.repeat(np.arange(len(chosen)), [len(numbers) for numbers in chosen])
    numbers_W = np.concatenate([np.zeros(0, dtype=np.int64), *chosen])
    lengths_U = job.events.training_ends[chunk.places_U] - job.events.cuts[chunk.places_U]
    order = np.argsort(-np.minimum(lengths_U[users_W] - numbers_W * (job.window + 1), job.window + 1), kind="stable")
    return users_W[order], numbers_W[order]


def _gradients(job: ChunkJob, parts: Parts, weights: Weights, chunk: Chunk, users_W: NDArray[np.int64], numbers_W: NDArray[np.int64], *, step: int) -> Trained:
    recipe = job.recipe
    return window_gradients(
        parts.encoder,
        parts.tasks,
        weights,
        job.events,
        chunk.places_U[users_W],
        chunk.users_U[users_W],
        numbers_W,
        base=(recipe.seed, job.address.phase, job.address.round, "window step", step),
        local=recipe.local,
        window=job.window,
        num_items=recipe.num_items,
        dropout=recipe.encoder.dropout,
        seed=recipe.seed,
    )


def _dense(trained: Trained, weights: Weights) -> Weights:
    """Gradients of windows over all weights: minus what each would change. Each leaf leads with the windows."""
    items = trained.items
    if trained.rows_UK is not None:
        items = torch.zeros(len(trained.loss_U), *weights[ITEMS].shape)
        items.scatter_(1, trained.rows_UK[..., None].expand(trained.items.shape), trained.items)
        items[:, 0] = 0.0
    return {name: -leaf for name, leaf in trained.update.items()} | {ITEMS: -items}


def _cut(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]


def _result(chunk: Chunk, seen: list[tuple[Tensor, Tensor]]) -> ChunkResult:
    """Notes alone, one a window: nothing but the sum may leave."""
    norms_W, losses_W = (np.concatenate([np.zeros(0), *(pair[kind].double().numpy() for pair in seen)]) for kind in (0, 1))
    return ChunkResult(chunk.users_U, None, 0, 0, 0, norms_W, losses_W, int((~np.isfinite(norms_W)).sum()))


def _chance(job: ChunkJob) -> WindowChance:
    assert job.windows is not None
    return job.windows


def _clip(job: ChunkJob) -> float:
    assert job.recipe.privacy.clip_norm is not None
    return job.recipe.privacy.clip_norm
