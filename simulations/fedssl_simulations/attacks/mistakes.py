"""Planted mistakes: wrong stand-ins for shipped functions, to show that the audit would notice. For audits of the audit alone.

Each replaces one function at its one home while a `planted` block is open, in this process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fedssl_server.rounds import Run
from numpy.typing import NDArray
from torch import Tensor

from fedssl import counts
from fedssl.chunk_training import ChunkJob
from fedssl.local_training import Batch, Trained
from fedssl.privacy.clipping import Clipped, GridTotal
from fedssl.privacy.keys import cohort_by_coins, draw_cohort
from fedssl.privacy.local_noise import LocalNoise
from fedssl.privacy.plan import Plan
from fedssl.privacy.window_chance import WindowChance
from fedssl.server_round import ServerPhase
from fedssl.tasks import Views
from fedssl_simulations.attacks.audit import ADAPTIVE, COUNTS, EVERYBODY, FALLS_BACK, LOCAL, SAMPLED, SAMPLED_WINDOWS, WINDOWS, Audit, audit, found_of
from fedssl_simulations.attacks.result import Found
from fedssl_simulations.attacks.scenarios import CLIP_NORM, Scenario, replaced


class Mistake(NamedTuple):
    """``home``: the shipped function, module:name; ``wrong``: what stands there instead; ``scenario``: where it shows."""

    name: str
    home: str
    wrong: Callable[..., Any]
    scenario: Scenario


def planted(mistake: Mistake) -> AbstractContextManager[None]:
    """The mistake in place of the shipped function, until the block ends."""
    return replaced(mistake.home, mistake.wrong)


_add, _noise_std, _draw_cohort = GridTotal.add, Plan.noise_std_in_steps, draw_cohort
_clipped_counts, _own_noise, _window_noise = counts._clipped, LocalNoise.steps, WindowChance.normal


def _without_clip(self: GridTotal, trained: Trained, *, clip_norm: float, step: float, weight_U: Tensor) -> Clipped:
    return _add(self, trained, clip_norm=clip_norm * 1e6, step=step, weight_U=weight_U)


def _windows_as_weights(job: ChunkJob, batch: Batch, places_U: NDArray[np.int64]) -> NDArray[np.float64]:
    positions_U = job.events.training_ends[places_U] - job.events.cuts[places_U] - 1
    return np.ceil(positions_U / job.window)


def _half_the_noise(self: Plan, *args: Any, **kwargs: Any) -> float:
    return _noise_std(self, *args, **kwargs) / 2


def _noise_of_the_first_clip(self: Plan, phase: str, name: str, *, clip_norm: float | None = None) -> float:
    return _noise_std(self, phase, name, clip_norm=clip_norm) * (1.0 if clip_norm is None or name != "update" else CLIP_NORM / clip_norm)


def _counts_without_clip(
    user: NDArray[np.int64], key: NDArray[np.int64], weight: NDArray[np.float64], num_users: int, clip_norm: float | None, step: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    assert clip_norm is not None
    return _clipped_counts(user, key, weight, num_users, clip_norm * 1e6, step)


def _half_of_a_users_noise(self: LocalNoise, *args: Any, **kwargs: Any) -> NDArray[np.int64]:
    return _own_noise(self, *args, **kwargs) // 2


def _half_of_a_devices_noise(self: WindowChance, *args: Any, **kwargs: Any) -> NDArray[np.float64]:
    return _window_noise(self, *args, **kwargs) / 2


def _every_window(self: WindowChance, user: int, step: int, count: int, rate: float) -> NDArray[np.int64]:
    return np.arange(count)


def _first_users(key: bytes, phase: str, round: int, attempt: int, num_users: int, rate: float) -> NDArray[np.int64]:
    return np.arange(int(rate * num_users))


def _coins_of_the_seed(run: Run, phase: ServerPhase, number: int, attempt: int) -> NDArray[np.int64]:
    assert run.plan is not None
    return cohort_by_coins(run.recipe.seed, run.plan.phase(phase.name).rate, run.num_users, number, phase.name)


def _same_cohort_again(key: bytes, phase: str, round: int, attempt: int, num_users: int, rate: float) -> NDArray[np.int64]:
    return _draw_cohort(key, phase, round, 0, num_users, rate)


def _rows_as_they_come(drawn: Sequence[Views]) -> tuple[tuple[dict[str, Tensor], ...], Tensor, int, Tensor]:
    """Without candidates: every place of every sequence is a row of its own, so an item read twice is listed twice."""
    sequences: list[dict[str, Tensor]] = []
    rows = [np.zeros((len(next(iter(drawn[0].sequences.values()))), 1), dtype=np.int64)]
    width = 1
    for views in drawn:
        named: dict[str, Tensor] = {}
        for name, found in views.sequences.items():
            flat_UM = found.reshape(len(found), -1)
            named[name] = torch.from_numpy(np.where(flat_UM > 0, width + np.arange(flat_UM.shape[1]), 0).reshape(found.shape))
            rows.append(flat_UM)
            width += flat_UM.shape[1]
        sequences.append(named)
    rows_UK = torch.from_numpy(np.concatenate(rows, axis=1))
    return tuple(sequences), rows_UK, width, torch.ones(len(rows_UK), 0, dtype=torch.bool)


MISTAKES = (
    Mistake("a forgotten clip", "fedssl.privacy.clipping:GridTotal.add", _without_clip, EVERYBODY),
    Mistake("weights by number of windows", "fedssl.chunk_training:_shares", _windows_as_weights, EVERYBODY),
    Mistake("half the noise", "fedssl.privacy.plan:Plan.noise_std_in_steps", _half_the_noise, EVERYBODY),
    Mistake("a duplicated row", "fedssl.local_training:distinct_rows", _rows_as_they_come, EVERYBODY),
    Mistake("a known cohort accounted as Poisson", "fedssl_server.rounds:draw_cohort", _first_users, SAMPLED),
    Mistake("a cohort from the public seed", "fedssl_server.rounds:_cohort", _coins_of_the_seed, SAMPLED),
    Mistake("a cohort kept for a second attempt", "fedssl_server.rounds:draw_cohort", _same_cohort_again, FALLS_BACK),
    Mistake("the first clip's noise after it has grown", "fedssl.privacy.plan:Plan.noise_std_in_steps", _noise_of_the_first_clip, ADAPTIVE),
    Mistake("counts without their clip", "fedssl.counts:_clipped", _counts_without_clip, COUNTS),
    Mistake("half of a user's own noise", "fedssl.privacy.local_noise:LocalNoise.steps", _half_of_a_users_noise, LOCAL),
    Mistake("half of a device's noise", "fedssl.privacy.window_chance:WindowChance.normal", _half_of_a_devices_noise, WINDOWS),
    Mistake("windows read whatever the coins say", "fedssl.privacy.window_chance:WindowChance.chosen", _every_window, SAMPLED_WINDOWS),
)


def audit_mistakes(folder: Path, *, canaries: int = 100_000, delta: float = 1e-5, seed: int = 0, on_done: Callable[[Audit], None] = lambda done: None) -> Found:
    """The audit with each mistake planted, one after the other: every claim should be refuted."""
    groups = []
    with tempfile.TemporaryDirectory(dir=folder) as ledgers:
        for number, mistake in enumerate(MISTAKES):
            with planted(mistake):
                done = audit(mistake.scenario, Path(ledgers) / str(number), canaries=canaries, delta=delta, seed=seed)
            on_done(done)
            groups.append((mistake.name, [done]))
    found = found_of(groups, first_column="mistake")
    return replace(found, attack="audit-mistakes", title=f"Planted mistakes, and what the audit says: up to {found.about['canaries']:,} canaries")
