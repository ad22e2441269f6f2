"""Ways of learning under user-level privacy, side by side: the same people, the same promise, step sizes of the few tried that validated best.

Rounds from nothing are `simulate` runs with fresh keys, and so are the counts and the encoder distilled from them (those alone: private_counts.py).
A table of items made of other parameters (of features, of two factors), a start from given vectors and a table that is frozen are not in the
engine, because none comes near the counts: they are rounds written out here, with the engine's local training, plan and
server optimisers, in floats, cohorts and noise from numpy's generator. Rounds on top of counts share one release an epsilon and key.
Rows are appended to results/private_learning.jsonl as they finish; what is there with the same settings is not run again.

    python simulations/benchmarks/private_learning.py         (needs ml-1m.inter.gz and ml-1m.item.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import results
import torch
from fedssl_simulations.run import Run, simulate
from fedssl_simulations.run_files import read_run
from quality import pair
from torch import Tensor

from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset, load_dataset
from fedssl.data.features import item_features
from fedssl.evaluation import evaluate
from fedssl.local_training import make_batch, train_users
from fedssl.parts import initial_weights, make_parts
from fedssl.privacy.accounting import combined_noise
from fedssl.privacy.plan import Plan, make_plan
from fedssl.recipe import make_recipe
from fedssl.recommender import Recommender
from fedssl.server_optimizers import average_late, learning_rate
from fedssl.weights import ITEMS, Weights, flatten, layout_of, unflatten

USERS_AT_ONCE = 32
ROUNDS = (
    "counts=none",
    "distillation=none",
    "encoder.width=32",
    "encoder.blocks=1",
    "encoder.heads=1",
    "encoder.hidden=64",
    "encoder.window=50",
    "task.0.negatives=256",
    "local.reduction=sum",
    "server.rounds=25",
    "server.cohort=1510",
    "server.lr=0.01",
    "privacy.clip_norm=0.25",
)
ON_TOP = ("server.rounds=25", "server.cohort=1510", "task.0.negatives=256", "local.reduction=sum", "privacy.clip_norm=0.25", "server.optimizer=sgd")
AVERAGED = ("server.optimizer=sgd", "server.lr=2.0", "server.schedule=constant", "server.average_from=10")


class Way(NamedTuple):
    """``settings`` over the preset of that epsilon; ``table``: what items are made of where the engine cannot; "": the engine's run."""

    settings: tuple[str, ...]
    table: str = ""


WAYS: dict[str, Way] = {
    "rounds: whole table from nothing": Way(ROUNDS),
    "rounds: small encoder (width 8, no block)": Way((*ROUNDS, "encoder.width=8", "encoder.blocks=0", "encoder.hidden=8", "server.lr=0.02")),
    "rounds: three local steps": Way((*ROUNDS, "local.steps=3", "local.lr=0.5")),
    "rounds: large cohorts, few rounds": Way((*ROUNDS, "server.rounds=8", "server.cohort=6040", "server.lr=0.03")),
    "rounds: momentum, mean of late rounds": Way((*ROUNDS, *AVERAGED)),
    "rounds: public warm start (vectors from features)": Way(ROUNDS, "warm start"),
    "rounds: factored table (rank 8)": Way((*ROUNDS, "server.lr=0.03"), "factors"),
    "rounds: frozen features, learned projection": Way((*ROUNDS, "server.lr=0.03"), "features"),
    "counts, distilled, then rounds on all weights": Way((*ON_TOP, "server.lr=0.2"), "whole"),
    "counts, distilled, then rounds, table frozen": Way((*ON_TOP, "server.lr=0.5"), "frozen"),
    "counts, distilled, then rounds on gains and biases": Way((*ON_TOP, "server.lr=1.0"), "frozen, gains"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="ways whose name holds this; may be repeated")
    parser.add_argument("--epsilon", type=int, nargs="+", default=[8, 2])
    parser.add_argument("--keys", type=int, default=1, help="how many fresh pairs of keys")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    dataset = load_dataset(read_run("ml-1m-private-8").data)
    for epsilon, key in itertools.product(arguments.epsilon, range(1, arguments.keys + 1)):
        released: dict[str, Run] = {}
        for name, way in WAYS.items():
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            config = read_run(f"ml-1m-private-{epsilon}", [*way.settings, *arguments.overrides])
            chosen = config.model_dump(mode="json", exclude={"system"}, exclude_defaults=True)
            settings = results.settings_hash({"config": chosen, "table": way.table, "data": dataset.histories.fingerprint})
            row = results.newest("private_learning", way=name, settings=settings, key=key)
            if row is None:
                began = time.perf_counter()
                found = rounds_written_out(config, dataset, way.table, released) if way.table else _of_run(config, dataset)
                about = {"way": name, "epsilon": epsilon, "settings": settings, "key": key, "seconds": time.perf_counter() - began}
                row = results.append("private_learning", {**about, **found})
            _show(row)


def _show(row: dict[str, Any]) -> None:
    parts = "".join(f"; {name} alone {pair(found)}" for name, found in row["test"].get("parts", {}).items())
    found = f"test {pair(row['test'])}{parts}; validation {pair(row['validation'])}"
    print(f"{row['way']}, epsilon {row['privacy']['epsilon']:.3f}: {found}; {row['seconds']:.0f} s", flush=True)


def _of_run(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        report = simulate(config, out=Path(folder) / "run", dataset=dataset).report
    return {"privacy": _promise(report["privacy"]), **{name: report["researcher_only"][name] for name in ("validation", "test")}}


def _promise(stated: dict[str, Any]) -> dict[str, Any]:
    return {name: stated[name] for name in ("unit", "neighbours", "trust", "sampling", "accountant", "epsilon", "delta", "noise_multiplier", "clip_norm")}


class Table(NamedTuple):
    """How item vectors are made of parameters, but for the padding's.

    ``slopes(params, rows_UK, slope_UKD)``: what users' slopes at rows say of the parameters, each with users as its first axis.
    """

    params: Weights
    items: Callable[[Weights], Tensor]
    slopes: Callable[[Weights, Tensor, Tensor], Weights]


def make_table(name: str, weights: Weights, dataset: Dataset) -> Table:
    """Parameters of their own instead of the (I + 1, D) item vectors of ``weights``."""
    items_ID = weights[ITEMS]
    chance = torch.Generator().manual_seed(1)
    features_IF = torch.nn.functional.pad(torch.from_numpy(item_features(dataset.catalogue)), (0, 0, 1, 0))
    features_IF = features_IF / features_IF.norm(dim=1, keepdim=True).clamp(min=1e-6)
    D = items_ID.shape[1]
    if name.startswith("frozen"):
        return Table({}, lambda params: items_ID, lambda params, rows, slope: {})
    if name == "features":
        # A frozen vector an item: its attributes; the projection is all that is learned of the table.
        projection_FD = torch.randn(features_IF.shape[1], D, generator=chance) * 0.05
        return Table(
            {"projection": projection_FD},
            lambda params: features_IF @ params["projection"],
            lambda params, rows_UK, slope_UKD: {"projection": features_IF[rows_UK].transpose(1, 2) @ slope_UKD},
        )
    if name == "factors":
        left_IR, right_RD = torch.randn(len(items_ID), 8, generator=chance) * 0.1, torch.randn(8, D, generator=chance) * 0.2
        left_IR[0] = 0.0
        return Table(
            {"left": left_IR, "right": right_RD},
            lambda params: params["left"] @ params["right"],
            lambda params, rows_UK, slope_UKD: {
                "left": _scatter(rows_UK, slope_UKD @ params["right"].T, len(items_ID)),
                "right": params["left"][rows_UK].transpose(1, 2) @ slope_UKD,
            },
        )
    # What is public at a warm start is the catalogue alone: films of like genres and years begin with like vectors.
    random_FD = torch.randn(features_IF.shape[1], D, generator=chance) * 0.05
    return Table(
        {"rows": items_ID if name == "whole" else features_IF @ random_FD + items_ID * 0.2},
        lambda params: params["rows"],
        lambda params, rows_UK, slope_UKD: {"rows": _scatter(rows_UK, slope_UKD, len(items_ID))},
    )


def vectors(table: Table, params: Weights) -> Tensor:
    """The item vectors, zero for the padding, whatever noise its parameters got. Shape: (I + 1, D)."""
    return torch.nn.functional.pad(table.items(params)[1:], (0, 0, 1, 0))


def _scatter(rows_UK: Tensor, values_UKD: Tensor, items: int) -> Tensor:
    total = torch.zeros(len(rows_UK), items, values_UKD.shape[-1])
    return total.scatter_add_(1, rows_UK[..., None].expand_as(values_UKD), values_UKD)


def rounds_written_out(config: RunConfig, dataset: Dataset, name: str, released: dict[str, Run]) -> dict[str, Any]:
    """The training rounds of ``config`` over a table of its own parameters, or on top of what counts released; ``released`` keeps that."""
    histories = dataset.histories
    plan = make_plan(config.privacy, config.server, config.counts, histories.num_users)
    assert plan is not None
    recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash)
    if config.counts is None:
        first, counts = initial_weights(recipe), None
    else:
        settings = f"{plan.phase('counts')} {config.distillation}"
        if settings not in released:
            released[settings] = _released_before(config, plan, dataset)
        before = released[settings]
        first, counts = before.state.weights(before.recipe), before.state.counts
    table = make_table(name, first, dataset)
    body = {leaf: value for leaf, value in first.items() if leaf != ITEMS}
    is_trained = {leaf: name != "frozen, gains" or leaf.endswith((".gain", ".bias")) for leaf in body}
    weights = train(config, plan, histories, body, table, is_trained)
    model = Recommender(recipe, weights, counts)
    found = {split: evaluate(model, histories, split, ks=config.evaluation.ks).summary() for split in ("validation", "test")}
    charged = {phase.phase: phase.rounds for phase in plan.phases}
    return {"privacy": _promise({**plan.statement(), "epsilon": plan.epsilon(charged)}), **found}


def _released_before(config: RunConfig, plan: Plan, dataset: Dataset) -> Run:
    """Counts and distillation with the noise that the whole run's plan gives them."""
    noise = combined_noise([plan.phase(name).noise_multiplier for name in ("popularity", "counts")])
    privacy = config.privacy.model_copy(update={"epsilon": None, "noise_multiplier": 1.0, "counts_noise_multiplier": noise})
    counted = config.model_copy(update={"privacy": privacy, "server": config.server.model_copy(update={"rounds": 0})})
    with TemporaryDirectory() as folder:
        return simulate(counted, out=Path(folder) / "run", dataset=dataset)


def train(config: RunConfig, plan: Plan, histories: Any, body: Weights, table: Table, is_trained: dict[str, bool]) -> Weights:
    """Rounds of user-level private SGD over the body's trained leaves and the table's parameters together: clipped as one update, noised as one sum."""
    recipe_parts = make_parts(make_recipe(config, num_items=len(table.items(table.params)) - 1, catalogue=""))
    layout = layout_of({**{leaf: value for leaf, value in body.items() if is_trained[leaf]}, **table.params})
    flat_P = flatten({**body, **table.params}, layout)
    update = plan.sum("training", "update")
    assert update.clip_norm is not None
    memory, average_P, chance = recipe_parts.optimizer.init(layout.num_weights), None, np.random.default_rng()
    phase = plan.phase("training")
    for number in range(1, config.server.rounds + 1):
        values = unflatten(flat_P, layout)
        weights = {**body, **values, ITEMS: vectors(table, values)}
        chosen = np.flatnonzero(chance.random(histories.num_users) < phase.rate)
        chosen = chosen[np.argsort(-np.diff(histories.cuts)[chosen], kind="stable")]
        total_P = torch.zeros(layout.num_weights, dtype=torch.float64)
        for begin in range(0, len(chosen), USERS_AT_ONCE):
            users = chosen[begin : begin + USERS_AT_ONCE]
            batch = make_batch(
                recipe_parts.tasks,
                histories,
                users,
                users,
                base=(config.seed, "training", number),
                local=config.local,
                window=config.encoder.window,
                num_items=len(weights[ITEMS]) - 1,
            )
            here = {leaf: value for leaf, value in weights.items() if leaf not in table.params}
            trained = train_users(recipe_parts.encoder, recipe_parts.tasks, here, batch, local=config.local, window=config.encoder.window)
            assert trained.rows_UK is not None, "these ways draw negatives"
            parts = {**trained.update, **table.slopes(values, trained.rows_UK, trained.items)}
            update_UP = torch.cat([parts[leaf].reshape(len(users), -1) for leaf in layout.names], 1)
            shorten_U = (update.clip_norm / update_UP.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)
            total_P += (shorten_U @ update_UP).double()
        total_P += torch.from_numpy(chance.normal(0.0, update.noise_multiplier * update.clip_norm, layout.num_weights))
        mean_P = (total_P / phase.expected_cohort).float()
        flat_P, memory = recipe_parts.optimizer.step(flat_P, mean_P, memory, learning_rate(config.server, number), number)
        average_P = average_late(config.server, average_P, flat_P, number)
    values = unflatten(flat_P if average_P is None else average_P, layout)
    return {**body, **{leaf: value for leaf, value in values.items() if leaf not in table.params}, ITEMS: vectors(table, values)}


if __name__ == "__main__":
    main()
