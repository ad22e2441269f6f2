"""Recommendation quality, federated beside central and the recommenders that only count: same data, same protocol.

Each federated number is one `simulate` run through Upload, integer sums and Grid. Rows are appended to
results/quality.jsonl as they finish; a row that is there with the same settings and seed is not run again (--again runs all).
A federated row keeps its curve: validations of 2,000 users on the way, with the rounds, seconds and bytes until then.

    python simulations/benchmarks/quality.py ml-1m --seed 1 2 3         (needs ml-1m.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import results
from fedssl_simulations.baselines import run_baselines
from fedssl_simulations.run import Progress, simulate
from fedssl_simulations.run_files import read_run

from fedssl.config import RunConfig, TaskConfig
from fedssl.data.dataset import Dataset, load_dataset
from fedssl.round_lines import read_lines

BASELINES = ("popularity", "markov", "log-lift counts", "each alone", "central")
CENTRAL_RATES = {"central, half the learning rate": 0.5, "central, twice the learning rate": 2.0}
"""Of the preset's rate, which was chosen for the federation: central training has trials of its own."""
FEDERATED = "federated, weights by positions"
EQUAL = "federated, equal weights"
EQUAL_SUM = "federated, equal weights, summed loss"
CONTRAST = "federated, weights by positions, with contrast"
HEAD = "federated, weights by positions, with a head"
MASKED = "federated, weights by positions, BERT4Rec and masked item"
MASKED_LONGER = "federated, weights by positions, BERT4Rec and masked item, three times the rounds"
PREVIOUS = "federated, weights by positions, with the previous item"
HISTORY = "federated, weights by positions, with the history's mean"
BOTH = "federated, weights by positions, with the previous item and the history's mean"
PLAIN = "federated, weights by positions, without the previous item"
CURVE = 12
"""Validations of a run, the one after the last round too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="ml-1m")
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--only", action="append", default=[], help="this row alone; may be repeated")
    parser.add_argument("--runs", type=Path, help="folder in which federated runs are kept, and where one that was stopped goes on")
    parser.add_argument("--again", action="store_true", help="run rows that are there already")
    arguments = parser.parse_args()
    dataset = load_dataset(read_run(arguments.preset, arguments.overrides).data)
    histories = dataset.histories
    for seed in arguments.seed:
        config = read_run(arguments.preset, arguments.overrides, seed=seed)
        chosen = config.model_dump(mode="json", exclude={"system", "evaluation", "seed"}, exclude_defaults=True)
        settings = results.settings_hash({"config": chosen, "data": histories.fingerprint})
        print(
            f"{arguments.preset}: {histories.num_users:,} users, {dataset.catalogue.num_items:,} items, {histories.num_events:,} events; "
            f"settings {settings}, seed {seed}"
        )
        print(f"{'NDCG@10, all / unseen':44s} {'validation':>17s} {'test':>17s} {'seconds':>8s}")
        for name, job in jobs(config, dataset, None if arguments.runs is None else arguments.runs / f"{settings}-{seed}").items():
            if arguments.only and name not in arguments.only:
                continue
            row = None if arguments.again else results.newest("quality", name=name, settings=settings, seed=seed)
            if row is None:
                began = time.perf_counter()
                found = job()
                found.setdefault("seconds", time.perf_counter() - began)
                row = results.append("quality", {"preset": arguments.preset, "name": name, "seed": seed, "settings": settings, **found})
            show(name, row)


def jobs(config: RunConfig, dataset: Dataset, runs: Path | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """How to get each row, by name. What the preset says stands, but for what the name says."""
    server, tasks = config.server, config.task
    mean = config.head.model_copy(update={"history": 3.0})
    equal = {"server": server.model_copy(update={"weighting": "equal"})}
    cloze = {"encoder": config.encoder.model_copy(update={"name": "bert4rec"}), "task": (TaskConfig(name="masked-item"),)}
    variants: dict[str, dict[str, Any]] = {
        FEDERATED: {"server": server.model_copy(update={"weighting": "positions"})},
        EQUAL: equal,
        EQUAL_SUM: {**equal, "local": config.local.model_copy(update={"reduction": "sum"})},
        CONTRAST: {"task": (*tasks, TaskConfig(name="contrastive", weight=0.1, negatives=8))},
        MASKED: cloze,
        MASKED_LONGER: {**cloze, "server": server.model_copy(update={"rounds": 3 * server.rounds})},
        HEAD: {"head": config.head.model_copy(update={"name": "user-vector"})},
        PREVIOUS: {"task": with_previous_item(tasks)},
        HISTORY: {"head": mean},
        BOTH: {"task": with_previous_item(tasks), "head": mean},
        PLAIN: {"task": without_previous_item(tasks)},
    }
    configs: dict[str, RunConfig] = {}
    for name, update in variants.items():
        chosen = config.model_copy(update=update)
        if chosen not in configs.values():  # a preset may have a part already
            configs[name] = chosen
    baselines = {name: lambda name=name: run_baselines(config, dataset, names=(name,))[name] for name in BASELINES}
    for name, factor in CENTRAL_RATES.items():
        other = config.model_copy(update={"server": server.model_copy(update={"lr": factor * server.lr})})
        baselines[name] = lambda other=other: run_baselines(other, dataset, names=("central",))["central"]
    made = {name: lambda name=name, chosen=chosen: federated(chosen, dataset, runs and runs / re.sub(r"[,' ]+", "-", name)) for name, chosen in configs.items()}
    return {**baselines, **made}


def with_previous_item(tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
    """The tasks with ``previous-item`` beside them, half the weight; where the first draws negatives, the two share them. As they are if they have it."""
    if without_previous_item(tasks) != tasks:
        return tasks
    first, *others = tasks
    beside = TaskConfig(name="previous-item", weight=0.5)
    if first.negatives:
        first = first.model_copy(update={"negatives": first.negatives // 2})
        beside = beside.model_copy(update={"negatives": first.negatives})
    return (first, *others, beside)


def without_previous_item(tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
    return tuple(task for task in tasks if task.name != "previous-item")


def federated(config: RunConfig, dataset: Dataset, kept: Path | None) -> dict[str, Any]:
    """One run: its validation and test, what it cost, and its curve. ``kept``: its folder; None: it leaves nothing."""
    every = max(config.server.rounds // CURVE, 1)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"every": every})})

    def said(progress: Progress) -> None:
        if progress.validation is not None:
            print(f"    round {progress.facts.round}: validation {pair(progress.validation)} loss {progress.facts.loss:.3f}", flush=True)

    with TemporaryDirectory() as folder:
        out = Path(folder) / "run" if kept is None else kept
        if out.exists():
            run = simulate(resume=out, dataset=dataset, on_progress=said)
        else:
            run = simulate(config, out=out, dataset=dataset, on_progress=said)
        lines = read_lines(out / "metrics.jsonl")
    cost = run.report["cost"]
    sent_a_round = cost["upload_bytes_per_user"] * config.server.cohort / dataset.histories.num_users
    curve, seconds = [], 0.0
    for line in lines:
        seconds += line["seconds"]
        if "validation" in line:
            found = {which: line["validation"][which]["ndcg@10"] for which in ("all", "unseen")}
            curve.append({"round": line["round"], "seconds": round(seconds, 3), "upload_bytes_a_user": round(sent_a_round * line["round"]), **found})
    return {"validation": run.report["validation"], "test": run.report["test"], "seconds": cost["seconds"], "about": cost, "curve": curve}


def show(name: str, row: Mapping[str, Any]) -> None:
    first, parts = row["validation"], row["validation"].get("parts", {})
    print(f"{name:44s} {pair(first):>17s} {pair(row['test']):>17s} {row['seconds']:8.1f}", flush=True)
    for part, found in parts.items():
        print(f"{'  its ' + part + ' alone':44s} {pair(found):>17s} {pair(row['test']['parts'][part]):>17s}", flush=True)


def pair(found: Mapping[str, Any]) -> str:
    return f"{found['all']['ndcg@10']:.4f} / {found['unseen']['ndcg@10']:.4f}"


if __name__ == "__main__":
    main()
