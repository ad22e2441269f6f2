"""What privacy costs in time: whole federated rounds without it, with user-level noise at the server or from the users, and window-level.

The job is that of throughput.py with one local step. A window-level user reads each window with chance .25, about as many as
the others' one a step. The kinds are timed in turn, round after round, in one process, so that a drifting machine drifts under all of them;
medians are compared, a user, because cohorts of secret coins differ in size.

    python simulations/benchmarks/privacy_cost.py            (needs ml-1m.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import results
import torch
from fedssl_server.rounds import RoundFacts, Run, owners, run_rounds
from fedssl_simulations.grids import InProcessGrid, handler_of
from fedssl_simulations.simulated_nodes import make_shards
from throughput import COHORT, job

from fedssl.checking import check
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset, load_dataset
from fedssl.privacy.keys import Keys
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.plan import make_plan
from fedssl.privacy.uploads import Device, UploadLedger
from fedssl.recipe import make_recipe
from fedssl.server_round import State, first_state

PLAIN, CENTRAL, WINDOW, LOCAL = "no privacy", "user, central", "window, simulated", "user, local"
PRIVACY: dict[str, dict[str, Any]] = {
    PLAIN: {},
    CENTRAL: {"clip_norm": 1.0, "noise_multiplier": 1.0},
    WINDOW: {"mode": "window", "clip_norm": 1.0, "noise_multiplier": 1.0, "window_rate": 0.25},
    LOCAL: {"mode": "local", "clip_norm": 1.0, "noise_multiplier": 1.0},
}
KEYS = Keys(cohort=b"c" * 32, noise=b"n" * 32)


def config_of(kind: str) -> RunConfig:
    values = job(1).model_dump(mode="json")
    server = {"rounds": 1000, "sampling": "poisson" if kind == CENTRAL else "passes"}
    return check(RunConfig, {**values, "privacy": PRIVACY[kind], "server": {**values["server"], **server}}, where="privacy_cost")


class Rounds:
    """Whole rounds of one kind, one a call, which returns seconds a user."""

    def __init__(self, kind: str, dataset: Dataset, folder: Path):
        config, users = config_of(kind), dataset.histories.num_users
        plan = make_plan(config.privacy, config.server, None, users, local=config.local)
        told = plan.told_to_nodes(config.privacy) if plan is not None else None
        recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash, privacy=told)
        shards = make_shards(dataset, config, folder)
        if config.privacy.is_local:
            shards[0].device = Device(KEYS.noise, UploadLedger(folder / "uploads.sqlite", KEYS.noise, may_be_new=True))
            shards[0].is_simulated = True
        self.grid = InProcessGrid(handler_of(shards), {1: {"partition-id": 0}})
        node_ids, owner = owners({1: shards[0].users}, users)
        secret = (plan, KEYS, Ledger(folder / "ledger.jsonl")) if kind == CENTRAL else (None, None, None)
        self.run = Run("privacy cost", recipe, users, node_ids, owner, *secret)
        self.state = first_state(recipe)

    def __call__(self) -> float:
        asked: list[int] = []

        def keep(state: State, facts: RoundFacts) -> None:
            self.state = state
            asked.append(facts.users)

        began = time.perf_counter()
        self.state = run_rounds(self.grid, self.run, self.state, on_round=keep, should_stop=lambda: bool(asked))
        return (time.perf_counter() - began) / asked[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(job(1).data)
    with TemporaryDirectory() as folder:
        tried = {}
        for number, kind in enumerate(PRIVACY):
            (Path(folder) / str(number)).mkdir()
            tried[kind] = Rounds(kind, dataset, Path(folder) / str(number))
        seconds: dict[str, list[float]] = {kind: [] for kind in tried}
        for turn in range(arguments.rounds + 1):
            for kind, call in tried.items():
                took = call()
                if turn:
                    seconds[kind].append(took)
        for call in tried.values():
            call.grid.close()
    median = {kind: statistics.median(found) for kind, found in seconds.items()}
    times = {kind: value / median[PLAIN] for kind, value in median.items()}
    print(f"one local step, cohort {COHORT}, one thread")
    for kind, value in median.items():
        print(f"  {kind:18s} {1e3 * value:7.3f} ms a user {1 / value:8.0f} users a second {times[kind]:6.2f} times the time without privacy")
    slower = 1 - 1 / times[CENTRAL]
    print(f"  user-level privacy at the server costs {slower:.1%} of users a second (wanted at most 15 %)")
    print(f"  window-level privacy in a simulation takes {times[WINDOW]:.2f} times the time (wanted at most 4)")
    if not arguments.dry:
        row = {
            "ms_a_user": {kind: 1e3 * value for kind, value in median.items()},
            "times_plain": times,
            "users_per_second_lost": slower,
            "rounds": arguments.rounds,
            "load": round(os.getloadavg()[0], 1),
            "cores": os.cpu_count(),
        }
        results.append("privacy_cost", {**row, "settings": results.settings_hash([config_of(kind).model_dump(mode="json") for kind in PRIVACY])})


if __name__ == "__main__":
    main()
