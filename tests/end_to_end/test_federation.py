"""Simulation and deployment reach the same checkpoint: one run in this process, and over a real SuperLink with two SuperNodes."""

from __future__ import annotations

import os
import time
import tomllib
from pathlib import Path

import pytest
from fedssl_simulations.federation import federation
from fedssl_simulations.run import make_shards, simulate
from fedssl_simulations.run_files import read_run, write_run

from fedssl.catalogue import write_catalogue
from fedssl.client_round import write_shard
from fedssl.config import DataConfig, RunConfig
from fedssl.data.dataset import Dataset, make_dataset
from fedssl.data.synthetic import synthesize
from fedssl.errors import FedSSLError
from fedssl.privacy.keys import Keys

SETTINGS = """
seed = 5
[encoder]
width = 8
blocks = 1
heads = 1
hidden = 8
window = 8
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
rounds = 5
cohort = 20
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
shards = 2
"""


def lay_out(config: RunConfig, dataset: Dataset, folder: Path) -> tuple[list[Path], Path]:
    """Stores of two nodes that host the users of the simulation's two shards, and the run folder of a server."""
    shards = make_shards(dataset, config, folder)
    stores = [folder / f"node-{number}" for number in shards]
    for store, shard in zip(stores, shards.values(), strict=True):
        write_shard(store, dataset.histories, shard.users)
    run = folder / "run"
    run.mkdir()
    write_run(config, run / "run.toml")
    write_catalogue(dataset.catalogue, run / "catalogue.jsonl")
    return stores, run


TEST_KEYS = Keys(cohort=bytes(range(32)), noise=bytes(range(32, 64)))
"""Known to everybody, so they protect nobody: for this test alone."""


def give_keys(run: Path, keys: Keys) -> None:
    """Put keys where a server keeps its own."""
    (run / "secrets").mkdir(mode=0o700)
    for name, key in (("cohort.key", keys.cohort), ("noise.key", keys.noise)):
        (run / "secrets" / name).touch(mode=0o600)
        (run / "secrets" / name).write_bytes(key)


def learned(run: Path) -> dict[str, bytes]:
    """All that the last checkpoint holds of what was learned, by file."""
    return {path.name: path.read_bytes() for path in sorted((run / "checkpoints" / "round-000005").glob("*.safetensors"))}


@pytest.mark.timeout(420)
def test_simulation_and_deployment_reach_the_same_bytes_with_everything_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = read_run(tomllib.loads(SETTINGS))
    dataset = make_dataset(synthesize(users=50, items=200, seed=3, mean_events=10.0), DataConfig(min_events=1))
    simulate(config, out=tmp_path / "simulated", dataset=dataset, keys=TEST_KEYS)
    simulated = learned(tmp_path / "simulated")
    assert {"weights.safetensors", "optimizer.safetensors", "counts.safetensors"} == simulated.keys()

    stores, run = lay_out(config, dataset, tmp_path)
    give_keys(run, TEST_KEYS)
    start = time.monotonic()
    with federation(stores, run, environment={"OMP_NUM_THREADS": "1"}) as deployed:
        up = time.monotonic() - start
        outcome = deployed.run(seconds=380)
        assert outcome.is_completed, f"{outcome.status}\n{outcome.log}\n{deployed.logs(lines=30)}"
        processes = [process.pid for process in deployed.processes.values()]
    with capsys.disabled():
        print(f" federation: up in {up:.1f} s, hello, counts and 5 rounds in {outcome.seconds:.1f} s ", end="")
    assert learned(run) == simulated
    heads = [(store / "heads" / "user-vector.f32").read_bytes() for store in stores]
    assert heads == [path.read_bytes() for path in sorted((tmp_path / "simulated" / "heads").glob("node-*/user-vector.f32"))]
    assert all(any(head) for head in heads)
    # Every process, and whatever it started, is gone.
    for group in processes:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


def test_a_deployment_that_cannot_start_says_why_and_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(FedSSLError, match=r"supernode-0 ended with|nothing listens"), federation([tmp_path / 'a " b'], tmp_path) as deployed:
        deployed.run(seconds=20)
