"""The same two apps on Flower's own simulation runtime, over Ray: what the run in this process learned, to the byte."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from everything_on import TEST_KEYS, give_keys, lay_out, learn_here, learned

# What a researcher would write. Two actors, so that both nodes train at once; Ray keeps nothing but small messages.
RUN = """
import sys

from fedssl_client.app import app as client_app
from fedssl_server.app import app as server_app
from flwr.simulation import run_simulation

if __name__ == "__main__":
    ray = {"address": "local", "num_cpus": 2, "_temp_dir": sys.argv[1], "object_store_memory": 100_000_000, "log_to_driver": False}
    run_simulation(server_app, client_app, num_supernodes=2, backend_config={"init_args": ray, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
"""


def processes_of(stores: Path) -> list[psutil.Process]:
    """Processes that were started with these stores in their environment, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FEDSSL_STORES") == str(stores):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def ended(stores: Path) -> Iterator[None]:
    """Whatever still runs over these stores when the block is left is killed."""
    try:
        yield
    finally:
        for process in processes_of(stores):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.timeout(300)
def test_flowers_simulation_runtime_reaches_the_bytes_of_the_run_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, dataset, simulated = learn_here(tmp_path / "simulated")
    stores, run = lay_out(config, dataset, tmp_path)
    give_keys(run, TEST_KEYS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FLWR_", "FEDSSL_"))} | {
        "FEDSSL_STORES": str(tmp_path),
        "FEDSSL_RUN_DIR": str(run),
        "FEDSSL_NODES": "2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    start = time.monotonic()
    # Ray's sockets need a short path, so its folder is not in tmp_path.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray, ended(tmp_path):
        command = [sys.executable, "-c", RUN, ray]
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        seconds = time.monotonic() - start
        deadline = time.monotonic() + 10
        while (left := processes_of(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, "Ray left processes behind"
    with capsys.disabled():
        print(f" Ray: hello, counts and 5 rounds in {seconds:.1f} s ", end="")
    assert [store.name for store in stores] == ["node-0", "node-1"]
    assert learned(run, [store / "heads" for store in stores]) == simulated
