"""What worker processes give: whole federated rounds with one, two and four of them, and whether the weights are the same bytes.

Rounds are timed in turn in one process, so that a drifting machine drifts under all of them. Of each the median is compared.

    python simulations/benchmarks/workers.py            (needs ml-1m.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import results
import torch
from fedssl_simulations.run_files import read_run
from throughput import Rounds, job

from fedssl.config import RunConfig
from fedssl.data.dataset import load_dataset
from fedssl.recipe import make_recipe

JOBS: dict[str, tuple[RunConfig, int]] = {
    "one step, 256 negatives": (job(1), 512),
    "three steps, 256 negatives": (job(3), 512),
    "preset ml-1m, whole softmax": (read_run("ml-1m", ["privacy.clip_norm=1.0", "counts=none", "encoder.first_items=random"]), 64),
}


def measure(name: str, workers: list[int], rounds: int) -> dict[str, Any]:
    config, cohort = JOBS[name]
    dataset = load_dataset(config.data)
    recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash)
    with ExitStack() as stack:
        tried = {}
        for number in workers:
            system = config.system.model_copy(update={"workers": number})
            folder = Path(stack.enter_context(TemporaryDirectory()))
            tried[number] = Rounds(recipe, dataset, config.model_copy(update={"system": system}), folder)
            stack.callback(tried[number].grid.close)
        seconds: dict[int, list[float]] = {number: [] for number in workers}
        for turn in range(rounds + 1):
            for number, call in tried.items():
                began = time.perf_counter()
                call()
                if turn:
                    seconds[number].append(time.perf_counter() - began)
        weights = [call.state.weights_P for call in tried.values()]
    median = {number: statistics.median(found) for number, found in seconds.items()}
    return {
        "job": name,
        "cohort": cohort,
        "cores": os.cpu_count(),
        "ms_a_user": {number: 1e3 * value / cohort for number, value in median.items()},
        "times_one": {number: median[1] / value for number, value in median.items()},
        "same_bytes": all(torch.equal(weights[0], other) for other in weights),
        "settings": results.settings_hash(config.model_dump(mode="json")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, (_, cohort) in JOBS.items():
        row = measure(name, [1, 2, 4], arguments.rounds * max(1, 128 // cohort))
        print(f"{name}, cohort {cohort}, {row['cores']} cores; the same bytes of weights: {'yes' if row['same_bytes'] else 'NO'}")
        for number, value in row["ms_a_user"].items():
            print(f"  {number} workers {value:7.3f} ms a user, {row['times_one'][number]:.2f} times one (wanted 1.7 for two)", flush=True)
        if not arguments.dry:
            results.append("workers", row)


if __name__ == "__main__":
    main()
