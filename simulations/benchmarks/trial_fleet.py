"""A whole trial: a server, three devices with agents, and an operator who resumes what stopped, in one folder."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from fedssl_simulations.run_files import write_run
from trial_device import TrialDevice
from trial_server import TrialServer

from fedssl.catalogue import write_catalogue
from fedssl.config import DataConfig, RunConfig
from fedssl.data.dataset import Dataset, make_dataset
from fedssl.data.synthetic import synthesize
from fedssl.recipe import make_recipe

SMALL: dict[str, Any] = {
    "encoder": {"width": 8, "blocks": 1, "heads": 1, "hidden": 8, "window": 8, "dropout": 0.2},
    "head": {"name": "user-vector"},
    "local": {"steps": 2, "lr": 0.1},
    "system": {"checkpoint_every": 1},
}
PLANS: dict[str, dict[str, Any]] = {
    "central": {
        "counts": {"lags": 2, "clip_norm": 1.0},
        "privacy": {"clip_norm": 0.5, "noise_multiplier": 1.0, "counts_noise_multiplier": 1.0, "delta": 1e-3},
    },
    "local": {"privacy": {"mode": "local", "clip_norm": 0.5, "noise_multiplier": 3.0, "delta": 1e-3}},
}
DEVICES = 3
os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.5")  # Four SuperExecs on one machine.


def config_of(plan: str, rounds: int, seed: int = 1) -> RunConfig:
    """Everybody is asked in every round, under a plan by that name (`PLANS`), or none."""
    sampling = "poisson" if plan == "central" else "passes"
    server = {"rounds": rounds, "cohort": DEVICES, "sampling": sampling, "optimizer": "adam"}
    return RunConfig.model_validate({"seed": seed, **SMALL, **PLANS.get(plan, {}), "server": server})


class TrialFleet:
    """`TrialServer` and devices in ``folder``; ``round_seconds``: the deadline of a round; ``here``: another address of the server."""

    def __init__(self, folder: Path, *, round_seconds: float, nodes_seconds: float = 300.0, here: str | None = None):
        self.folder, self._is_up = folder, False
        self.dataset: Dataset = make_dataset(synthesize(users=DEVICES, items=100, seed=3, mean_events=12.0), DataConfig(min_events=1))
        names = [f"device-{number}" for number in range(DEVICES)]
        rounds = {"nodes": DEVICES, "nodes_seconds": nodes_seconds, "round_seconds": round_seconds, "tries": 5}
        self.server = TrialServer(folder / "server", names, rounds=rounds, here=here)
        catalogue = self.dataset.catalogue
        recipe = make_recipe(config_of("central", 1), num_items=catalogue.num_items, catalogue=catalogue.hash)
        self.devices = []
        for number, name in enumerate(names):
            proof = ["--root-certificates", str(self.server.ca), "--auth-supernode-private-key", str(self.server.key(name))]
            device = TrialDevice(folder / f"d{number}", number, self.server.address, proof, self.server.folder / "superexec.secret")
            device.make(recipe, catalogue, self.dataset.histories.of(number).tolist())
            self.devices.append(device)

    def start(self) -> None:
        """All but a run."""
        self._is_up = True
        self.server.start()
        for device in self.devices:
            device.start()

    def end(self) -> None:
        """End everything, where it was started."""
        if self._is_up:
            self._is_up = False
            for device in self.devices:
                device.end()
            self.server.end()

    @contextmanager
    def running(self, config: RunConfig, name: str):
        """A run in ``folder/NAME``, by an operator who goes on with one that ended with an error; gone when the block ends."""
        run = TrialRun(self, config, self.folder / name)
        try:
            yield run
        finally:
            run.end()


class TrialRun:
    """A run on its way. ``resumed``: how often the operator went on with one that had given up. ``folder``: its run folder."""

    def __init__(self, fleet: TrialFleet, config: RunConfig, folder: Path):
        self.fleet, self.folder, self.resumed, self.is_done = fleet, folder, 0, False
        begin = folder.with_name(f"{folder.name}-settings")
        begin.mkdir()
        write_run(config, begin / "run.toml")
        write_catalogue(fleet.dataset.catalogue, begin / "catalogue.jsonl")
        self._begin = [str(begin / "run.toml"), "--catalogue", str(begin / "catalogue.jsonl"), "--out", str(folder)]
        self.process: subprocess.Popen[bytes] = fleet.server.command("run", *self._begin)
        self._end = threading.Event()
        self._operator = threading.Thread(target=self._operate, daemon=True)
        self._operator.start()

    def _operate(self) -> None:
        while not self._end.wait(0.3):
            code = self.process.poll()
            if code == 0:
                self.is_done = True
                return
            if code is not None:
                time.sleep(2.0)
                self.resumed += 1
                self.process = self.fleet.server.command("run", *(["--resume", str(self.folder)] if (self.folder / "run.toml").exists() else self._begin))

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []

    def wait(self, ready: Callable[[], object], seconds: float) -> bool:
        """Whether it came true, or the run was done, within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if ready():
                return True
            if self.is_done:
                return False
            time.sleep(0.05)
        return False

    def server_process(self, word: str) -> psutil.Process | None:
        """The newest process of the server whose command has the word: flower-superlink, flower-superexec, flwr-serverapp."""
        roots = [self.process.pid, *([self.fleet.server.starting.pid] if self.fleet.server.starting else [])]
        found = []
        for root in roots:
            try:
                found += [one for one in psutil.Process(root).children(recursive=True) if any(word in part for part in one.cmdline())]
            except psutil.Error:
                continue
        return max(found, key=lambda one: one.create_time(), default=None)

    def end(self) -> None:
        """End it where it still runs."""
        self._end.set()
        self._operator.join()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
