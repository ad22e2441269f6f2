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

from fedssl.catalogue import Catalogue
from fedssl.counts import Counts, from_cells, keep_top, merge_rows, most_popular
from fedssl.data.features import item_features
from fedssl.denoise import denoise
from fedssl.distillation import distil
from fedssl.item_features import folded, left_out_rows, slope_of_parts, with_projection
from fedssl.lift import LiftTable
from fedssl.parts import initial_weights, make_parts
from fedssl.privacy.adaptive_clip import WITHIN, WITHIN_STEP, next_clip
from fedssl.privacy.manifest import WEIGHT_STEP, DeclaredSum, declared_sums, rows_of_block
from fedssl.privacy.noise import gaussian_steps
from fedssl.privacy.plan import Plan
from fedssl.recipe import Recipe
from fedssl.records import Ints, SparseSum, Upload
from fedssl.server_optimizers import Memory, average_late, learning_rate
from fedssl.sparse_total import SparseTotal
from fedssl.spectral import spectral_items
from fedssl.weights import ITEMS, Weights, flatten, to_numpy, unflatten

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class State:
    """Where a run stands: the round of ``phase`` that was last finished (0: none), and what was learned.

    ``average_P``: the mean of late rounds' weights, where the recipe asks for one and it has begun. Training goes on from
    ``weights_P``; what is released is the mean. ``clip_norm``: the next training round's clip where it is adaptive, else None.
    ``popularity`` (I + 1,): the noised histogram of items, where counts are under a plan. ``features`` (I + 1, F): what is known of the
    items, where the recipe names it; ``weights_P`` and ``average_P`` then have the projection behind them (`fedssl.item_features`).
    """

    phase: str
    round: int
    weights_P: Tensor
    memory: Memory
    counts: Counts | LiftTable | None = None
    charged: Mapping[str, int] = field(default_factory=dict)
    average_P: Tensor | None = None
    clip_norm: float | None = None
    popularity: NDArray[np.float32] | None = None
    features: Tensor | None = None

    def weights(self, recipe: Recipe) -> Weights:
        """Named views of the weights that training goes on from."""
        return self._named(self.weights_P, recipe)

    def sent(self, recipe: Recipe) -> Weights:
        """Named views of the weights of the next training round: without the rows that it leaves out."""
        if self.features is None or not recipe.server.rows_left_out:
            return self.weights(recipe)
        layout = make_parts(recipe).layout
        return unflatten(folded(self.weights_P, self.features, layout, self.left_out(recipe, self.round + 1 if self.phase == "training" else 1)), layout)

    def left_out(self, recipe: Recipe, round: int) -> Tensor | None:
        """The items without their row in a training round, (I + 1,); None: every item has it."""
        if self.features is None or not recipe.server.rows_left_out:
            return None
        return left_out_rows(self.features, recipe.server.rows_left_out, seed=recipe.seed, round=round)

    def released(self, recipe: Recipe) -> Weights:
        """Named views of the weights to evaluate and to use: the mean of late rounds where there is one."""
        return self._named(self.weights_P if self.average_P is None else self.average_P, recipe)

    def _named(self, weights_P: Tensor, recipe: Recipe) -> Weights:
        layout = make_parts(recipe).layout
        return unflatten(weights_P if self.features is None else folded(weights_P, self.features, layout), layout)


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
    """A phase: how many rounds and exchanges (0: nobody is asked, and nothing is charged), what goes down, what may come up, what is made of it.

    ``middle(state, totals, exchange)`` gives the tensors of the next exchange from the sums of this one.
    """

    name: str
    rounds: int
    exchanges: int
    tensors: Callable[[State], dict[str, NDArray[np.float32]]]
    declared: Callable[[State, int], dict[str, DeclaredSum]]
    middle: Callable[[State, Totals, int], dict[str, NDArray[np.float32]]]
    finish: Callable[[State, Totals, Release], State]


def first_state(recipe: Recipe, features: NDArray[np.float32] | None = None) -> State:
    """The state before the first round. ``features`` (I, F): of the items, where the recipe names them; row 0 is item 1."""
    parts = make_parts(recipe)
    weights_P = flatten(initial_weights(recipe), parts.layout)
    clip_norm = recipe.privacy.clip_norm if recipe.privacy.clip == "adaptive" else None
    if features is None:
        return State("", 0, weights_P, parts.optimizer.init(parts.layout.num_weights), clip_norm=clip_norm)
    known_IF = torch.from_numpy(np.pad(features, ((1, 0), (0, 0))))
    weights_P = with_projection(weights_P, known_IF, parts.layout)
    return State("", 0, weights_P, parts.optimizer.init(len(weights_P)), clip_norm=clip_norm, features=known_IF)


def phases_of(recipe: Recipe, catalogue: Catalogue | None = None) -> tuple[ServerPhase, ...]:
    """The phases of a run, in order: counts where the recipe has them, then training where it has rounds; under a plan a histogram of items before
    the counts, and distillation behind them.

    ``catalogue``: what is known of the items, for a prior on noised counts.
    """
    training = ServerPhase(
        name="training",
        rounds=recipe.server.rounds,
        exchanges=1,
        tensors=lambda state: to_numpy(state.sent(recipe)),
        declared=lambda state, exchange: _training_sums(recipe, state),
        middle=_no_middle,
        finish=lambda state, totals, release: finish_training(recipe, state, totals, release),
    )
    if recipe.counts is None:
        return (training,)
    counts = ServerPhase(
        name="counts",
        rounds=recipe.counts.blocks,
        exchanges=1,
        tensors=lambda state: {} if state.popularity is None else {"popularity": state.popularity},
        declared=lambda state, exchange: declared_sums(recipe, "counts", num_weights=0, round=state.round + 1 if state.phase == "counts" else 1),
        middle=_no_middle,
        finish=lambda state, totals, release: finish_counts(recipe, state, totals, release, item_features(catalogue) if catalogue else None),
    )
    after = (training,) if recipe.server.rounds else ()
    if not recipe.privacy.has_plan:
        return (counts, *after)
    if recipe.distillation is not None:
        after = (_distillation(recipe), *after)
    popularity = ServerPhase(
        name="popularity",
        rounds=1,
        exchanges=1,
        tensors=lambda state: {},
        declared=lambda state, exchange: declared_sums(recipe, "popularity", num_weights=0),
        middle=_no_middle,
        finish=lambda state, totals, release: finish_popularity(recipe, state, totals, release),
    )
    return (popularity, counts, *after)


def _distillation(recipe: Recipe) -> ServerPhase:
    """A phase of the server alone, which asks nobody anything."""

    def finish(state: State, totals: Totals, release: Release) -> State:
        assert isinstance(state.counts, LiftTable), "a counts phase comes before"
        layout = make_parts(recipe).layout
        weights_P = flatten(distil(recipe, state.counts), layout)
        if state.features is not None:
            weights_P = with_projection(weights_P, state.features, layout)
        return replace(state, phase=release.phase, round=release.round, weights_P=weights_P)

    return ServerPhase("distillation", 1, 0, tensors=lambda state: {}, declared=lambda state, exchange: {}, middle=_no_middle, finish=finish)


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
    if state.features is not None:
        mean_P = slope_of_parts(mean_P, state.features, parts.layout, state.left_out(recipe, release.round))
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


def finish_popularity(recipe: Recipe, state: State, totals: Totals, release: Release) -> State:
    """The noised histogram of how often each item was met, in units of the clip; -inf for the padding."""
    declared = declared_sums(recipe, "popularity", num_weights=0)["popularity"]
    popularity = _noised(release, declared, totals)
    popularity[0] = -np.inf
    return replace(state, phase=release.phase, round=release.round, popularity=popularity)


def finish_counts(recipe: Recipe, state: State, totals: Totals, release: Release, features: NDArray[np.float32] | None = None) -> State:
    """The counts that are kept: the largest cells of each row; under a plan a lift table, what the noised sums most likely say. Where the recipe
    asks for it, the first item vectors are made of them.

    Under a plan EVERY cell gets noise, empty ones too. ``features`` (I, F): of the items, for a prior; None: nothing is known of them.
    """
    config = recipe.counts
    assert config is not None
    declared = declared_sums(recipe, "counts", num_weights=0, round=release.round)["counts"]
    if release.plan is not None:
        assert state.popularity is not None, "a popularity phase comes before"
        table = denoise(
            _noised(release, declared, totals),
            state.popularity,
            most_popular(state.popularity, config.items),
            np.ones((recipe.num_items, 1), dtype=np.float32) if features is None else features,
            config,
            noise=release.plan.noise_std_in_steps("counts", "counts") * declared.step,
            popularity_noise=release.plan.noise_std_in_steps("popularity", "popularity") * declared.step,
        )
        return replace(state, phase=release.phase, round=release.round, counts=table)
    total, block = totals.get("counts"), rows_of_block(recipe.num_items + 1, config.blocks, release.round)
    sparse = (
        total
        if isinstance(total, SparseSum)
        else SparseSum(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), (len(block), recipe.num_items + 1))
    )
    rows = sparse.rows if config.blocks == 1 else sparse.rows * block.step + block.start
    counts = keep_top(from_cells(rows, sparse.columns, sparse.values * declared.step, num_items=recipe.num_items), config.top)
    if release.round > 1:
        assert isinstance(state.counts, Counts), "the blocks before"
        counts = merge_rows(state.counts, counts)
    state = replace(state, phase=release.phase, round=release.round, counts=counts)
    if recipe.encoder.first_items == "counts" and release.round == config.blocks:
        weights_P, items = state.weights_P.clone(), make_parts(recipe).layout.slice_of(ITEMS)
        first_ID = weights_P[items].view(-1, recipe.encoder.width)
        weights_P[items] = spectral_items(counts, first_ID, seed=recipe.seed).flatten()
        state = replace(state, weights_P=weights_P)
    return state


def _noised(release: Release, declared: DeclaredSum, totals: Totals) -> NDArray[np.float32]:
    """A dense sum with its noise, in units of its clip: added in whole numbers, ``ROWS_AT_ONCE`` rows a block of noise. Nobody's is noise alone."""
    total, result = totals.get(declared.name), np.empty(declared.shape, dtype=np.float32)
    for block, first in enumerate(range(0, len(result), ROWS_AT_ONCE)):
        rows = slice(first, first + ROWS_AT_ONCE)
        noise = release.noise(declared.name, result[rows].size, block=block)
        assert noise is not None
        steps = noise.reshape(result[rows].shape) + (0 if total is None else _dense(total)[rows])
        result[rows] = steps * declared.step
    return result


def _dense(total: Ints | SparseSum) -> NDArray[np.int64]:
    assert isinstance(total, np.ndarray)
    return total.astype(np.int64, copy=False)
