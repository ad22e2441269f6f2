"""Recommendation quality, federated beside central and the recommenders that only count: same data, same protocol.

Each federated number is one `simulate` run through Upload, integer sums and Grid. Rows are appended to
results/quality.jsonl as they finish; a row that is there with the same settings is not run again (--again runs all).

    python simulations/benchmarks/quality.py ml-1m         (needs ml-1m.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import results
from fedssl_simulations.baselines import run_baselines
from fedssl_simulations.run import Progress, simulate
from fedssl_simulations.run_files import read_run

from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset, load_dataset

EQUAL = "federated, equal weights"
EQUAL_SUM = "federated, equal weights, summed loss"
FEDERATED = "federated, weights by positions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="ml-1m")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--only", action="append", default=[], help="this row alone; may be repeated")
    parser.add_argument("--again", action="store_true", help="run rows that are there already")
    arguments = parser.parse_args()
    config = read_run(arguments.preset, arguments.overrides, seed=arguments.seed)
    dataset = load_dataset(config.data)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda name=name: run_baselines(config, dataset, names=(name,))[name]  # type: ignore[misc]
        for name in ("popularity", "markov", "log-lift counts", "each alone", "central")
    }
    jobs[FEDERATED] = lambda: federated(config, dataset)
    jobs[EQUAL] = lambda: federated(config.model_copy(update={"server": config.server.model_copy(update={"weighting": "equal"})}), dataset)
    summed = {
        "server": config.server.model_copy(update={"weighting": "equal"}),
        "local": config.local.model_copy(update={"reduction": "sum"}),
    }
    jobs[EQUAL_SUM] = lambda: federated(config.model_copy(update=summed), dataset)
    chosen = config.model_dump(mode="json", exclude={"system", "evaluation"}, exclude_defaults=True)
    settings = results.settings_hash({"config": chosen, "data": dataset.histories.fingerprint})
    histories = dataset.histories
    print(f"{arguments.preset}: {histories.num_users:,} users, {dataset.catalogue.num_items:,} items, {histories.num_events:,} events; settings {settings}")
    print(f"{'NDCG@10, all / unseen':44s} {'validation':>17s} {'test':>17s} {'seconds':>8s}")
    for name, job in jobs.items():
        if arguments.only and name not in arguments.only:
            continue
        row = None if arguments.again else results.newest("quality", name=name, settings=settings, seed=config.seed)
        if row is None:
            began = time.perf_counter()
            found = job()
            row = results.append(
                "quality",
                {
                    "preset": arguments.preset,
                    "name": name,
                    "seed": config.seed,
                    "settings": settings,
                    "seconds": found.get("seconds", time.perf_counter() - began),
                    "validation": found["validation"],
                    "test": found["test"],
                    "about": found.get("about"),
                },
            )
        show(name, row)


def federated(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    def said(progress: Progress) -> None:
        if progress.validation is not None:
            found = progress.validation
            print(f"    round {progress.facts.round}: validation {pair(found)} loss {progress.facts.loss:.3f}", flush=True)

    with TemporaryDirectory() as folder:
        run = simulate(config, out=Path(folder) / "run", dataset=dataset, on_progress=said)
    cost = run.report["cost"]
    return {"validation": run.report["validation"], "test": run.report["test"], "seconds": cost["seconds"], "about": cost}


def show(name: str, row: Mapping[str, Any]) -> None:
    first, parts = row["validation"], row["validation"].get("parts", {})
    print(f"{name:44s} {pair(first):>17s} {pair(row['test']):>17s} {row['seconds']:8.1f}", flush=True)
    for part, found in parts.items():
        print(f"{'  its ' + part + ' alone':44s} {pair(found):>17s} {pair(row['test']['parts'][part]):>17s}", flush=True)


def pair(found: Mapping[str, Any]) -> str:
    return f"{found['all']['ndcg@10']:.4f} / {found['unseen']['ndcg@10']:.4f}"


if __name__ == "__main__":
    main()
