"""Simulation and deployment reach the same checkpoint: one run in this process, and over a real SuperLink with two SuperNodes, TLS and node authentication."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from everything_on import TEST_KEYS, give_keys, lay_out, learn_here, learned
from fedssl_simulations.federation import federation

from fedssl.errors import FedSSLError


@pytest.mark.timeout(420)
def test_simulation_and_deployment_reach_the_same_bytes_with_everything_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, dataset, simulated = learn_here(tmp_path / "simulated", rounds=3)
    stores, run = lay_out(config, dataset, tmp_path)
    give_keys(run, TEST_KEYS)
    start = time.monotonic()
    with federation(stores, run, environment={"OMP_NUM_THREADS": "1"}) as deployed:
        up = time.monotonic() - start
        outcome = deployed.run(seconds=380)
        assert outcome.is_completed, f"{outcome.status}\n{outcome.log}\n{deployed.logs(lines=30)}"
        processes = [process.pid for process in deployed.processes.running.values()]
    with capsys.disabled():
        print(f" federation: up in {up:.1f} s, hello, counts and 3 rounds in {outcome.seconds:.1f} s ", end="")
    assert learned(run, [store / "heads" for store in stores]) == simulated
    # Every process, and whatever it started, is gone.
    for group in processes:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


def test_a_deployment_that_cannot_start_says_why_and_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(FedSSLError, match=r"node-0 ended with|nothing listens"), federation([tmp_path / 'a " b'], tmp_path) as deployed:
        deployed.run(seconds=20)
