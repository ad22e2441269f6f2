"""Items and people not met before: a tenth of the items and a tenth of the people are kept from training, with and without features of items.

The federation trains on what is left, with the catalogue that is left. Then the model is carried over to the whole catalogue, as where new items
arrive (`fedssl.transfer`), and ranks everybody's held-out items among all items, those never met included. Histories that are read hold no item
that was kept away, with the target's exception. Both models of a seed are compared on the same targets.

    fedssl data embed ml-100k.item.gz features.safetensors
    python simulations/benchmarks/cold_items.py ml-100k --features features.safetensors --seed 1 2 3
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import results
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run
from numpy.typing import NDArray
from paired import clustered_interval

from fedssl.catalogue import Catalogue
from fedssl.checkpoints import Checkpoint
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset, load_dataset
from fedssl.data.features_file import hash_of
from fedssl.data.histories import HeldFrom, Histories
from fedssl.evaluation import Scorer, evaluate
from fedssl.recipe import make_recipe
from fedssl.recommender import Recommender
from fedssl.transfer import carried_over

SHARE = 0.1
"""Of items, and of people, that are kept from training."""
FEW = 5
"""Newest events that are read of a history cut short."""
BEYOND = 11.0
"""All ranks behind the tenth are one: neither HR@10 nor NDCG@10 tells them apart."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="ml-100k")
    parser.add_argument("--features", required=True, help="what `fedssl data embed` wrote")
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--again", action="store_true", help="run seeds that are there already")
    arguments = parser.parse_args()
    overrides = [*arguments.overrides, f"data.features={arguments.features}", "counts=none", "evaluation.every=0"]
    dataset = load_dataset(read_run(arguments.preset, overrides).data)
    rows = []
    for seed in arguments.seed:
        config = read_run(arguments.preset, overrides, seed=seed)
        chosen = config.model_dump(mode="json", exclude={"system", "evaluation", "seed", "data"}, exclude_defaults=True)
        settings = results.settings_hash({"config": chosen, "data": dataset.histories.fingerprint, "features": hash_of(dataset.features), "share": SHARE})
        row = None if arguments.again else results.newest("cold_items", settings=settings, seed=seed)
        if row is None:
            began = time.perf_counter()
            groups = both_models(config, dataset)
            seconds = time.perf_counter() - began
            about = {"preset": arguments.preset, "seed": seed, "settings": settings, "rows_left_out": config.server.rows_left_out, "seconds": seconds}
            row = results.append("cold_items", {**about, "groups": groups})
        rows.append(row)
        print(f"seed {seed}: {row['seconds']:.0f} s", flush=True)
    print(table(rows))


def both_models(config: RunConfig, dataset: Dataset) -> dict[str, list[list[float]]]:
    """For each group of targets: [user, rank without features, rank with them], ranks `unseen`, those behind the tenth as `BEYOND`."""
    known, whole, is_new_item, is_new_user = parted(dataset, config.seed)
    found = []
    for has_features in (False, True):
        model = trained(config, known if has_features else replace(known, features=None), whole if has_features else replace(whole, features=None))
        found.append({(split, few): evaluated(model, whole, split, few=few) for split in ("validation", "test") for few in (False, True)})
    ranks = {key: np.stack([found[0][key][0][0], found[0][key][1], found[1][key][1]], axis=1) for key in found[0]}
    users, targets = ({key: found[0][key][0][place] for key in found[0]} for place in (0, 1))
    is_new = {key: is_new_item[targets[key]] for key in targets}
    is_cold = {key: is_new_user[users[key]] for key in users}
    both = [(split, False) for split in ("validation", "test")]
    test, short = ("test", False), ("test", True)
    groups = {
        "items not met in training": np.concatenate([ranks[key][is_new[key] & ~is_cold[key]] for key in both]),
        "items met in training": ranks[test][~is_new[test] & ~is_cold[test]],
        "people not met in training": np.concatenate([ranks[key][~is_new[key] & is_cold[key]] for key in both]),
        f"the newest {FEW} events alone": ranks[short][~is_new[short] & ~is_cold[short]],
    }
    return {name: found_N3.tolist() for name, found_N3 in groups.items()}


def parted(dataset: Dataset, seed: int) -> tuple[Dataset, Dataset, NDArray[np.bool_], NDArray[np.bool_]]:
    """What is trained on, with the catalogue of that; what is tested on; which rows (I + 1,) and which users (U,) are new then."""
    histories, num_items = dataset.histories, dataset.catalogue.num_items
    rng = np.random.default_rng(seed)
    is_new_item = np.zeros(num_items + 1, dtype=bool)
    is_new_item[1 + rng.permutation(num_items)[: round(SHARE * num_items)]] = True
    is_new_user = np.zeros(histories.num_users, dtype=bool)
    is_new_user[rng.permutation(histories.num_users)[: round(SHARE * histories.num_users)]] = True
    # Validation and test targets are told by a time of their own, so that they stay the last events whatever is taken from before them.
    period = np.zeros(histories.num_events)
    period[histories.target_places("validation")], period[histories.target_places("test")] = 1.0, 2.0
    owner = np.repeat(np.arange(histories.num_users), histories.lengths)
    is_new = is_new_item[histories.items]
    whole = replace(dataset, histories=_kept(histories, owner, period, ~is_new | (period > 0)))
    left = np.flatnonzero(~is_new_item[1:])
    tokens = tuple(dataset.catalogue.tokens[place] for place in left)
    row_of = np.cumsum(~is_new_item) - 1
    of_known = _kept(histories, owner, period, ~is_new & ~is_new_user[owner])
    of_known = replace(of_known, items=row_of[of_known.items].astype(np.int32))
    features = None if dataset.features is None else dataset.features[left]
    return replace(whole, histories=of_known, catalogue=Catalogue(tokens), features=features), whole, is_new_item, is_new_user


def _kept(histories: Histories, owner: NDArray[np.int64], period: NDArray[np.float64], is_kept: NDArray[np.bool_]) -> Histories:
    cuts = np.concatenate([[0], np.cumsum(np.bincount(owner[is_kept], minlength=histories.num_users))]).astype(np.int64)
    return Histories(histories.items[is_kept], cuts, period[is_kept], histories.names, HeldFrom(1.0, 2.0))


def trained(config: RunConfig, known: Dataset, whole: Dataset) -> Recommender:
    """A model of the known part, carried over to the whole catalogue."""
    with TemporaryDirectory() as folder:
        run = simulate(config, out=Path(folder) / "run", dataset=known)
    recipe = make_recipe(config, num_items=whole.catalogue.num_items, catalogue=whole.catalogue.hash, features=hash_of(whole.features))
    state = carried_over(Checkpoint(run.state, run.recipe, known.catalogue, "", ""), recipe, whole.catalogue, whole.features)
    return Recommender(recipe, state.released(recipe))


def evaluated(model: Recommender, whole: Dataset, split: Any, *, few: bool) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]:
    """Users and targets, and the targets' ranks `unseen` by the whole history, or by its newest events alone."""
    cut: Scorer = (lambda histories, users: model([rows[-FEW:] for rows in histories], users)) if few else model
    ranks = evaluate(cut, whole.histories, split, ks=(10,))
    return (ranks.users, ranks.targets), np.minimum(ranks.unseen["score"], BEYOND)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of all seeds as Markdown, a line a group of targets."""
    lines = ["| targets | of all seeds | HR@10 without | with | NDCG@10 without | with | difference, 95 % interval |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells(rows, name))} |" for name in rows[0]["groups"])])


def cells(rows: list[dict[str, Any]], name: str) -> list[str]:
    """A group's numbers over all seeds; the interval is that of the paired difference of NDCG@10 over people, each with all targets of all seeds."""
    found = np.concatenate([row["groups"][name] for row in rows])
    users, pairs = found[:, 0].astype(int), found[:, 1:]
    hits, gains = pairs <= 10, np.where(pairs <= 10, 1 / np.log2(1 + pairs), 0.0)
    low, high = clustered_interval(gains[:, 1] - gains[:, 0], users)
    without, with_them = gains.mean(0)
    numbers = [f"{number:.4f}" for number in (*hits.mean(0), without, with_them)]
    return [f"{len(pairs):,}", *numbers, f"{with_them - without:+.4f} ({low:+.4f} to {high:+.4f})"]


if __name__ == "__main__":
    main()
