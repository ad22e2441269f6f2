"""Simulation and deployment reach the same checkpoint: one run in this process, and over a real SuperLink with two SuperNodes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from fedssl_server.serve import serve
from fedssl_simulations.federation import federation
from fedssl_simulations.grids import InProcessGrid, shard_handler

from fedssl.catalogue import write_catalogue
from fedssl.client_round import open_shard, write_shard
from fedssl.data.histories import make_histories
from fedssl.data.synthetic import synthesize
from fedssl.errors import FedSSLError

SETTINGS = """
seed = 5
[encoder]
width = 8
blocks = 1
heads = 1
hidden = 8
window = 8
[[task]]
name = "next-item"
[counts]
lags = 2
[head]
name = "user-vector"
[local]
steps = 2
lr = 0.1
[server]
rounds = 2
cohort = 12
[privacy]
clip_norm = 1.0
"""
# How training is cut into chunks is part of the bytes; how many nodes the users live on is not, beyond the chunks.
USERS = [np.arange(0, 30, 2), np.arange(1, 30, 2)]


def lay_out(folder: Path) -> tuple[list[Path], Path]:
    """The stores of two nodes and the run folder of a server, all from the same histories."""
    histories, catalogue = make_histories(synthesize(users=30, items=200, seed=3, mean_events=10.0))
    stores = [folder / f"node-{number}" for number in range(2)]
    for store, users in zip(stores, USERS, strict=True):
        write_shard(store, histories, users)
    run = folder / "run"
    run.mkdir()
    (run / "run.toml").write_text(SETTINGS)
    write_catalogue(catalogue, run / "catalogue.jsonl")
    return stores, run


def checkpoint(run: Path) -> dict[str, bytes]:
    """All that was learned, by file."""
    folder = run / "checkpoints" / "round-000002"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.timeout(240)
def test_simulation_and_deployment_reach_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("simulated", "deployed"):
        (tmp_path / name).mkdir()
    stores, run = lay_out(tmp_path / "simulated")
    shards = {1 + number: open_shard(store) for number, store in enumerate(stores)}
    with InProcessGrid(shard_handler(shards), {node: {} for node in shards}) as grid:
        serve(grid, {node: shard.users for node, shard in shards.items()}, run)
    simulated = checkpoint(run)
    assert {"weights.safetensors", "optimizer.safetensors", "counts.safetensors"} == simulated.keys()

    stores, run = lay_out(tmp_path / "deployed")
    start = time.monotonic()
    with federation(stores, run, environment={"OMP_NUM_THREADS": "1"}) as deployed:
        up = time.monotonic() - start
        outcome = deployed.run(seconds=200)
        assert outcome.is_completed, f"{outcome.status}\n{outcome.log}\n{deployed.logs(lines=30)}"
        processes = [process.pid for process in deployed.processes.values()]
    with capsys.disabled():
        print(f" federation: up in {up:.1f} s, hello, counts and 2 rounds in {outcome.seconds:.1f} s ", end="")
    assert checkpoint(run) == simulated
    heads = [(store / "heads" / "user-vector.f32").read_bytes() for store in stores]
    assert heads == [(tmp_path / "simulated" / store.name / "heads" / "user-vector.f32").read_bytes() for store in stores]
    assert any(any(head) for head in heads)
    # Every process, and whatever it started, is gone.
    for group in processes:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


def test_a_deployment_that_cannot_start_says_why_and_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(FedSSLError, match=r"supernode-0 ended with|nothing listens"), federation([tmp_path / 'a " b'], tmp_path) as deployed:
        deployed.run(seconds=20)
