"""Two recommenders on the same users: their runs, and how much better one is, with an interval for other users of the same kind.

A recommender is as many runs as there are seeds, each a row of results/paired_runs.jsonl with the ranks of the test's targets; a row that is
there with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import results
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run
from numpy.typing import NDArray

from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset, load_dataset
from fedssl.data.histories import Histories
from fedssl.evaluation import evaluate
from fedssl.intervals import LEVEL
from fedssl.round_lines import read_lines

Floats = NDArray[np.float64]
DRAWS = 2000
CURVE = 20
"""Validations of a run on the way."""


def arguments_of(about: str | None, *, one: str) -> argparse.Namespace:
    """The command line of a comparison: preset, seeds, settings, which ``one`` alone, and where runs are kept."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="ml-100k")
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--only", action="append", default=[], help=f"{one}; may be repeated")
    parser.add_argument("--lr", type=float, nargs="+", default=[], help="learning rates that every arm tries; its best on the validation event counts")
    parser.add_argument("--newest", type=int, default=0, help="keep so many newest events of each user, the two held out among them; 0: all")
    parser.add_argument("--runs", type=Path, help="folder in which runs are kept, and go on where they were stopped")
    return parser.parse_args()


def data_of(arguments: argparse.Namespace) -> tuple[str, Dataset]:
    """What the comparison is on, in words and as data: the preset's, or each user's newest events of it."""
    dataset = load_dataset(read_run(arguments.preset, arguments.overrides).data)
    if not arguments.newest:
        return arguments.preset, dataset
    histories = dataset.histories
    lengths = np.minimum(histories.lengths, arguments.newest)
    ends = np.repeat(histories.cuts[1:], lengths)
    cuts = np.concatenate([[0], np.cumsum(lengths)])
    kept = ends - np.repeat(cuts[1:], lengths) + np.arange(cuts[-1])
    times = None if histories.times is None else histories.times[kept]
    cut = Histories(histories.items[kept], cuts, times, histories.names, histories.held_from)
    return f"{arguments.preset}, newest {arguments.newest}", replace(dataset, histories=cut)


def row_of(name: str, preset: str, config: RunConfig, dataset: Dataset, runs: Path | None) -> dict[str, Any]:
    """The row of one run, from the file or from the run. ``runs``: a folder in which runs are kept, and go on where they were stopped."""
    evaluation = config.evaluation.model_copy(update={"every": max(config.server.rounds // CURVE, 1)})
    config, histories = config.model_copy(update={"evaluation": evaluation}), dataset.histories
    chosen = config.model_dump(mode="json", exclude={"system"}, exclude_defaults=True)
    settings = results.settings_hash({"config": chosen, "data": histories.fingerprint})
    row = results.newest("paired_runs", settings=settings)
    if row is None:
        began = time.process_time()
        with TemporaryDirectory() as folder:
            out = (Path(folder) if runs is None else runs) / settings
            run = simulate(resume=out, dataset=dataset) if out.exists() else simulate(config, out=out, dataset=dataset)
            lines = [line for line in read_lines(run.folder / "metrics.jsonl") if "validation" in line]
            test = evaluate(run.model, histories, "test")
        found = {
            "rounds": config.server.rounds,
            "cpu_seconds": round(time.process_time() - began, 1),
            "validation": run.report["validation"],
            "test": run.report["test"],
            "curve": [[line["round"], line["validation"]["unseen"]["ndcg@10"]] for line in lines],
            "users": test.users.tolist() if len(test.users) != histories.num_users else None,
            "ranks": test.unseen[next(iter(test.unseen))].tolist(),
        }
        row = results.append("paired_runs", {"preset": preset, "name": name, "seed": config.seed, "settings": settings, **found})
    validation, test_too = (row[split]["unseen"]["ndcg@10"] for split in ("validation", "test"))
    print(f"{preset}, {name}, seed {row['seed']}: unseen, validation {validation:.4f}, test {test_too:.4f}; {row['cpu_seconds']:.0f} s of CPU", flush=True)
    return row


def arm_of(
    name: str, preset: str, configs: list[RunConfig], dataset: Dataset, arguments: argparse.Namespace
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """An arm's rows, one a seed, at the rate of ``--lr`` that validates best over the seeds; and what was tried, None where nothing was."""
    if not arguments.lr:
        return None, [row_of(name, preset, config, dataset, arguments.runs) for config in configs]
    tried = {}
    for rate in arguments.lr:
        print(f"learning rate {rate:g}")
        with_rate = [config.model_copy(update={"server": config.server.model_copy(update={"lr": rate})}) for config in configs]
        tried[rate] = [row_of(name, preset, config, dataset, arguments.runs) for config in with_rate]
    validated = {rate: float(np.mean([row["validation"]["unseen"]["ndcg@10"] for row in rows])) for rate, rows in tried.items()}
    best = max(validated, key=lambda rate: validated[rate])
    return {"best": best, "validated": {f"{rate:g}": value for rate, value in validated.items()}}, tried[best]


def ranks_of(rows: list[dict[str, Any]]) -> Floats:
    """Ranks among the unseen of the test's targets: a row a seed, a column a user."""
    return np.array([row["ranks"] for row in rows])


def ndcg(ranks_SU: Floats) -> float:
    """NDCG@10 over users and seeds. ``ranks_SU``: a row a seed, a column a user."""
    return float(np.where(ranks_SU <= 10, 1 / np.log2(1 + ranks_SU), 0.0).mean())


def worst_tenth(ranks_SU: Floats) -> float:
    """Mean of 1 / rank over the tenth of users (rounded up) whose targets rank last, each seed's own tenth."""
    number = -(-ranks_SU.shape[1] // 10)
    worst = np.partition(ranks_SU, ranks_SU.shape[1] - number, axis=1)[:, -number:]
    return float((1 / worst).mean())


def gain(statistic: Callable[[Floats], float], before_SU: Floats, after_SU: Floats) -> dict[str, Any]:
    """How much larger a statistic of ``after_SU`` is, as a share of that of ``before_SU``: its value, interval of 95 %, and least and most of the seeds.

    The interval is the percentile bootstrap's over users, who are drawn with all their ranks: before and after, of all seeds.
    """
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        users = rng.integers(0, before_SU.shape[1], before_SU.shape[1])
        drawn.append(statistic(after_SU[:, users]) / max(statistic(before_SU[:, users]), 1e-12) - 1)
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    first, second = statistic(before_SU), statistic(after_SU)
    seeds = [statistic(a[None]) / statistic(b[None]) - 1 for b, a in zip(before_SU, after_SU, strict=True)]
    return {"before": first, "after": second, "gain": second / first - 1, "interval": [float(low), float(high)], "seeds": [min(seeds), max(seeds)]}


def clustered_interval(values_n: Floats, users_n: NDArray[np.int64]) -> tuple[float, float]:
    """The interval of 95 % for the mean of ``values_n``, of which ``users_n`` says whose each is: a user is drawn with all that is theirs."""
    _, place_n = np.unique(users_n, return_inverse=True)
    number_U, sum_U = np.bincount(place_n), np.bincount(place_n, weights=values_n)
    drawn_dU = np.random.default_rng(0).multinomial(len(number_U), np.full(len(number_U), 1 / len(number_U)), size=DRAWS)
    low, high = np.quantile(drawn_dU @ sum_U / (drawn_dU @ number_U), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def said(found: dict[str, Any]) -> str:
    """A gain in words."""
    (low, high), (least, most) = found["interval"], found["seeds"]
    return f"{found['before']:.4g} to {found['after']:.4g}: {found['gain']:+.1%} ({low:+.1%} to {high:+.1%}; seeds {least:+.1%} to {most:+.1%})"
