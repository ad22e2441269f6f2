"""By how much the weights of a deployed run differ from those of its simulation, after one round and after twenty, with everything on.

Adam, dropout, a head, counts, clip and noise by keys that both know, on synthetic histories. Deployed is what an operator and a person start: `fedssl server
start`, SuperNodes with TLS and keys of their own, and `fedssl device run` where devices have agents. Beside it a simulation in other chunks, on two threads.
Told as well: the memory of each kind of process, Flower's own among them.

    python simulations/benchmarks/deployment.py [nodes] [devices] [--rounds 20]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import tomllib
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import results
import tomli_w
import torch
from fedssl_client.device_folder import HISTORY, MODEL, app_socket, make_device_folder, training_socket
from fedssl_client.history import Event, HistoryStore
from fedssl_client.policy import Retention, read_policy
from fedssl_server.processes import Processes, program
from fedssl_simulations.federation import federation
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run, write_run
from fedssl_simulations.simulated_nodes import make_shards
from process_memory import watched
from safetensors.numpy import load_file

from fedssl.catalogue import write_catalogue
from fedssl.client_round import write_shard
from fedssl.config import DataConfig, RunConfig
from fedssl.data.dataset import Dataset, make_dataset
from fedssl.data.synthetic import synthesize
from fedssl.device_model import write_device_model
from fedssl.parts import initial_weights
from fedssl.privacy.keys import Keys
from fedssl.recipe import make_recipe
from fedssl.weights import to_numpy

SERVER = "home"
KEYS = Keys(cohort=bytes(range(32)), noise=bytes(range(32, 64)))
"""Known to everybody, so they protect nobody: for this comparison alone."""
SETTINGS = """
seed = 5
[encoder]
width = 16
blocks = 1
heads = 2
hidden = 32
window = 20
dropout = 0.2
[[task]]
name = "next-item"
[counts]
lags = 2
clip_norm = 1.0
[head]
name = "user-vector"
[local]
steps = 2
lr = 0.1
[server]
sampling = "poisson"
optimizer = "adam"
[privacy]
clip_norm = 0.5
noise_multiplier = 0.3
counts_noise_multiplier = 0.2
delta = 1e-3
[evaluation]
ks = [5]
[system]
workers = 1
checkpoint_every = 1
keep_checkpoints = 1000
"""
OTHER = {"users_per_chunk": 5, "threads": 2}
Nodes = list[Path | dict[str, str]]


def settings(kind: str, rounds: int) -> tuple[RunConfig, Dataset]:
    users, cohort, shards = (50, 20, 2) if kind == "nodes" else (3, 2, 3)
    config = read_run(tomllib.loads(SETTINGS), [f"server.rounds={rounds}", f"server.cohort={cohort}", f"system.shards={shards}"])
    return config, make_dataset(synthesize(users=users, items=200, seed=3, mean_events=15.0), DataConfig(min_events=1))


def two_nodes(config: RunConfig, dataset: Dataset, place: Path, stack: ExitStack) -> Nodes:
    """Two folders, each of half the users."""
    nodes: Nodes = []
    for number, shard in make_shards(dataset, config, place).items():
        write_shard(place / f"node-{number}", dataset.histories, shard.users)
        nodes.append(place / f"node-{number}")
    return nodes


def devices(config: RunConfig, dataset: Dataset, place: Path, stack: ExitStack) -> Nodes:
    """A device for each user, with its agent running."""
    recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash)
    (place / "logs").mkdir()
    agents = Processes(place / "logs", {**os.environ, "OMP_NUM_THREADS": "1"})
    stack.callback(agents.end, 20.0)
    nodes: Nodes = []
    for number in range(dataset.histories.num_users):
        folder = place / f"device-{number}"
        make_device_folder(folder, user=number)
        gates = {"charging": False, "unmetered": False, "most_busy": 1.0, "least_disk_mb": 0, "least_memory_mb": 0, "rounds_a_day": 10**6}
        allow = {"servers": [SERVER], "most_epsilon": float("inf"), "most_delta": 0.01}
        (folder / "device.toml").write_text(tomli_w.dumps({"user": number, "consent": {"train": True}, "allow": allow, "gates": gates}))
        write_device_model(folder / MODEL, recipe, to_numpy(initial_weights(recipe)), dataset.catalogue, None, run="before", round=0)
        with closing(HistoryStore(folder / HISTORY)) as history:
            history.join(SERVER)
            rows = dataset.histories.of(number).tolist()
            history.add([Event(dataset.catalogue.tokens[row - 1], float(when), 1.0) for when, row in enumerate(rows)], Retention())
        agents.start(f"agent-{number}", [program("fedssl"), "device", "run", str(folder)])
        while not app_socket(folder).exists():
            agents.check()
            time.sleep(0.1)
        nodes.append({"agent-socket": str(training_socket(folder, read_policy(folder))), "server": SERVER})
    return nodes


def deploy(config: RunConfig, dataset: Dataset, place: Path, make: Callable[[RunConfig, Dataset, Path, ExitStack], Nodes]) -> Path:
    """The folder of a run that went over a SuperLink."""
    run = place / "deployed"
    (run / "secrets").mkdir(mode=0o700, parents=True)
    for name, key in (("cohort.key", KEYS.cohort), ("noise.key", KEYS.noise)):
        (run / "secrets" / name).touch(mode=0o600)
        (run / "secrets" / name).write_bytes(key)
    write_run(config, run / "run.toml")
    write_catalogue(dataset.catalogue, run / "catalogue.jsonl")
    with ExitStack() as stack:
        nodes = make(config, dataset, place, stack)
        deployed = stack.enter_context(federation(nodes, run, environment={"OMP_NUM_THREADS": "1"}))
        outcome = deployed.run(seconds=3600)
        if not outcome.is_completed:
            raise SystemExit(f"{outcome.status}\n{outcome.log}\n{deployed.logs(lines=20)}")
    return run


def weights(run: Path, round: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """All weights after a training round, one after the other."""
    leaves = load_file(run / "checkpoints" / f"round-{round:06d}" / "weights.safetensors")
    return np.concatenate([leaf.reshape(-1) for _, leaf in sorted(leaves.items())])


def apart(a: Path, b: Path, rounds: list[int]) -> dict[str, float]:
    """The largest difference of any weight of two runs, by round."""
    return {str(number): float(np.abs(weights(a, number) - weights(b, number)).max()) for number in rounds}


def is_same(a: Path, b: Path, rounds: list[int]) -> bool:
    """Whether weights, optimiser and counts of two runs have the same bytes after each of these rounds."""
    names = ("weights", "optimizer", "counts", "popularity")
    files = [f"checkpoints/round-{number:06d}/{name}.safetensors" for number in rounds for name in names]
    return all((a / file).read_bytes() == (b / file).read_bytes() for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["nodes", "devices"], help="nodes, devices")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        config, dataset = settings(kind, arguments.rounds)
        rounds = sorted({1, arguments.rounds})
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            simulate(config, out=place / "simulated", dataset=dataset, keys=KEYS)
            other = config.model_copy(update={"system": config.system.model_copy(update={"users_per_chunk": OTHER["users_per_chunk"], "shards": 1})})
            torch.set_num_threads(OTHER["threads"])
            simulate(other, out=place / "other", dataset=dataset, keys=KEYS)
            torch.set_num_threads(1)
            with watched() as megabytes:
                run = deploy(config, dataset, place, two_nodes if kind == "nodes" else devices)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            row = {
                "kind": kind,
                "users": dataset.histories.num_users,
                "weights": len(weights(run, 1)),
                "largest": float(np.abs(weights(run, arguments.rounds)).max()),
                "same_bytes": is_same(run, place / "simulated", rounds),
                "apart": apart(run, place / "simulated", rounds),
                "apart_other": apart(run, place / "other", rounds),
                "round_seconds": round(float(np.median([line["seconds"] for line in lines if line["phase"] == "training"])), 1),
                "megabytes": megabytes,
                "settings": results.settings_hash([SETTINGS, arguments.rounds, OTHER]),
            }
        if not arguments.dry:
            row = results.append("deployment", row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
