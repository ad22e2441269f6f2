"""The nodes of a simulation: the users dealt to them, their ledgers of own noise, their heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedssl.client_round import Shard
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset
from fedssl.data.histories import take_users
from fedssl.disk import writing
from fedssl.privacy.keys import Keys, cohort_of_pass, users_per_round
from fedssl.privacy.uploads import Device, UploadLedger
from fedssl.recipe import Recipe
from fedssl.workers import Workers


def make_shards(dataset: Dataset, config: RunConfig, heads: Path, pool: Workers | None = None) -> dict[int, Shard]:
    """The users dealt to nodes in pieces of like size, by number. The split changes nothing beyond rounding. All nodes share the workers."""
    pool = pool or Workers(config.system.workers)
    pieces = np.array_split(np.arange(dataset.histories.num_users), config.system.shards)
    shards = {}
    for index, users in enumerate(pieces):
        events = dataset.histories if len(pieces) == 1 else take_users(dataset.histories, users)
        shards[index] = Shard(events, users, heads / f"node-{index:03d}", users_per_chunk=config.system.users_per_chunk, pool=pool)
    return shards


def give_devices(shards: dict[int, Shard], folder: Path, keys: Keys, *, may_be_new: bool) -> None:
    """Key and ledger of each node: users' noise comes from the run's own secret, as on devices it comes from theirs."""
    for index, shard in shards.items():
        place = folder / f"node-{index:03d}"
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
        shard.device = Device(keys.noise, UploadLedger(place / "uploads.sqlite", keys.noise, may_be_new=may_be_new))
        shard.is_simulated = True


def check_devices_not_behind(shards: dict[int, Shard], recipe: Recipe, num_users: int, rounds: int) -> None:
    """Every user's uploads in the first ``rounds`` rounds must be in their node's ledger."""
    uploads_U = np.zeros(num_users, dtype=np.int64)
    for number in range(1, rounds + 1):
        uploads_U[cohort_of_pass(recipe.seed, users_per_round(recipe.server.cohort, num_users), num_users, number)] += 1
    for shard in shards.values():
        shard.own().ledger.check_not_behind(dict(zip(shard.users.tolist(), uploads_U[shard.users].tolist(), strict=True)))


def take_back_heads(shards: dict[int, Shard], recipe: Recipe, *, after: int, settled: int) -> None:
    """Heads as they were after training round ``after``; the way back is kept from ``settled`` on."""
    for shard in shards.values():
        store = shard.heads(recipe)
        if store is not None:
            store.begin(after + 1, settled=settled)


def heads_of(shards: dict[int, Shard], recipe: Recipe) -> Callable[[NDArray[np.int64]], NDArray[np.float32]] | None:
    """A look-up of users' heads over all shards; None where the recipe has none."""
    if recipe.head.name == "none":
        return None

    def read(users: NDArray[np.int64]) -> NDArray[np.float32]:
        result = np.zeros((len(users), recipe.encoder.width), dtype=np.float32)
        for shard in shards.values():
            store = shard.heads(recipe)
            assert store is not None
            # Users are sorted: looked up, not searched for among all that there are.
            places = np.searchsorted(shard.users, users).clip(max=max(len(shard.users) - 1, 0))
            mine = shard.users[places] == users if len(shard.users) else np.zeros(len(users), dtype=np.bool_)
            result[mine] = store.read(users[mine])
        return result

    return read
