"""What the server does with a round's uploads: add, noise, mean, optimiser, new state. Pure functions between records.

A run is phases of rounds; a round is one release, from one or more exchanges. The state is all that a resume needs; chance
is keyed, so there are no random states in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.counts import Counts, from_cells, keep_top
from fedssl.parts import initial_weights, make_parts
from fedssl.privacy.adaptive_clip import WITHIN, WITHIN_STEP, next_clip
from fedssl.privacy.manifest import WEIGHT_STEP, DeclaredSum, declared_sums
from fedssl.privacy.noise import gaussian_steps
from fedssl.privacy.plan import Plan
from fedssl.recipe import Recipe
from fedssl.records import Ints, SparseSum, Upload
from fedssl.server_optimizers import Memory, average_late, learning_rate
from fedssl.sparse_total import SparseTotal
from fedssl.weights import ITEMS, Weights, flatten, to_numpy, unflatten

ROWS_AT_ONCE = 64
KEPT_SIGMAS = 3.0


@dataclass(frozen=True)
class State:
    """Where a run stands: the round of ``phase`` that was last finished (0: none), and what was learned.

    ``average_P``: the mean of late rounds' weights, where the recipe asks for one and it has begun. Training goes on from
    ``weights_P``; what is released is the mean. ``clip_norm``: the next training round's clip where it is adaptive, else None.
    """

    phase: str
    round: int
    weights_P: Tensor
    memory: Memory
    counts: Counts | None = None
    charged: Mapping[str, int] = field(default_factory=dict)
    average_P: Tensor | None = None
    clip_norm: float | None = None

    def weights(self, recipe: Recipe) -> Weights:
        """Named views of the weights that training goes on from."""
        return unflatten(self.weights_P, make_parts(recipe).layout)

    def released(self, recipe: Recipe) -> Weights:
        """Named views of the weights to evaluate and to use: the mean of late rounds where there is one."""
        return unflatten(self.weights_P if self.average_P is None else self.average_P, make_parts(recipe).layout)


@dataclass(frozen=True)
class Release:
    """One release of a round: whose noise it takes. ``plan`` None: none. ``users``: how many were asked by nodes whose uploads were added."""

    phase: str
    round: int
    attempt: int = 0
    plan: Plan | None = None
    noise_key: bytes | None = field(default=None, repr=False)
    users: int = 0

    def noise(self, name: str, count: int, *, block: int = 0, clip_norm: float | None = None) -> NDArray[np.int64] | None:
        """Noise for the sum ``name`` in whole steps; None without a plan. ``clip_norm``: the round's, where it is not the plan's."""
        if self.plan is None:
            return None
        assert self.noise_key is not None
        return gaussian_steps(
            self.noise_key,
            phase=self.phase,
            round=self.round,
            attempt=self.attempt,
            name=name,
            block=block,
            count=count,
            std_in_steps=self.plan.noise_std_in_steps(self.phase, name, clip_norm=clip_norm),
        )


Sums = dict[str, "NDArray[np.int64] | SparseTotal"]
"""Sums that uploads are still added to."""
Totals = dict[str, "NDArray[np.int64] | SparseSum"]


class ServerPhase(NamedTuple):
    """A phase: how many rounds and exchanges, what goes down, what may come up, what is made of it.

    ``middle(state, totals, exchange)`` gives the tensors of the next exchange from the sums of this one.
    """

    name: str
    rounds: int
    exchanges: int
    tensors: Callable[[State], dict[str, NDArray[np.float32]]]
    declared: Callable[[State, int], dict[str, DeclaredSum]]
    middle: Callable[[State, Totals, int], dict[str, NDArray[np.float32]]]
    finish: Callable[[State, Totals, Release], State]


def first_state(recipe: Recipe) -> State:
    """The state before the first round."""
    parts = make_parts(recipe)
    weights_P = flatten(initial_weights(recipe), parts.layout)
    clip_norm = recipe.privacy.clip_norm if recipe.privacy.clip == "adaptive" else None
    return State("", 0, weights_P, parts.optimizer.init(parts.layout.num_weights), clip_norm=clip_norm)


def phases_of(recipe: Recipe) -> tuple[ServerPhase, ...]:
    """The phases of a run, in order: counts where the recipe has them, then training."""
    training = ServerPhase(
        name="training",
        rounds=recipe.server.rounds,
        exchanges=1,
        tensors=lambda state: to_numpy(state.weights(recipe)),
        declared=lambda state, exchange: _training_sums(recipe, state),
        middle=_no_middle,
        finish=lambda state, totals, release: finish_training(recipe, state, totals, release),
    )
    if recipe.counts is None:
        return (training,)
    counts = ServerPhase(
        name="counts",
        rounds=1,
        exchanges=1,
        tensors=lambda state: {},
        declared=lambda state, exchange: declared_sums(recipe, "counts", num_weights=0),
        middle=_no_middle,
        finish=lambda state, totals, release: finish_counts(recipe, state, totals, release),
    )
    return (counts, training)


def _training_sums(recipe: Recipe, state: State) -> dict[str, DeclaredSum]:
    return declared_sums(recipe, "training", num_weights=make_parts(recipe).layout.num_weights, clip_norm=state.clip_norm)


def _no_middle(state: State, totals: Totals, exchange: int) -> dict[str, NDArray[np.float32]]:
    raise AssertionError("a phase of one exchange has no middle")


def add(sums: Sums, upload: Upload) -> None:
    """Add an admitted upload, in place. Exact: any order gives the same bytes."""
    for name, value in upload.sums.items():
        known = sums.get(name)
        if isinstance(value, SparseSum):
            if known is None:
                sums[name] = SparseTotal(value)
            else:
                assert isinstance(known, SparseTotal)
                known.add(value)
        elif known is None:
            sums[name] = value.astype(np.int64)
        else:
            assert isinstance(known, np.ndarray)
            known += value


def totals_of(sums: Sums) -> Totals:
    """What was added, once all of it was."""
    return {name: value.sum() if isinstance(value, SparseTotal) else value for name, value in sums.items()}


def finish_training(recipe: Recipe, state: State, totals: Totals, release: Release) -> State:
    """New weights from the round's sums, the mean of late rounds' weights and the next clip where the recipe asks for them.

    Under a central plan the noised sum is divided by the EXPECTED cohort, whose size says nothing; an empty cohort is noise alone.
    Without one it is divided by the summed weights of those who came; a round in which nobody came changes nothing.
    """
    parts = make_parts(recipe)
    step = _training_sums(recipe, state)["update"].step
    total = totals.get("update")
    noise = release.noise("update", parts.layout.num_weights, clip_norm=state.clip_norm)
    if noise is not None:
        assert release.plan is not None
        summed, users = noise if total is None else _dense(total) + noise, release.plan.expected_cohort(release.phase)
    else:
        # Users who add their own noise weigh alike, and who they are is no secret.
        users = float(release.users) if recipe.privacy.is_local else int(_dense(totals["weight"])[0]) * WEIGHT_STEP if total is not None else 0.0
        if total is None or users == 0.0:
            return _after(recipe, state, release, state.weights_P, state.memory)
        summed = _dense(total)
    mean = summed * (step / users)
    state = replace(state, clip_norm=_clip_after(recipe, state, totals, release, users))
    mean_P = torch.from_numpy(mean.astype(np.float32))
    # Row 0 is padding: it is never read, and noise must not move it.
    first = parts.layout.slice_of(ITEMS).start
    padding = slice(first, first + recipe.encoder.width)
    mean_P[padding] = 0.0
    weights_P, memory = parts.optimizer.step(state.weights_P, mean_P, state.memory, learning_rate(recipe.server, release.round), release.round)
    # Nor does decay, or whatever an optimiser does to weights that got no update.
    weights_P[padding] = state.weights_P[padding]
    return _after(recipe, state, release, weights_P, memory)


def _after(recipe: Recipe, state: State, release: Release, weights_P: Tensor, memory: Memory) -> State:
    average_P = average_late(recipe.server, state.average_P, weights_P, release.round)
    return replace(state, phase=release.phase, round=release.round, weights_P=weights_P, memory=memory, average_P=average_P)


def _clip_after(recipe: Recipe, state: State, totals: Totals, release: Release, users: float) -> float | None:
    """The next round's clip, from the (noised) number of users within this one's."""
    privacy = recipe.privacy
    if state.clip_norm is None:
        return None
    steps, noise = _dense(totals.get(WITHIN, np.zeros(1, dtype=np.int64))), release.noise(WITHIN, 1)
    within = int(steps[0] if noise is None else steps[0] + noise[0]) * WITHIN_STEP
    return next_clip(state.clip_norm, within, users, quantile=privacy.clip_quantile, rate=privacy.clip_rate)


def finish_counts(recipe: Recipe, state: State, totals: Totals, release: Release) -> State:
    """The counts that are kept: the largest cells of each row; under a plan those beyond three deviations of the noise.

    Under a plan EVERY cell gets noise, empty ones too, a block of rows at a time, so that the matrix is never whole in
    memory; which cells are kept is post-processing of noised ones.
    """
    config = recipe.counts
    assert config is not None
    total, step = totals.get("counts"), declared_sums(recipe, "counts", num_weights=0)["counts"].step
    width = recipe.num_items + 1
    sparse = total if isinstance(total, SparseSum) else SparseSum(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), (width, width))
    if release.plan is None:
        counts = from_cells(sparse.rows, sparse.columns, sparse.values * step, num_items=recipe.num_items)
    else:
        floor = KEPT_SIGMAS * release.plan.noise_std_in_steps("counts", "counts")
        kept: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
        for block, first in enumerate(range(0, width, ROWS_AT_ONCE)):
            count = min(ROWS_AT_ONCE, width - first)
            noise = release.noise("counts", count * width, block=block)
            assert noise is not None
            noised = noise.reshape(count, width)
            inside = slice(*np.searchsorted(sparse.rows, [first, first + count]))
            noised[sparse.rows[inside] - first, sparse.columns[inside]] += sparse.values[inside]
            noised[:, 0] = 0
            if first == 0:
                noised[0] = 0
            row, column = np.nonzero(noised > floor)
            kept.append((row + first, column, noised[row, column]))
        rows, columns, values = (np.concatenate(part) for part in zip(*kept, strict=True))
        counts = from_cells(rows, columns, values * step, num_items=recipe.num_items)
    return replace(state, phase=release.phase, round=release.round, counts=keep_top(counts, config.top))


def _dense(total: Ints | SparseSum) -> NDArray[np.int64]:
    assert isinstance(total, np.ndarray)
    return total.astype(np.int64, copy=False)
