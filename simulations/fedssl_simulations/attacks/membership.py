"""Membership: who was among the users that a model was trained with? The likelihood-ratio attack, from the released model alone.

Shadow runs train the same recipe over random halves of the users. For each user the attacker knows how the model's confidence in that
user's history is spread where the user took part, and where not; of a run it has not looked at it says which of the two fits better. Every
run is attacked once, with the others as shadows. Source: Carlini et al. 2022 (LiRA), https://arxiv.org/abs/2112.03570,
algorithm 1, with one variance for all users as section VI advises for few shadow models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from fedssl.checkpoints import read_checkpoint
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset
from fedssl.data.histories import Histories, take_users
from fedssl.errors import ConfigError, RunFolderError
from fedssl.recommender import Recommender
from fedssl_simulations.attacks.result import Figure, Found, statement_line
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_written_run, write_run

POSITIONS = 30
"""Training events of a user that are asked about, evenly spread over the history."""
FALSE_ALARMS = 0.01
_BLOCK = 512
_REPEATS = 1000

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class _Job(NamedTuple):
    """One shadow run: the users of ``dataset`` who are members, under ``config`` with the seed moved on by ``number``."""

    config: RunConfig
    dataset: Dataset
    folder: Path
    is_member_U: Bools
    number: int


def attack_membership(
    config: RunConfig,
    dataset: Dataset,
    folder: Path,
    *,
    shadows: int = 16,
    processes: int = 1,
    seed: int = 0,
    on_done: Callable[[int], None] = lambda number: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Found | None:
    """True positive rate at 1 % false positives, and AUC, each with a 95 % interval bootstrapped over users.

    ``folder``: the shadow runs, each a run folder with the users' confidences; a later call with the same settings goes on with what is
    there. ``on_done`` is called with the number of each run that is there. ``should_stop`` is asked between rounds, or with several
    processes between runs; None is returned where it stopped the attack. Raises ConfigError for an odd number of runs, or fewer than 4;
    RunFolderError where ``folder`` holds runs of other settings or data.
    """
    if shadows < 4 or shadows % 2:
        raise ConfigError(f"{shadows} shadow runs; wanted an even number from 4 on, so that every user takes part in half of them")
    _claim(folder, config, dataset, shadows, seed)
    member_RU = draw_members(shadows, dataset.histories.num_users, seed)
    jobs = [_Job(config, dataset, folder / f"shadow-{number:02d}", member_RU[number], number) for number in range(shadows)]
    if not (_one_by_one(jobs, on_done, should_stop) if processes == 1 else _in_processes(jobs, processes, on_done, should_stop)):
        return None
    confidence_RU = np.stack([np.load(job.folder / "confidence.npy") for job in jobs])
    reports = [json.loads((job.folder / "report.json").read_text()) for job in jobs]
    return _found(confidence_RU, member_RU, reports)


def _one_by_one(jobs: Sequence[_Job], on_done: Callable[[int], None], should_stop: Callable[[], bool]) -> bool:
    """Whether all runs are there."""
    for job in jobs:
        if should_stop() or not _shadow(job, should_stop):
            return False
        on_done(job.number)
    return True


def _in_processes(jobs: Sequence[_Job], processes: int, on_done: Callable[[int], None], should_stop: Callable[[], bool]) -> bool:
    """Whether all runs are there. When asked to stop, those at work end their run and the others are not begun."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = list(jobs)
        working: dict[Future[bool], _Job] = {}
        try:
            while working or (waiting and not should_stop()):
                while waiting and len(working) < processes and not should_stop():
                    job = waiting.pop(0)
                    working[pool.submit(_shadow, job)] = job
                for done in wait(working, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    done.result()
                    on_done(working.pop(done).number)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return not waiting


def draw_members(runs: int, users: int, seed: int) -> Bools:
    """Who takes part in which run: a random half of the users in one, all others in the next, so every user in half of the runs. Shape: (R, U)."""
    rng = np.random.default_rng(seed)
    halves = [rng.permutation(users) < users // 2 for _ in range(runs // 2)]
    return np.stack([half for one in halves for half in (one, ~one)])


def confidences(model: Recommender, histories: Histories) -> Floats:
    """How sure the released model is of what each user did next: mean log odds over up to `POSITIONS` training events. Shape: (U,).

    Scores of the whole recommender are turned into probabilities by a softmax. A user without two training events gets 0.
    """
    past: list[NDArray[np.int32]] = []
    target: list[int] = []
    owner: list[int] = []
    for user in range(histories.num_users):
        rows = histories.items[histories.cuts[user] : histories.training_ends[user]]
        count = min(len(rows) - 1, POSITIONS)
        for place in np.linspace(1, len(rows) - 1, max(count, 0)).round().astype(int):
            past.append(rows[:place])
            target.append(int(rows[place]))
            owner.append(user)
    total_U, count_U = np.zeros(histories.num_users), np.zeros(histories.num_users)
    for first in range(0, len(past), _BLOCK):
        part = slice(first, first + _BLOCK)
        users = np.array(owner[part], dtype=np.int64)
        score = next(iter(model(past[part], users).values()))[:, 1:].double()
        own = score.gather(1, torch.tensor(target[part])[:, None] - 1)
        # log p - log(1 - p) of a softmax: the own score over the log mass of all others.
        others = score.scatter(1, torch.tensor(target[part])[:, None] - 1, -torch.inf).logsumexp(1)
        np.add.at(total_U, users, (own[:, 0] - others).numpy())
        np.add.at(count_U, users, 1.0)
    mean_U: Floats = total_U / count_U.clip(1)
    return mean_U


def likelihood_ratios(confidence_RU: Floats, member_RU: Bools) -> Floats:
    """For each run and user the log of how much likelier that confidence is for a member, by the other runs. Shape: (R, U).

    A mean over n runs is itself uncertain, so a new confidence lies (1 + 1 / n) of the variance from it. The logarithm of that factor is left out: of a
    member's runs one less is left, so it would only tell who has been taken out.
    """
    ratio_RU = np.empty_like(confidence_RU)
    for run in range(len(confidence_RU)):
        others = np.arange(len(confidence_RU)) != run
        seen, is_in = confidence_RU[others], member_RU[others]
        mean_in, mean_out = (np.where(side, seen, 0.0).sum(0) / side.sum(0) for side in (is_in, ~is_in))
        variance = np.square(seen - np.where(is_in, mean_in, mean_out)).sum() / (seen.size - 2 * seen.shape[1])
        spread_in, spread_out = (variance * (1 + 1 / side.sum(0)) for side in (is_in, ~is_in))
        ratio_RU[run] = np.square(confidence_RU[run] - mean_out) / (2 * spread_out) - np.square(confidence_RU[run] - mean_in) / (2 * spread_in)
    return ratio_RU


def area_under_curve(score_N: Floats, is_member_N: Bools) -> float:
    """The chance that a random member scores above a random other, ties counting half."""
    members = int(is_member_N.sum())
    others = len(is_member_N) - members
    ranks_N = rankdata(score_N)
    return float((ranks_N[is_member_N].sum() - members * (members + 1) / 2) / (members * others))


def true_positives(score_N: Floats, is_member_N: Bools, *, false_alarms: float = FALSE_ALARMS) -> float:
    """The share of members who score above a threshold that at most ``false_alarms`` of the others reach."""
    others = np.sort(score_N[~is_member_N])
    threshold = others[len(others) - 1 - int(false_alarms * len(others))]
    return float((score_N[is_member_N] > threshold).mean())


def _shadow(job: _Job, should_stop: Callable[[], bool] = lambda: False) -> bool:
    """One shadow run from wherever it stands, and the confidences of all users in its model. False where it was stopped before its end."""
    folder, histories = job.folder, job.dataset.histories
    if (folder / "confidence.npy").exists():
        return True
    mine = replace(job.dataset, histories=take_users(histories, np.flatnonzero(job.is_member_U)))
    if not (folder / "report.json").exists():
        if (folder / "run.toml").exists():
            run = simulate(resume=folder, dataset=mine, should_stop=should_stop)
        else:
            system = job.config.system.model_copy(update={"workers": 1, "shards": 1})
            config = job.config.model_copy(update={"seed": job.config.seed + job.number, "system": system})
            run = simulate(config, out=folder, dataset=mine, should_stop=should_stop)
        if not run.is_finished:
            return False
    report = json.loads((folder / "report.json").read_text())
    found = read_checkpoint(folder / "checkpoints" / report["model"]["checkpoint"])
    model = Recommender(found.recipe, found.state.released(found.recipe), found.state.counts)
    beside = folder / "confidence.new.npy"
    np.save(beside, confidences(model, histories))
    beside.replace(folder / "confidence.npy")
    return True


def _claim(folder: Path, config: RunConfig, dataset: Dataset, shadows: int, seed: int) -> None:
    """Make the folder, or see that what is in it belongs to the same attack."""
    about = {"fingerprint": dataset.histories.fingerprint, "shadows": shadows, "shadow_seed": seed}
    if (folder / "run.toml").exists():
        before, about_before = read_written_run(folder / "run.toml")
        if before != config or about_before != about:
            raise RunFolderError(f"{folder}: shadow runs of other settings or data lie here; choose another folder, or give the settings of its run.toml")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_run(config, folder / "run.toml", **about)


def _found(confidence_RU: Floats, member_RU: Bools, reports: list[dict[str, Any]]) -> Found:
    rows: list[dict[str, Figure | float | int | str]] = []
    for name, score_RU in (("confidence alone", confidence_RU), ("likelihood ratio", likelihood_ratios(confidence_RU, member_RU))):
        hits, area = _over_users(true_positives, score_RU, member_RU), _over_users(area_under_curve, score_RU, member_RU)
        rows.append({"attack": name, "true positives at 1 % false": hits, "auc": area})
    privacy = reports[0]["privacy"]
    quality = [(report.get("researcher_only") or report)["test"]["unseen"]["ndcg@10"] for report in reports]
    notes = [
        f"{len(member_RU)} runs over random halves of {member_RU.shape[1]} users, each attacked with the others as shadows.",
        "Intervals are of 95 %, bootstrapped over users.",
        f"The models are of use: NDCG@10 unseen {np.mean(quality):.4f} on their members' test events. Chance: 0.010, and an AUC of 0.500.",
        f"Promise of each run: {statement_line(privacy)}.",
    ]
    if privacy:
        at_most = min(np.exp(privacy["epsilon"]) * FALSE_ALARMS + privacy["delta"], 1.0)
        notes.append(f"Such an epsilon allows at most {at_most:.3f} true positives at 1 % false ones.")
    about = {"runs": len(member_RU), "users": member_RU.shape[1], "ndcg@10": float(np.mean(quality)), "confidence": 0.95, "privacy": privacy}
    return Found("membership", "Membership of users, from the released model", rows, notes, about)


def _over_users(measure: Callable[[Floats, Bools], float], score_RU: Floats, member_RU: Bools) -> Figure:
    """The measure over all runs and users at once, and how it varies when users are drawn again, all runs of a user together."""
    rng = np.random.default_rng(0)
    users = score_RU.shape[1]
    draws = [rng.integers(0, users, users) for _ in range(_REPEATS)]
    again = [measure(score_RU[:, drawn].reshape(-1), member_RU[:, drawn].reshape(-1)) for drawn in draws]
    low, high = np.quantile(again, [0.025, 0.975])
    return Figure(measure(score_RU.reshape(-1), member_RU.reshape(-1)), float(low), float(high))
