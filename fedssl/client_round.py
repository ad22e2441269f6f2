"""What a node does in an exchange: a pure function from a Download and the users at hand to an Upload.

The same code on a device with one user and in a simulation shard with a million: a leading users axis. What leaves is a
closed list of declared sums; heads stay in the node's own store.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from fedssl.chunk_training import Chunk, ChunkJob, MappedJob, begin_chunks, begin_mapped_chunks, cut_chunks, narrow
from fedssl.config import CountsConfig
from fedssl.counts import dense, most_popular, sum_items, sum_transitions
from fedssl.data.histories import Histories, take_users
from fedssl.data.history_store import open_histories, write_histories
from fedssl.data.watch import unchanged
from fedssl.data.windows import Events
from fedssl.device_evaluation import model_of, sums_of_ranks
from fedssl.errors import DataError, WireError
from fedssl.heads.store import HeadStore
from fedssl.parts import Parts, make_parts
from fedssl.privacy.adaptive_clip import WITHIN
from fedssl.privacy.local_noise import LocalNoise
from fedssl.privacy.manifest import DeclaredSum, check_manifest, declared_sums, rows_of_block
from fedssl.privacy.plan import LOCAL_SENSITIVITY
from fedssl.privacy.uploads import Device, open_device, question_of
from fedssl.privacy.window_chance import WindowChance
from fedssl.recipe import Recipe
from fedssl.records import Download, Ints, SparseSum, Upload
from fedssl.weights import from_numpy
from fedssl.window_chunks import begin_mapped_window_chunks, begin_window_chunks
from fedssl.wire import to_bytes, upload_from_bytes
from fedssl.workers import MappedArray, Workers, run_here


@dataclass
class Notes:
    """What a simulation may look at beside the uploads: for the researcher only, never in a record that leaves."""

    norms_U: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    losses_U: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    broken_users: int = 0


@dataclass
class Shard:
    """A node's users: their histories, their stable numbers (sorted), and the folder of their heads.

    ``users_per_chunk`` and ``pool`` (who trains the chunks) say how fast, never what. ``device``: key and ledger of users who
    add their own noise; where None it is opened in ``device_folder`` when a recipe first asks for it. ``is_simulated``: the users stand for
    devices, and where it is the same law their noise is drawn once, as that of their sum.
    """

    events: Events
    users: NDArray[np.int64]
    heads_folder: Path | None = None
    users_per_chunk: int = 32
    pool: Workers = field(default_factory=Workers)
    notes: Notes = field(default_factory=Notes)
    device_folder: Path | None = None
    device: Device | None = None
    is_simulated: bool = False
    _heads: HeadStore | None = None
    _name: str = field(default_factory=lambda: uuid4().hex)

    def heads(self, recipe: Recipe) -> HeadStore | None:
        """The store of heads, opened when a recipe first asks for one; None where it asks for none."""
        if recipe.head.name == "none":
            return None
        if self._heads is None:
            if self.heads_folder is None:
                raise DataError("this node has no folder for heads, and the recipe trains one; name a store in the node's configuration")
            self._heads = HeadStore(self.heads_folder, self.users, recipe.encoder.width)
        return self._heads

    def own(self) -> Device:
        """Key and ledger of the node's users. Raises DataError where they are missing, changed, or have no folder to be in."""
        if self.device is None:
            if self.device_folder is None:
                raise DataError("this node has no folder for a key and a ledger, and the recipe has users add their own noise; name a store for the node")
            self.device = open_device(self.device_folder)
        return self.device

    def share_events(self) -> dict[str, MappedArray]:
        """Where the workers find the events."""
        arrays: dict[str, NDArray[Any]] = {"items": self.events.items, "cuts": self.events.cuts, "training_ends": self.events.training_ends}
        return self.pool.shared(self._name) or self.pool.share(self._name, arrays)


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
    return Shard(open_histories(folder / "histories"), users, folder / "heads", users_per_chunk=chunk, pool=Workers(workers), device_folder=folder)


class ClientPhase(NamedTuple):
    """What a node does in a phase: which sums may leave, and how they come about."""

    declared: Callable[[Download, Parts], dict[str, DeclaredSum]]
    run: Callable[[Download, Parts, Shard, NDArray[np.int64]], dict[str, Ints | SparseSum]]


def client_round(download: Download, shard: Shard) -> Upload:
    """Follow one Download with the users it chose (None: all of the node) and return their sums.

    Guarantees:
      - nothing leaves that the recipe does not declare, and no sum leaves longer than its bound;
      - the same bytes for the same users and chunks, whatever the number of workers;
      - where users add their own noise, each is charged before their data is read; asked again, the same bytes leave.

    Raises WireError for a phase nobody knows, users that do not live here, or one that is named twice; BudgetSpent where
    one of the users would spend more than the recipe promises; DataError where the store of their histories was changed meanwhile.
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
    declared = phase.declared(download, parts)
    if download.recipe.privacy.is_local:
        _charge(download, declared, shard, users)
    with unchanged(shard.events):
        sums = phase.run(download, parts, shard, users)
    check_manifest(sums, declared, most_users=max(len(users), 1))
    upload = Upload(address=download.address, recipe=download.recipe.hash, sums=sums)
    return _kept(download, shard, upload) if download.recipe.privacy.is_local else upload


def _charge(download: Download, declared: dict[str, DeclaredSum], shard: Shard, users: NDArray[np.int64]) -> None:
    """Charge each user for all the sums together: before anything of theirs is read."""
    privacy, ledger = download.recipe.privacy, shard.own().ledger
    ledger.forget(download.address.run, download.settled)
    if privacy.is_by_window:
        # A window changes a step's sum by up to the clip; each step of the upload is read and noised on its own.
        rate, steps, cost = privacy.window_rate, download.recipe.local.steps, privacy.noise_multiplier**-2
        ledger.charge(question_of(download), download.address, users, cost=cost, promised=privacy.epsilon, delta=privacy.delta, rate=rate, steps=steps)
        return
    cost = 0.0
    for one in declared.values():
        if one.clip_norm is None or one.noise_std == 0:
            raise WireError(f"the recipe has users add their own noise, and none to the sum {one.name!r}; it cannot be accounted for")
        cost += (LOCAL_SENSITIVITY * one.clip_norm / (one.noise_std * one.step)) ** 2
    ledger.charge(question_of(download), download.address, users, cost=cost, promised=privacy.epsilon, delta=privacy.delta)


def _kept(download: Download, shard: Shard, upload: Upload) -> Upload:
    """The upload, kept on disk before it leaves; asked again, the one that left before. Training was still needed, for the heads."""
    return upload_from_bytes(shard.own().ledger.keep(question_of(download), download.address, to_bytes(upload)))


def _counts(download: Download, parts: Parts, shard: Shard, users: NDArray[np.int64]) -> dict[str, Ints | SparseSum]:
    config = download.recipe.counts
    if config is None:
        raise WireError("a counts phase without [counts] in the recipe; the Download contradicts itself")
    round, num_items = download.address.round, download.recipe.num_items
    declared = declared_sums(download.recipe, "counts", num_weights=0, round=round)["counts"]
    places = np.searchsorted(shard.users, users)
    is_dense = declared.layout == "dense"
    rows = _counted_rows(download, config) if is_dense else None
    block = None if config.blocks == 1 else rows_of_block(num_items + 1, config.blocks, round)
    sparse, is_broken = sum_transitions(shard.events, places, config, num_items=num_items, step=declared.step, rows=rows, block=block)
    shard.notes = Notes(broken_users=int(is_broken.sum()))
    return {"counts": narrow(dense(sparse)) if is_dense else replace(sparse, values=narrow(sparse.values.astype(np.int64, copy=False)))}


def _counted_rows(download: Download, config: CountsConfig) -> NDArray[np.int64]:
    """The items that were met most, by the released histogram: transitions between these are counted."""
    popularity = download.tensors.get("popularity")
    if popularity is None or popularity.shape != (download.recipe.num_items + 1,):
        raise WireError("a counts phase under a plan, whose Download does not say how popular each item is; is the server of another version?")
    return most_popular(popularity, config.items)


def _popularity(download: Download, parts: Parts, shard: Shard, users: NDArray[np.int64]) -> dict[str, Ints | SparseSum]:
    config = download.recipe.counts
    if config is None:
        raise WireError("a popularity phase without [counts] in the recipe; the Download contradicts itself")
    declared = declared_sums(download.recipe, "popularity", num_weights=0)["popularity"]
    places = np.searchsorted(shard.users, users)
    return {"popularity": narrow(sum_items(shard.events, places, config, num_items=download.recipe.num_items, step=declared.step))}


def _training(download: Download, parts: Parts, shard: Shard, users: NDArray[np.int64]) -> dict[str, Ints | SparseSum]:
    recipe, address = download.recipe, download.address
    heads = shard.heads(recipe)
    if heads is not None:
        heads.begin(address.round, settled=download.settled)
    places = np.searchsorted(shard.users, users)
    lengths = shard.events.training_ends[places] - shard.events.cuts[places]
    cut = cut_chunks(lengths, users, window=recipe.encoder.window, windows=recipe.local.windows, users_per_chunk=shard.users_per_chunk)
    chunks = (Chunk(places[chosen], users[chosen], heads.read(users[chosen]) if heads is not None else None) for chosen in cut)
    noise, windows = _device_chance(download, shard)
    if shard.pool.number == 1 or len(cut) == 1:
        job = ChunkJob(address, recipe, download.clip_norm, shard.events, from_numpy(download.tensors), noise, windows)
        results, totals = run_here(begin_chunks if windows is None else begin_window_chunks, job, chunks)
    else:
        mapped = MappedJob(address, recipe, download.clip_norm, shard.share_events(), shard.pool.share("weights", download.tensors), noise, windows)
        results, totals = shard.pool.run(begin_mapped_chunks if windows is None else begin_mapped_window_chunks, mapped, chunks)
    update = np.zeros(parts.layout.num_weights, dtype=np.int64)
    for total in totals:
        update += total
    declared = _training_sums(download, parts)
    if windows is not None and not windows.is_apart:
        update += windows.noise(users, 0, parts.layout.num_weights, declared["update"].noise_std * len(users) ** 0.5)
    if heads is not None and results:
        new_UD = np.concatenate([result.heads_UD for result in results if result.heads_UD is not None])
        heads.write(np.concatenate([result.users_U for result in results]), new_UD, round=address.round)
    shard.notes = Notes(
        norms_U=np.concatenate([result.norms_U for result in results] or [np.zeros(0)]),
        losses_U=np.concatenate([result.losses_U for result in results] or [np.zeros(0)]),
        broken_users=sum(result.broken for result in results),
    )
    sums: dict[str, Ints | SparseSum] = {
        "update": narrow(update),
        "weight": np.array([sum(result.weight_steps for result in results)], dtype=np.int64),
        "loss": np.array([sum(result.loss_steps for result in results)], dtype=np.int64),
        WITHIN: np.array([sum(result.within_steps for result in results)], dtype=np.int64),
    }
    return {name: value for name, value in sums.items() if name in declared}


def _device_chance(download: Download, shard: Shard) -> tuple[LocalNoise | None, WindowChance | None]:
    """Where the noise of users who add their own comes from: to the whole update, or to sums over windows."""
    privacy, address = download.recipe.privacy, download.address
    if privacy.is_by_window:
        is_apart = not shard.is_simulated or download.recipe.local.steps > 1
        return None, WindowChance(shard.own().key, question_of(download), address, is_apart)
    return (LocalNoise(shard.own().key, question_of(download), address) if privacy.is_local else None), None


def _training_sums(download: Download, parts: Parts) -> dict[str, DeclaredSum]:
    return declared_sums(download.recipe, "training", num_weights=parts.layout.num_weights, clip_norm=download.clip_norm)


def _counting_sums(download: Download, parts: Parts) -> dict[str, DeclaredSum]:
    return declared_sums(download.recipe, download.address.phase, num_weights=0, round=download.address.round)


def _evaluation(download: Download, parts: Parts, shard: Shard, users: NDArray[np.int64]) -> dict[str, Ints | SparseSum]:
    """Ranks under the model of a round, with the users' heads as they were after it."""
    recipe, heads = download.recipe, shard.heads(download.recipe)
    assert recipe.evaluation is not None and isinstance(shard.events, Histories)
    if heads is not None:
        heads.begin(download.address.round + 1, settled=download.settled)
    model = model_of(recipe, download.tensors, None if heads is None else lambda places: heads.read(shard.users[places]))
    return dict(sums_of_ranks(model, shard.events, np.searchsorted(shard.users, users), recipe.evaluation.ks))


CLIENT_PHASES: dict[str, ClientPhase] = {
    "popularity": ClientPhase(_counting_sums, _popularity),
    "counts": ClientPhase(_counting_sums, _counts),
    "training": ClientPhase(_training_sums, _training),
    "evaluation": ClientPhase(_counting_sums, _evaluation),
}
