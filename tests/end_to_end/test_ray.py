"""The same two apps on Flower's own simulation runtime, over Ray: what the run in this process learned, to the byte."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from everything_on import TEST_KEYS, give_keys, lay_out, learn_here, learned

ROOT = Path(__file__).parents[2]
(OVER_RAY,) = re.findall(r"```python\n(# over_ray.py\n.*?)```", (ROOT / "simulations/README.md").read_text(encoding="utf-8"), re.DOTALL)
"""The page's own example."""


@dataclass
class Watched:
    """A process, and whatever it starts: Ray's own are known by descent alone, because they overwrite their environment and their name."""

    process: subprocess.Popen[bytes]
    started: set[psutil.Process] = field(default_factory=set)

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or None when time is up."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            with suppress(psutil.NoSuchProcess):
                self.started |= set(psutil.Process(self.process.pid).children(recursive=True))
            time.sleep(0.2)
        return self.process.poll()


@contextmanager
def watched(*command: str, cwd: Path, env: dict[str, str], log: Path) -> Iterator[Watched]:
    """A command whose words go to ``log``. What it started and left is killed when the block ends."""
    with log.open("wb") as file:
        process = Watched(subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file))
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()
        for one in process.started:
            with suppress(psutil.NoSuchProcess):
                one.kill()


@pytest.mark.timeout(420)
def test_flowers_simulation_runtime_reaches_the_bytes_of_the_run_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, dataset, simulated = learn_here(tmp_path / "simulated", rounds=3)
    stores, run = lay_out(config, dataset, tmp_path)
    assert [store.name for store in stores] == ["node-0", "node-1"]
    give_keys(run, TEST_KEYS)
    (tmp_path / "over_ray.py").write_text(OVER_RAY, encoding="utf-8")
    log = tmp_path / "log"
    start = time.monotonic()
    # Ray's sockets need a short path, so its folder is not in tmp_path.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FLWR_", "FEDSSL_"))} | {
            "FEDSSL_STORES": str(tmp_path),
            "FEDSSL_RUN_DIR": str(run),
            "FEDSSL_NODES": "2",
            "RAY_TMPDIR": ray,
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        with watched(sys.executable, "over_ray.py", cwd=tmp_path, env=environment, log=log) as process:
            assert process.wait(360) == 0, log.read_text(errors="replace")[-6000:]
            seconds = time.monotonic() - start
            assert any(Path(ray).iterdir()), "Ray ran elsewhere"
            _, left = psutil.wait_procs(process.started, timeout=20)
            assert process.started and not left
    with capsys.disabled():
        print(f" Ray: hello, counts and 3 rounds in {seconds:.1f} s ", end="")
    assert learned(run, [store / "heads" for store in stores]) == simulated
