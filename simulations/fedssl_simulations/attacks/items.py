"""Which items an upload tells: the attacker reads a user's items off the rows of the item table that their upload moves.

The uploads are those of the shipped `client_round`. The attacker is told how many items the user has, and names so many rows: those
that moved in most of the uploads it holds, and among these the ones that moved farthest in their sum. What it is right about is the
user's whole training history, so a window shorter than the history bounds what one upload can tell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedssl.checkpoints import Checkpoint
from fedssl.client_round import Shard, client_round
from fedssl.config import PrivacyConfig, RunConfig
from fedssl.data.dataset import Dataset
from fedssl.errors import CatalogueMismatch, ConfigError
from fedssl.evaluation import training_counts
from fedssl.parts import make_parts
from fedssl.privacy.accounting import gaussian_epsilon
from fedssl.privacy.noise import gaussian_steps
from fedssl.privacy.plan import Plan, make_plan
from fedssl.recipe import Recipe, make_recipe
from fedssl.records import Address, Download
from fedssl.server_round import State, first_state
from fedssl.weights import ITEMS, to_numpy
from fedssl_simulations.attacks.bounds import bootstrap
from fedssl_simulations.attacks.result import Figure, Found, statement_line

Rows = NDArray[np.float64]
SUMS = (10, 100)
UPLOADS = 10


def name_items(uploads: Sequence[Rows], count: int) -> NDArray[np.int64]:
    """The attacker: the ``count`` catalogue rows that moved in most of these uploads, ties by how far they moved in the sum.

    Shapes: each upload is (I + 1, D). Rows that never moved are not named, so fewer than ``count`` may come back.
    """
    moved_I = sum((upload != 0).any(1).astype(np.int64) for upload in uploads)
    length_I = np.linalg.norm(np.sum(uploads, axis=0), axis=1)
    assert isinstance(moved_I, np.ndarray)
    order = np.lexsort((-length_I, -moved_I))
    order = order[(order > 0) & (moved_I[order] > 0)]
    return order[:count]


def agreement(named: NDArray[np.int64], truth: NDArray[np.int64]) -> tuple[float, float, float]:
    """F1, precision and recall of the named rows; 0 where nothing was named."""
    right = len(np.intersect1d(named, truth))
    if not right:
        return 0.0, 0.0, 0.0
    return 2 * right / (len(named) + len(truth)), right / len(named), right / len(truth)


@dataclass(frozen=True)
class _Target:
    """What is attacked: a model's state, and users with their histories."""

    config: RunConfig
    dataset: Dataset
    state: State
    shard: Shard
    users: NDArray[np.int64]

    def recipe(self, clip_norm: float | None) -> Recipe:
        config = self.config.model_copy(update={"privacy": PrivacyConfig(clip_norm=clip_norm)})
        return make_recipe(config, num_items=self.dataset.catalogue.num_items, catalogue=self.dataset.catalogue.hash)

    def upload(self, recipe: Recipe, users: NDArray[np.int64], round: int) -> NDArray[np.int64]:
        """The update that the node of these users sends in whole steps, (P,)."""
        download = Download(Address("attack", "training", round), recipe, to_numpy(self.state.weights(recipe)), np.sort(users))
        update = client_round(download, self.shard).sums["update"]
        assert isinstance(update, np.ndarray)
        return update.astype(np.int64)

    def rows(self, recipe: Recipe, update_P: NDArray[np.int64]) -> Rows:
        layout = make_parts(recipe).layout
        return update_P[layout.slice_of(ITEMS)].reshape(-1, recipe.encoder.width).astype(np.float64)

    def truth(self, user: int) -> NDArray[np.int64]:
        histories = self.dataset.histories
        return np.unique(histories.items[histories.cuts[user] : histories.training_ends[user]]).astype(np.int64)


def attack_items(
    config: RunConfig,
    dataset: Dataset,
    *,
    checkpoint: Checkpoint | None = None,
    users: int = 100,
    noise: Sequence[float] = (0.1, 0.5, 1.0),
    key: bytes,
    seed: int = 0,
) -> Found:
    """F1, precision and recall, mean over ``users`` random users, of what one upload and ten tell, with bootstrapped 95 % intervals.

    ``checkpoint``: the model that users train, with its own encoder; None: the first weights of the run. ``noise``: multipliers z of noise
    over ONE user's clipped upload, which is what a server would publish of a cohort of one; ``key``: 32 bytes that draw it. The clip is
    `[privacy] clip_norm`, or else half of the median length of an update, so that it shortens most of them.

    Raises ConfigError for more users than there are, CatalogueMismatch for a checkpoint of other items.
    """
    if checkpoint is not None:
        if checkpoint.catalogue.hash != dataset.catalogue.hash:
            raise CatalogueMismatch("the checkpoint was trained on another catalogue than that of the data; give the data set it was trained on")
        config = config.model_copy(update={"encoder": checkpoint.recipe.encoder})
    total = dataset.histories.num_users
    if users > total:
        raise ConfigError(f"{users} users are to be attacked, the data set has {total}; name at most so many")
    crowd = np.random.default_rng(seed).permutation(total)[: -(-users // max(SUMS)) * max(SUMS)]
    recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash)
    state = checkpoint.state if checkpoint is not None else first_state(recipe)
    with tempfile.TemporaryDirectory() as heads:
        shard = Shard(dataset.histories, np.arange(total), Path(heads), users_per_chunk=config.system.users_per_chunk)
        raw = _Target(config, dataset, state, shard, crowd[:users])
        return _attack(raw, crowd, noise, key)


def _attack(target: _Target, crowd: NDArray[np.int64], noise: Sequence[float], key: bytes) -> Found:
    open_recipe = target.recipe(None)
    target.upload(open_recipe, target.users, 1)
    clip_norm = target.config.privacy.clip_norm or float(np.median(target.shard.notes.norms_U)) / 2
    clipped_recipe = target.recipe(clip_norm)
    rows = [_row("the most popular items, without any upload", "none", target, _popular(target))]

    def alone(recipe: Recipe, count: int) -> Callable[[int], list[Rows]]:
        return lambda user: [target.rows(recipe, target.upload(recipe, np.array([user]), number)) for number in range(1, count + 1)]

    for name, recipe in (("raw", open_recipe), ("clipped", clipped_recipe)):
        for count in (1, UPLOADS):
            rows.append(_row(f"{name}, {_uploads(count)}", "none", target, _namer(target, alone(recipe, count))))
    for size in SUMS:
        groups = [crowd[first : first + size] for first in range(0, len(crowd) - size + 1, size)]
        for count in (1, UPLOADS) if groups else ():
            sums_of = _in_sums(target, open_recipe, groups, count)
            rows.append(_row(f"sum over {size} users, {_uploads(count)}", "none", target, _namer(target, sums_of), among=np.concatenate(groups)))
    notes = []
    for z in noise:
        for count in (1, UPLOADS):
            plan = _plan(target.config, clip_norm, z, count)

            def noised(user: int, plan: Plan = plan, count: int = count) -> list[Rows]:
                return [target.rows(clipped_recipe, _with_noise(target, clipped_recipe, plan, key, user, number)) for number in range(1, count + 1)]

            statement = _statement(plan, z, count)
            rows.append(_row(f"clipped, noise z = {z:g}, {_uploads(count)}", f"{statement['epsilon']:.4g}", target, _namer(target, noised)))
            notes.append(f"z = {z:g}, {_uploads(count)}: {statement_line(statement)}.")
    about = {"users": len(target.users), "clip_norm": clip_norm, "confidence": 0.95, "uploads": UPLOADS}
    title = f"Items that uploads tell: mean over {len(target.users)} users, 95 % intervals; clip norm {clip_norm:.3g}"
    return Found("items", title, rows, ["An F1 near zero is no guarantee: compare epsilon.", *notes], about)


def _uploads(count: int) -> str:
    return "one upload" if count == 1 else f"{count} uploads"


def _namer(target: _Target, uploads_of: Callable[[int], list[Rows]]) -> Callable[[int], NDArray[np.int64]]:
    return lambda user: name_items(uploads_of(user), len(target.truth(user)))


def _popular(target: _Target) -> Callable[[int], NDArray[np.int64]]:
    order = np.argsort(-training_counts(target.dataset.histories, target.dataset.catalogue.num_items)[1:], kind="stable") + 1
    return lambda user: order[: len(target.truth(user))]


def _in_sums(target: _Target, recipe: Recipe, groups: Sequence[NDArray[np.int64]], count: int) -> Callable[[int], list[Rows]]:
    """The sums that a user is part of, each over the users of one group."""
    sums = [[target.rows(recipe, target.upload(recipe, group, number)) for number in range(1, count + 1)] for group in groups]
    group_of = {int(user): place for place, group in enumerate(groups) for user in group}
    return lambda user: sums[group_of[user]]


def _plan(config: RunConfig, clip_norm: float, z: float, rounds: int) -> Plan:
    """What so many releases of one user's upload with that noise promise: nobody to hide among, so no sampling."""
    privacy = PrivacyConfig(clip_norm=clip_norm, noise_multiplier=z, delta=config.privacy.delta)
    server = config.server.model_copy(update={"rounds": rounds, "cohort": 1.0, "sampling": "poisson", "weighting": "equal"})
    plan = make_plan(privacy, server, None, 1)
    assert plan is not None
    return plan


def _statement(plan: Plan, z: float, rounds: int) -> dict[str, Any]:
    """What such releases promise. All of them together are one Gaussian, whose epsilon is exact, however little noise there is."""
    return {
        "unit": plan.unit,
        "neighbours": plan.neighbours,
        "trust": plan.trust,
        "sampling": {"training": "every user"},
        "accountant": "exact, one Gaussian (Balle and Wang 2018)",
        "delta": plan.delta,
        "epsilon": gaussian_epsilon(z, rounds, plan.delta),
    }


def _with_noise(target: _Target, recipe: Recipe, plan: Plan, key: bytes, user: int, number: int) -> NDArray[np.int64]:
    update_P = target.upload(recipe, np.array([user]), number)
    std = plan.noise_std_in_steps("training", "update")
    return update_P + gaussian_steps(key, phase="training", round=number, attempt=user, name="update", count=len(update_P), std_in_steps=std)


def _row(
    what: str, epsilon: str, target: _Target, named: Callable[[int], NDArray[np.int64]], *, among: NDArray[np.int64] | None = None
) -> dict[str, Figure | float | int | str]:
    users = target.users if among is None else np.intersect1d(target.users, among)
    found = np.array([agreement(named(int(user)), target.truth(int(user))) for user in users])
    figures = {name: Figure(float(column.mean()), *bootstrap(column)) for name, column in zip(("f1", "precision", "recall"), found.T, strict=True)}
    return {"attacker sees": what, "epsilon": epsilon, **figures}
