"""The closed manifest: which named sums may leave a node in a phase, of what shape, how large. Everything else is refused.

The node checks before it sends, the server before it adds: the same function. Whole numbers only, so an upload has no nan
to hide in; norms are checked exactly, on the integers. Under a plan no loss, weight or count of anything leaves beside
the sums that the plan accounts for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import ConfigError, UploadRefused
from fedssl.privacy.adaptive_clip import WITHIN, WITHIN_CLIP, WITHIN_STEP
from fedssl.privacy.grid import LARGEST_COORDINATE, grid_step
from fedssl.privacy.plan import training_sums
from fedssl.recipe import Recipe
from fedssl.records import SparseSum

WEIGHT_STEP = 2.0**-16
LOSS_STEP = 2.0**-16
GAIN_STEP = 2.0**-24
MOST_WINDOWS = 1024
"""Under window-level privacy: a step's sum of gradients is at most as long as so many times ``local.windows`` clipped ones; beyond it an upload is refused."""
NOISE_TAIL = 12.0
"""Deviations beyond which noise that users added counts as no noise: a normal number lies there with a chance of 4e-33."""
COUNTS_STEP = 2.0**-16
"""Raw counts: a cell of one user may hold 256 pairs, and decays keep 16 binary digits."""


@dataclass(frozen=True)
class DeclaredSum:
    """One sum that may leave. ``smallest`` and ``largest`` are what one user may add to a coordinate, in steps.

    ``clip_norm``: largest L2 norm of one user's part, in units of the values; None: not bounded beyond its coordinates.
    ``noise_std``: deviation of the noise that each user has added already, in steps; 0: none.
    """

    name: str
    shape: tuple[int, ...]
    layout: Literal["dense", "sparse"]
    dtype: Literal["int"]
    clip_norm: float | None
    step: float
    smallest: int = -LARGEST_COORDINATE
    largest: int = LARGEST_COORDINATE
    noise_std: float = 0.0


def declared_sums(recipe: Recipe, phase: str, num_weights: int, *, clip_norm: float | None = None, round: int = 1) -> dict[str, DeclaredSum]:
    """All that may leave a node in ``phase`` under ``recipe``; ``num_weights``: coordinates of the shared weights, flat.

    - popularity, under a plan: "popularity", (I + 1,).
    - counts: "counts", sparse, (rows of the round's block, I + 1), see `rows_of_block`; under a plan dense, because which cells
      are filled is the history, and between `[counts] items` alone, (N, N).
    - training: "update", (num_weights,); only without a plan also "weight" and "loss", (1,) each: sums of the users'
      weights, each in [0, 1], and of their losses. With an adaptive clip also "within_clip", (1,): +1/2 or -1/2 a user.
    - evaluation, without a plan: "hits" and "gains", (2, K) each, and "tested", (1,): of how a model ranks the last event of each user.
    Steps follow the clip; without one, those of updates follow ``local.grid_step``. ``clip_norm``: that of the round where
    the recipe's is adaptive, else None.

    Raises ConfigError for a phase that the recipe does not have, and for a round's clip where there should be none, or the reverse.
    """
    if phase == "counts" and recipe.counts is not None and not recipe.privacy.is_local:
        clip_norm, side = recipe.counts.clip_norm, recipe.num_items + 1
        step = COUNTS_STEP if clip_norm is None else grid_step(clip_norm)
        if recipe.privacy.has_plan:
            items = min(recipe.counts.items, recipe.num_items)
            return {"counts": DeclaredSum("counts", (items, items), "dense", "int", clip_norm, step, smallest=0)}
        rows = len(rows_of_block(side, recipe.counts.blocks, round))
        return {"counts": DeclaredSum("counts", (rows, side), "sparse", "int", clip_norm, step, smallest=0)}
    if phase == "popularity" and recipe.counts is not None and recipe.counts.clip_norm is not None and recipe.privacy.has_plan:
        clip_norm = recipe.counts.clip_norm
        return {"popularity": DeclaredSum("popularity", (recipe.num_items + 1,), "dense", "int", clip_norm, grid_step(clip_norm), smallest=0)}
    if phase == "training":
        is_adaptive = recipe.privacy.clip == "adaptive"
        if is_adaptive != (clip_norm is not None):
            raise ConfigError(f"[privacy] clip = '{recipe.privacy.clip}', and the round's clip is {clip_norm}; server and recipe contradict one another")
        clip_norm = clip_norm if is_adaptive else recipe.privacy.clip_norm
        step = recipe.local.grid_step if clip_norm is None else grid_step(clip_norm)
        sums = [DeclaredSum("update", (num_weights,), "dense", "int", clip_norm, step)]
        if not recipe.privacy.has_plan:
            sums.append(DeclaredSum("weight", (1,), "dense", "int", None, WEIGHT_STEP, smallest=0, largest=int(1 / WEIGHT_STEP)))
            sums.append(DeclaredSum("loss", (1,), "dense", "int", None, LOSS_STEP))
        if is_adaptive:
            sums.append(DeclaredSum(WITHIN, (1,), "dense", "int", WITHIN_CLIP, WITHIN_STEP))
        if recipe.privacy.is_by_window:
            sums = [_of_windows(recipe, one) for one in sums]
        elif recipe.privacy.is_local:
            sums = [_with_noise(recipe, one) for one in sums]
        return {one.name: one for one in sums}
    if phase == "evaluation" and recipe.evaluation is not None:
        if recipe.privacy.has_plan:
            raise ConfigError("phase 'evaluation': sums of what people met last are not among those that the privacy plan accounts for; nothing may leave")
        shape = (2, len(recipe.evaluation.ks))
        sums = [DeclaredSum("hits", shape, "dense", "int", None, 1.0, smallest=0, largest=1)]
        sums.append(DeclaredSum("gains", shape, "dense", "int", None, GAIN_STEP, smallest=0, largest=int(1 / GAIN_STEP)))
        sums.append(DeclaredSum("tested", (1,), "dense", "int", None, 1.0, smallest=0, largest=1))
        return {one.name: one for one in sums}
    known = ("popularity, counts, " if recipe.privacy.has_plan else "counts, ") * (recipe.counts is not None) + "training"
    raise ConfigError(f"phase {phase!r} is not in the recipe, which has {known}; nothing may leave in it")


def rows_of_block(side: int, blocks: int, round: int) -> range:
    """The rows of counts that are summed in a round: every ``blocks``-th of ``side``, so that blocks are alike however the catalogue is ordered."""
    return range(round - 1, side, blocks)


def _with_noise(recipe: Recipe, one: DeclaredSum) -> DeclaredSum:
    """A sum to which every user adds noise of the recipe's multiplier, in steps of the round's clip."""
    _check_noise(recipe)
    (noise,) = (planned.noise_multiplier for planned in training_sums(recipe.privacy, recipe.privacy.noise_multiplier) if planned.name == one.name)
    assert one.clip_norm is not None
    return replace(one, noise_std=noise * one.clip_norm / one.step)


def window_scale(recipe: Recipe) -> float:
    """Under window-level privacy: what a step moves the weights by, over the noised sum of its windows' clipped gradients."""
    return recipe.local.lr / recipe.local.windows


def _of_windows(recipe: Recipe, one: DeclaredSum) -> DeclaredSum:
    """The noised sums of windows' gradients of all local steps, scaled to an update. Counted in steps of one window's clip."""
    _check_noise(recipe)
    assert one.clip_norm is not None
    local, scale = recipe.local, window_scale(recipe)
    most = MOST_WINDOWS * local.windows * local.steps
    return replace(
        one,
        step=one.step * scale,
        clip_norm=one.clip_norm * scale * most,
        smallest=one.smallest * most,
        largest=one.largest * most,
        noise_std=recipe.privacy.noise_multiplier * one.clip_norm / one.step * math.sqrt(local.steps),
    )


def _check_noise(recipe: Recipe) -> None:
    if recipe.privacy.noise_multiplier == 0:
        raise ConfigError(
            f"[privacy] mode = '{recipe.privacy.mode}', and the recipe says no noise_multiplier; the server must solve for it before it asks anybody"
        )


def check_manifest(sums: Mapping[str, Any], declared: Mapping[str, DeclaredSum], *, most_users: int) -> None:
    """Refuse sums that are not exactly the declared ones, or larger than ``most_users`` honest users can be.

    Guarantees for what passes:
      - the names are those declared, none missing, none more; layout and shape too; values are int32 or int64;
      - every coordinate lies within most_users * [smallest, largest];
      - under a clip the L2 norm is at most most_users * clip_norm, exactly;
      - where users added noise, both bounds are as much wider as their noise is long, but for a chance below 1e-20;
      - a sparse sum lists cells of its matrix, sorted, each once (a cell listed twice would hide its norm).

    Raises UploadRefused naming the sum, of kind names, form, coordinates or norm.
    """
    if most_users < 1:
        raise UploadRefused(f"sums of {most_users} users; nobody was asked, so nothing may come", "names")
    for name in sums:
        if name not in declared:
            raise UploadRefused(f"sum {name!r} is not declared; only {', '.join(declared)} may leave in this phase", "names")
    for name, one in declared.items():
        if name not in sums:
            raise UploadRefused(f"sum {name!r} is missing; wanted exactly {', '.join(declared)}", "names")
        _check_size(_values(sums[name], one), one, most_users)


def squared_norm(values: NDArray[Any]) -> int:
    """The sum of squares of whole numbers, exactly, however large: 16 bits at a time in 64-bit integers."""
    magnitude = np.abs(values.astype(np.int64).ravel()).view(np.uint64)  # The absolute value of the least int64 fits only here.
    limbs = []
    while magnitude.any():
        limbs.append((magnitude & np.uint64(0xFFFF)).astype(np.int64))
        magnitude = magnitude >> np.uint64(16)
    return sum(int(a @ b) << 16 * (i + j) for i, a in enumerate(limbs) for j, b in enumerate(limbs))


def _values(found: Any, one: DeclaredSum) -> NDArray[Any]:
    """The whole numbers of a sum, once its layout, type and shape are as declared."""
    if one.layout == "sparse":
        if not isinstance(found, SparseSum):
            raise UploadRefused(f"sum {one.name!r} came as {type(found).__name__}, wanted a sparse sum")
        _check_cells(found, one)
        return found.values
    if not isinstance(found, np.ndarray):
        raise UploadRefused(f"sum {one.name!r} came as {type(found).__name__}, wanted a dense array")
    _check_type(found, one.name)
    if found.shape != one.shape:
        raise UploadRefused(f"sum {one.name!r} has shape {found.shape}, wanted {one.shape}; do both sides hold the same recipe and catalogue?")
    return found


def _check_type(found: Any, name: str) -> None:
    if not isinstance(found, np.ndarray) or found.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        came = found.dtype if isinstance(found, np.ndarray) else type(found).__name__
        raise UploadRefused(f"sum {name!r} holds {came}, wanted int32 or int64 steps; floats are refused: they may be nan or infinite, and do not add exactly")


def _check_cells(found: SparseSum, one: DeclaredSum) -> None:
    for part, array in (("rows", found.rows), ("columns", found.columns), ("values", found.values)):
        _check_type(array, f"{one.name}.{part}")
        if array.ndim != 1 or len(array) != len(found.values):
            raise UploadRefused(f"sum {one.name!r}: {part} have shape {array.shape}, wanted one number a cell, {len(found.values)} of them")
    if tuple(found.shape) != one.shape:
        raise UploadRefused(f"sum {one.name!r} has shape {tuple(found.shape)}, wanted {one.shape}; do both sides hold the same catalogue?")
    if not len(found.values):
        return
    if found.rows.min() < 0 or found.rows.max() >= one.shape[0] or found.columns.min() < 0 or found.columns.max() >= one.shape[1]:
        raise UploadRefused(f"sum {one.name!r} has cells outside its shape {one.shape}")
    place = found.rows.astype(np.int64) * one.shape[1] + found.columns
    if (np.diff(place) <= 0).any():
        raise UploadRefused(f"sum {one.name!r}: cells are not sorted by (row, column), each once")


def _check_size(values: NDArray[Any], one: DeclaredSum, most_users: int) -> None:
    if not values.size:
        return
    # Least and largest, not abs: the absolute value of the least int64 is itself.
    low, high = int(values.min()), int(values.max())
    # Each user's noise is rounded, by half a step at most.
    std, rounding = one.noise_std * math.sqrt(most_users), most_users * 0.5 * (one.noise_std > 0)
    noise = math.ceil(NOISE_TAIL * std + rounding)
    if low < most_users * one.smallest - noise or high > most_users * one.largest + noise:
        wanted = f"{most_users * one.smallest - noise} to {most_users * one.largest + noise}"
        raise UploadRefused(f"sum {one.name!r} has coordinates from {low} to {high} steps; {most_users} user(s) make at most {wanted}", "coordinates")
    if one.clip_norm is None:
        return
    squared = squared_norm(values)
    # The norm of d normal numbers lies above sqrt(d) + t with a chance below exp(-t^2 / 2).
    longest = most_users * Fraction(one.clip_norm) / Fraction(one.step)
    longest += Fraction(std * (math.sqrt(values.size) + NOISE_TAIL) + rounding * math.sqrt(values.size))
    if squared > longest**2:
        norm = math.sqrt(squared) * one.step
        raise UploadRefused(f"sum {one.name!r} has L2 norm {norm:.6g}; at most {float(longest) * one.step:g} come from {most_users} user(s)", "norm")
