"""What a task beside next item is worth: runs with and without it on the same seeds, compared user by user.

Runs are rows of results/paired_runs.jsonl and are not run again. A comparison, a row of results/task_gains.jsonl, says how NDCG@10 `unseen` of
the test differs, for all and for users with short histories, and after how many rounds a run validates as well as 95 % of what next
item alone reaches in the end.

    python simulations/benchmarks/tasks.py ml-100k --seed 1 2 3 [--newest 11]       (needs ml-100k.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import results
from fedssl_simulations.run_files import read_run
from paired import arguments_of, arm_of, data_of, gain, ndcg, ranks_of, said
from quality import with_previous_item, without_previous_item

from fedssl.config import RunConfig, TaskConfig
from fedssl.data.dataset import Dataset
from fedssl.evaluation import SHORT_HISTORY

ALONE = "next item"
LONGER = "next item, 1.6 times the rounds"
"""About as many seconds as two tasks take."""
PREVIOUS = "previous item"
BESIDE = {
    "contrast": TaskConfig(name="contrastive", weight=0.1, negatives=8),
}


def main() -> None:
    arguments = arguments_of(__doc__, one="this arm beside next item alone")
    preset, dataset = data_of(arguments)
    arms: dict[str, tuple[dict[str, Any] | None, list[dict[str, Any]]]] = {}
    for name in (ALONE, LONGER, PREVIOUS, *BESIDE):
        if name == ALONE or not arguments.only or name in arguments.only:
            configs = [read_run(arguments.preset, arguments.overrides, seed=seed) for seed in arguments.seed]
            arms[name] = arm_of(name, preset, [arm(name, config) for config in configs], dataset, arguments)
    for name, (rates, rows) in arms.items():
        if name != ALONE:
            compare(preset, name, arms[ALONE][1], rows, dataset, [arms[ALONE][0], rates])


def arm(name: str, config: RunConfig) -> RunConfig:
    """A preset's settings, but for the previous item, with what the name says; the next item's negatives are shared with the task beside it."""
    server = config.server
    if name == LONGER:
        server = server.model_copy(update={"rounds": round(1.6 * server.rounds)})
    task = without_previous_item(config.task)
    if name == PREVIOUS:
        task = with_previous_item(task)
    elif name in BESIDE:
        task = (*task, BESIDE[name])
    return config.model_copy(update={"server": server, "task": task})


def compare(preset: str, name: str, before: list[dict[str, Any]], after: list[dict[str, Any]], dataset: Dataset, rates: list[dict[str, Any] | None]) -> None:
    """Append and print what an arm is worth. ``rates``: what each of the two tried; None where nothing was."""
    ranks = ranks_of(before), ranks_of(after)
    users = np.arange(dataset.histories.num_users) if before[0]["users"] is None else np.array(before[0]["users"])
    is_short = dataset.histories.training_lengths[users] < SHORT_HISTORY
    found = {"all users": gain(ndcg, *ranks)}
    if is_short.any():
        found[f"fewer than {SHORT_HISTORY} events"] = gain(ndcg, *(each[:, is_short] for each in ranks))
    wanted = [0.95 * row["validation"]["unseen"]["ndcg@10"] for row in before]
    rounds = [[reached(row, goal) for row, goal in zip(rows, wanted, strict=True)] for rows in (before, after)]
    about: dict[str, Any] = {"preset": preset, "name": name, "seeds": [row["seed"] for row in before], "runs": [row["settings"] for row in (*before, *after)]}
    if rates[0] is not None:
        about["rates"] = rates
    if results.newest("task_gains", **about) is None:
        results.append("task_gains", {**about, "gains": found, "rounds_to_95": rounds})
    for who, one in found.items():
        print(f"{preset}, {name} beside next item, {who}: NDCG@10 unseen of the test {said(one)}")
    print(f"  rounds until 95 % of the last validation of next item alone: {rounds[0]} alone, {rounds[1]} beside it", flush=True)


def reached(row: dict[str, Any], goal: float) -> int | None:
    """The first validated round that is as good as ``goal``; None where none is."""
    points = [*row["curve"], [row["rounds"], row["validation"]["unseen"]["ndcg@10"]]]
    return next((number for number, value in points if value >= goal), None)


if __name__ == "__main__":
    main()
