"""A federation small enough for a test: a few dozen users, some 40 items, a narrow encoder, a round in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from fedssl_server.rounds import RoundFacts, Run, owners, run_rounds
from fedssl_simulations.grids import Handler, InProcessGrid, handler_of
from numpy.typing import NDArray

from fedssl.catalogue import Catalogue
from fedssl.client_round import Shard
from fedssl.config import RunConfig, TaskConfig
from fedssl.data.dataset import Dataset
from fedssl.data.histories import Histories, make_histories, take_users
from fedssl.data.synthetic import make_world, synthesize
from fedssl.privacy.keys import Keys
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.plan import make_plan
from fedssl.recipe import Recipe, make_recipe
from fedssl.server_round import ServerPhase, State, first_state
from fedssl.tasks import Chance, Task, UsersModel, Views
from fedssl.tasks.next_item import next_item
from fedssl.workers import Workers

KEYS = Keys(cohort=b"c" * 32, noise=b"n" * 32)
"""Known to everybody: for tests alone."""

SMALL: dict[str, Any] = {
    "encoder": {"width": 8, "blocks": 1, "heads": 2, "hidden": 8, "window": 10},
    "local": {"lr": 0.5, "grid_step": 2.0**-20},
    "server": {"rounds": 2, "cohort": 12, "lr": 0.01},
    "system": {"users_per_chunk": 4, "workers": 1, "checkpoint_seconds": 0},
}
PLAN: dict[str, Any] = {
    "server": {"sampling": "poisson"},
    "privacy": {"clip_norm": 0.5, "noise_multiplier": 1.0, "delta": 1e-3},
}


def small_config(*parts: dict[str, Any]) -> RunConfig:
    """`SMALL` with sections changed; later parts win, key by key."""
    values: dict[str, Any] = {}
    for part in (SMALL, *parts):
        for section, wanted in part.items():
            values[section] = {**values.get(section, {}), **wanted} if isinstance(wanted, dict) else wanted
    return RunConfig.model_validate(values)


@lru_cache(maxsize=8)
def small_dataset(users: int = 24, items: int = 40, seed: int = 3) -> Dataset:
    """Invented histories of 5 to items / 4 events."""
    world = make_world(items, seed, topics=4)
    histories, catalogue = make_histories(synthesize(users=users, items=items, seed=seed, mean_events=items / 5, world=world))
    return Dataset(histories, catalogue, "", {})


def dataset_of(*histories: Sequence[int], num_items: int) -> Dataset:
    """A data set written out: a list of rows a user."""
    cuts = np.concatenate([[0], np.cumsum([len(rows) for rows in histories])]).astype(np.int64)
    items = np.concatenate([np.asarray(rows, dtype=np.int32) for rows in histories])
    names = tuple(f"u{number}" for number in range(len(histories)))
    return Dataset(Histories(items, cuts, None, names), Catalogue(tuple(f"i{row}" for row in range(1, num_items + 1))), "", {})


def recipe_of(config: RunConfig, dataset: Dataset) -> Recipe:
    return make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash)


def deal(config: RunConfig, dataset: Dataset, pieces: Sequence[NDArray[np.int64]], heads: Path | None = None) -> dict[int, Shard]:
    """Shards 1, 2, ... of these users."""
    system, pool = config.system, Workers(config.system.workers)
    return {
        node: Shard(take_users(dataset.histories, users), users, heads / f"{node}" if heads else None, users_per_chunk=system.users_per_chunk, pool=pool)
        for node, users in enumerate(pieces, start=1)
    }


def train(
    config: RunConfig,
    dataset: Dataset,
    *,
    shards: int | Sequence[NDArray[np.int64]] = 1,
    folder: Path | None = None,
    grid: type[InProcessGrid] = InProcessGrid,
    tamper: Callable[[Handler], Handler] = lambda handler: handler,
    threads: int = 1,
    phases: Sequence[ServerPhase] | None = None,
    state: State | None = None,
    on_round: Callable[[State, RoundFacts], None] = lambda state, facts: None,
    should_stop: Callable[[], bool] = lambda: False,
    **changes: Any,
) -> tuple[State, list[RoundFacts]]:
    """The server's loop over a Grid in this process, without a run folder; `KEYS` and a ledger in ``folder`` under a plan."""
    histories, recipe = dataset.histories, recipe_of(config, dataset)
    pieces = np.array_split(np.arange(histories.num_users), shards) if isinstance(shards, int) else shards
    nodes = deal(config, dataset, pieces, folder / "heads" if folder else None)
    node_ids, owner_U = owners({node: shard.users for node, shard in nodes.items()}, histories.num_users)
    plan = make_plan(config.privacy, config.server, config.counts, histories.num_users, local=config.local)
    run = Run("test", recipe, histories.num_users, node_ids, owner_U)
    if plan is not None:
        assert folder is not None, "a plan needs a folder for its ledger"
        run = replace(run, plan=plan, keys=KEYS, ledger=Ledger(folder / "ledger.jsonl"))
    run = replace(run, **changes)
    seen: list[RoundFacts] = []

    def note(state: State, facts: RoundFacts) -> None:
        seen.append(facts)
        on_round(state, facts)

    with grid(tamper(handler_of(nodes)), {node: {"partition-id": node} for node in nodes}, threads=threads, window=max(2, threads)) as opened:
        return run_rounds(opened, run, state or first_state(recipe), on_round=note, should_stop=should_stop, phases=phases), seen


def learned(folder: Path) -> dict[str, bytes]:
    """All that a run learned, byte for byte: weights, optimiser memory, counts of the newest checkpoint, and heads."""
    newest = max((folder / "checkpoints").glob("round-*"))
    files = [*newest.glob("*.safetensors"), *(folder / "heads").glob("*/user-vector.f32")]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(files)}


def far_apart(left: State, right: State) -> float:
    """Largest difference of two states' weights, relative to the largest weight."""
    return float((left.weights_P - right.weights_P).abs().max() / left.weights_P.abs().max())


BOMB = 40
"""An item that makes the loss of whoever met it nan, under `next_item_with_a_bomb`."""


def next_item_with_a_bomb(config: TaskConfig, *, num_items: int) -> Task:
    """A task for `[[task]] name = "small:next_item_with_a_bomb"`."""
    plain = next_item(config, num_items=num_items)

    def draw(windows: NDArray[np.int64], chance: Chance) -> Views:
        return plain.draw(windows, chance)

    def loss(model: UsersModel, sequences: Any) -> Any:
        has_bomb_U = (sequences["read"] == BOMB).any(-1).any(-1)
        return plain.loss(model, sequences) * has_bomb_U.float().mul(float("nan")).where(has_bomb_U, has_bomb_U.new_ones(()).float())

    return Task(draw, loss)
