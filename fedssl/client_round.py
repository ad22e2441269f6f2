"""What a node does in an exchange: a pure function from a Download and the users at hand to an Upload.

The same code on a device with one user and in a simulation shard with a million: a leading users axis. What leaves is a
closed list of declared sums; heads stay in the node's own store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedssl.counts import sum_transitions
from fedssl.data.histories import Histories, open_histories, take_users, write_histories
from fedssl.data.windows import Events
from fedssl.errors import DataError, WireError
from fedssl.heads.store import HeadStore
from fedssl.local_training import Batch, make_batch, train_users
from fedssl.parts import Parts, make_parts
from fedssl.privacy.adaptive_clip import WITHIN, WITHIN_CLIP, WITHIN_STEP
from fedssl.privacy.clipping import GridTotal
from fedssl.privacy.manifest import WEIGHT_STEP, DeclaredSum, check_manifest, declared_sums
from fedssl.recipe import Recipe
from fedssl.records import Download, Ints, SparseSum, Upload
from fedssl.weights import Weights, from_numpy

MOST_WINDOWS = 16
"""With weights by windows: a user of more weighs as one of so many, so that nobody outweighs a cohort and a share is whole steps."""


@dataclass
class Notes:
    """What a simulation may look at beside the uploads: for the researcher only, never in a record that leaves."""

    norms_U: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    losses_U: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    broken_users: int = 0


@dataclass
class Shard:
    """A node's users: their histories, their stable numbers (sorted), and the folder of their heads.

    ``users_per_chunk`` and ``workers`` (threads) say how fast, never what.
    """

    events: Events
    users: NDArray[np.int64]
    heads_folder: Path | None = None
    users_per_chunk: int = 32
    workers: int = 1
    notes: Notes = field(default_factory=Notes)
    _heads: HeadStore | None = None

    def heads(self, recipe: Recipe) -> HeadStore | None:
        """The store of heads, opened when a recipe first asks for one; None where it asks for none."""
        if recipe.head.name == "none":
            return None
        if self._heads is None:
            if self.heads_folder is None:
                raise DataError("this node has no folder for heads, and the recipe trains one; name a store in the node's configuration")
            self._heads = HeadStore(self.heads_folder, self.users, recipe.encoder.width)
        return self._heads


def write_shard(folder: Path, histories: Histories, users: NDArray[np.int64], *, users_per_chunk: int = 32, workers: int = 1) -> None:
    """Lay out the store of a node that hosts these users of ``histories``: their histories, numbers and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    write_histories(take_users(histories, users), folder / "histories")
    np.save(folder / "users.npy", np.asarray(users, dtype=np.int64))
    (folder / "node.json").write_text(json.dumps({"users_per_chunk": users_per_chunk, "workers": workers}))


def open_shard(folder: Path) -> Shard:
    """The users of a node's store. Raises DataError where it is not one."""
    try:
        users = np.load(folder / "users.npy", allow_pickle=False)
        settings = json.loads((folder / "node.json").read_text())
        chunk, workers = int(settings["users_per_chunk"]), int(settings["workers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not the store of a node ({error}); it needs histories/, users.npy and node.json") from None
    return Shard(open_histories(folder / "histories"), users, folder / "heads", users_per_chunk=chunk, workers=workers)


class ClientPhase(NamedTuple):
    """What a node does in a phase: which sums may leave, and how they come about."""

    declared: Callable[[Download, Parts], dict[str, DeclaredSum]]
    run: Callable[[Download, Parts, Shard, NDArray[np.int64]], dict[str, Ints | SparseSum]]


def client_round(download: Download, shard: Shard) -> Upload:
    """Follow one Download with the users it chose (None: all of the node) and return their sums.

    Guarantees:
      - nothing leaves that the recipe does not declare, and no sum leaves longer than its bound;
      - the same bytes for the same users and chunks, whatever the number of workers.

    Raises WireError for a phase nobody knows, users that do not live here, or one that is named twice.
    """
    phase = CLIENT_PHASES.get(download.address.phase)
    if phase is None:
        raise WireError(f"phase '{download.address.phase}' is not known here ({', '.join(CLIENT_PHASES)}); is the server newer?")
    parts = make_parts(download.recipe)
    users = shard.users if download.users is None else np.asarray(download.users, dtype=np.int64)
    places = np.searchsorted(shard.users, users)
    if len(users) and (places.max() >= len(shard.users) or not np.array_equal(shard.users[places], users)):
        raise WireError("the Download names users that this node does not host; the server's map of nodes is out of date, restart the run")
    if (np.diff(users) <= 0).any():
        # Named twice, a user would be added twice, beyond the clip.
        raise WireError("the Download names users out of order, or one twice; users are sorted and distinct")
    sums = phase.run(download, parts, shard, users)
    check_manifest(sums, phase.declared(download, parts), most_users=max(len(users), 1))
    return Upload(address=download.address, recipe=download.recipe.hash, sums=sums)


def _counts(download: Download, parts: Parts, shard: Shard, users: NDArray[np.int64]) -> dict[str, Ints | SparseSum]:
    config = download.recipe.counts
    if config is None:
        raise WireError("a counts phase without [counts] in the recipe; the Download contradicts itself")
    step = declared_sums(download.recipe, "counts", num_weights=0)["counts"].step
    places = np.searchsorted(shard.users, users)
    sparse, is_broken = sum_transitions(shard.events, places, config, num_items=download.recipe.num_items, step=step)
    shard.notes = Notes(broken_users=int(is_broken.sum()))
    return {"counts": sparse}


@dataclass
class _ChunkResult:
    places: NDArray[np.int64]
    heads_UD: NDArray[np.float32] | None
    weight_steps: int
    loss_steps: int
    within_steps: int
    norms_U: NDArray[np.float64]
    losses_U: NDArray[np.float64]
    broken: int


def _training(download: Download, parts: Parts, shard: Shard, users: NDArray[np.int64]) -> dict[str, Ints | SparseSum]:
    recipe, address = download.recipe, download.address
    heads = shard.heads(recipe)
    if heads is not None:
        heads.begin(address.round, settled=download.settled)
    weights = from_numpy(download.tensors)
    declared = _training_sums(download, parts)
    chunks = cut_chunks(shard, users)

    def train_some(mine: list[NDArray[np.int64]]) -> tuple[GridTotal, list[_ChunkResult]]:
        total = GridTotal(parts.layout)
        return total, [_train_chunk(download, parts, shard, heads, weights, chunk, total, declared) for chunk in mine]

    torch.set_num_threads(1)
    workers = min(shard.workers or os.cpu_count() or 1, max(len(chunks), 1))
    dealt = [chunks[worker::workers] for worker in range(workers)]
    if workers == 1:
        done = [train_some(dealt[0])]
    else:
        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(train_some, dealt))
    total_P = done[0][0].total_P
    for total, _ in done[1:]:
        total_P += total.total_P
    results = [result for _, some in done for result in some]
    if heads is not None and results:
        trained = np.concatenate([users[result.places] for result in results])
        new_UD = np.concatenate([result.heads_UD for result in results if result.heads_UD is not None])
        heads.write(trained, new_UD, round=address.round)
    shard.notes = Notes(
        norms_U=np.concatenate([result.norms_U for result in results] or [np.zeros(0)]),
        losses_U=np.concatenate([result.losses_U for result in results] or [np.zeros(0)]),
        broken_users=sum(result.broken for result in results),
    )
    sums: dict[str, Ints | SparseSum] = {
        "update": _narrow(total_P.numpy()),
        "weight": np.array([sum(result.weight_steps for result in results)], dtype=np.int64),
        "loss": np.array([sum(result.loss_steps for result in results)], dtype=np.int64),
        WITHIN: np.array([sum(result.within_steps for result in results)], dtype=np.int64),
    }
    return {name: value for name, value in sums.items() if name in declared}


def cut_chunks(shard: Shard, users: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Places in ``users``, those of like length together, ``users_per_chunk`` at a time: the same for any number of workers."""
    where = np.searchsorted(shard.users, users)
    length = shard.events.training_ends[where] - shard.events.cuts[where]
    order = np.lexsort((users, length))
    return [order[first : first + shard.users_per_chunk] for first in range(0, len(order), shard.users_per_chunk)]


def _train_chunk(
    download: Download,
    parts: Parts,
    shard: Shard,
    heads: HeadStore | None,
    weights: Weights,
    places: NDArray[np.int64],
    total: GridTotal,
    declared: dict[str, DeclaredSum],
) -> _ChunkResult:
    recipe, address = download.recipe, download.address
    chosen = shard.users if download.users is None else download.users
    users_U = chosen[places]
    window = recipe.encoder.window
    batch = make_batch(
        parts.tasks,
        shard.events,
        np.searchsorted(shard.users, users_U),
        users_U,
        base=(recipe.seed, address.phase, address.round),
        local=recipe.local,
        window=window,
        num_items=recipe.num_items,
    )
    heads_UD = torch.from_numpy(heads.read(users_U)) if heads is not None else None
    trained = train_users(
        parts.encoder,
        parts.tasks,
        weights,
        batch,
        local=recipe.local,
        window=window,
        dropout=recipe.encoder.dropout,
        seed=recipe.seed,
        heads_UD=heads_UD,
        head_lr=recipe.head.lr,
    )
    # Without a plan the weight is a declared sum: whole steps, so that numerator and denominator agree exactly.
    steps_U = np.full(len(users_U), round(1 / WEIGHT_STEP)) if recipe.privacy.has_plan else np.rint(_shares(recipe, batch, shard, users_U) / WEIGHT_STEP)
    steps_U = steps_U.astype(np.int64)
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
    new_UD = None
    if heads_UD is not None and trained.heads_UD is not None:
        is_finite_U1 = trained.heads_UD.isfinite().all(1, keepdim=True) & ~clipped.is_broken_U[:, None]
        new_UD = torch.where(is_finite_U1, trained.heads_UD, heads_UD).numpy()
    weight_steps, broken = int(steps_U[is_well_U].sum()), int(clipped.is_broken_U.sum())
    return _ChunkResult(places, new_UD, weight_steps, loss_steps, within_steps, clipped.norms_U.numpy(), losses_U, broken)


def _shares(recipe: Recipe, batch: Batch, shard: Shard, users_U: NDArray[np.int64]) -> NDArray[np.float64]:
    """How much each user weighs beside the heaviest there can be, from 0 to 1; 0 where there is nothing to learn from. Shape: (U,)."""
    window = recipe.encoder.window
    if recipe.server.weighting == "positions":
        return batch.positions_U / (recipe.local.steps * recipe.local.windows * window)
    has_work_U: NDArray[np.float64] = (~batch.is_idle_U).numpy().astype(np.float64)
    if recipe.server.weighting == "windows":
        places_U = np.searchsorted(shard.users, users_U)
        positions_U = shard.events.training_ends[places_U] - shard.events.cuts[places_U] - 1
        has_work_U *= np.minimum(np.ceil(positions_U.clip(1) / window), MOST_WINDOWS) / MOST_WINDOWS
    return has_work_U


def _narrow(total: NDArray[np.int64]) -> Ints:
    """int32 where it fits: one device's upload always does."""
    largest = int(np.abs(total).max(initial=0))
    return total.astype(np.int32) if largest < 2**31 else total


def _training_sums(download: Download, parts: Parts) -> dict[str, DeclaredSum]:
    return declared_sums(download.recipe, "training", num_weights=parts.layout.num_weights, clip_norm=download.clip_norm)


def _counts_sums(download: Download, parts: Parts) -> dict[str, DeclaredSum]:
    return declared_sums(download.recipe, "counts", num_weights=0)


CLIENT_PHASES: dict[str, ClientPhase] = {"counts": ClientPhase(_counts_sums, _counts), "training": ClientPhase(_training_sums, _training)}
