"""Who goes away in a round of a real SuperLink and comes back, a node or all that the SuperLink knew; nodes evaluate, and `halt --now` ends a round."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fedssl_server.processes import program
from fedssl_simulations.federation import Federation, federation
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run, write_run
from fedssl_simulations.simulated_nodes import make_shards

from fedssl.catalogue import write_catalogue
from fedssl.checkpoints import list_checkpoints
from fedssl.client_round import write_shard
from fedssl.config import DataConfig
from fedssl.data.dataset import make_dataset
from fedssl.data.synthetic import synthesize

pytestmark = [
    pytest.mark.skipif("FEDSSL_FEDERATION" not in os.environ, reason="it takes minutes on both cores; `make federation` runs it"),
    pytest.mark.timeout(900),
]

SECONDS = 300.0
"""The longest that anything may take on a machine that is busy."""
HEARD = "Received successfully"
"""What a SuperNode says of a message that it has."""
SETTINGS: dict[str, Any] = {
    "encoder": {"width": 8, "blocks": 1, "heads": 1, "hidden": 8, "window": 8},
    "local": {"lr": 0.1},
    "server": {"rounds": 3, "cohort": 12, "optimizer": "adam"},
    "evaluation": {"ks": [5], "on_devices": 2},
    "system": {"shards": 2, "workers": 1},
}


def until(is_true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait while a command runs."""
    deadline = time.monotonic() + SECONDS
    while not is_true():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{process.args} ended, or did not come so far:\n{process.communicate()}")
        time.sleep(0.1)


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def operate(deployed: Federation, *words: str) -> subprocess.Popen[str]:
    command = [program("fedssl"), "server", words[0], str(deployed.link.folder), *words[1:]]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=deployed.processes.environment, text=True)


def said(process: subprocess.Popen[str]) -> str:
    """What a command wrote that ends without an error."""
    written, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return written


def signal_all(deployed: Federation, name: str, number: int) -> None:
    """Signal a process and what it started."""
    os.killpg(deployed.processes.running[name].pid, number)


@dataclass(frozen=True)
class Trial:
    """Twelve people on two nodes: ``stores``, what an operator submits, and the ``wanted`` run, which was simulated."""

    folder: Path
    stores: list[Path]
    wanted: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def begin(self, deployed: Federation) -> subprocess.Popen[str]:
        """`fedssl server run` of it."""
        return operate(deployed, "run", str(self.folder / "run.toml"), "--catalogue", str(self.folder / "catalogue.jsonl"), "--out", str(self.run))

    def check(self) -> None:
        """All rounds had all people, and ended with the bytes of the simulation."""
        rounds = [(line["round"], line["users"], line["nodes_used"], line["refused"]) for line in lines(self.run)]
        assert rounds == [(number, 12, 2, {}) for number in range(1, 4)]
        newest, simulated = (list_checkpoints(folder / "checkpoints")[-1] for folder in (self.run, self.wanted))
        assert (newest / "weights.safetensors").read_bytes() == (simulated / "weights.safetensors").read_bytes()


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    config = read_run(SETTINGS)
    dataset = make_dataset(synthesize(users=12, items=100, seed=3, mean_events=10.0), DataConfig(min_events=1))
    simulate(config, out=tmp_path / "simulated", dataset=dataset)
    write_run(config, tmp_path / "run.toml")
    write_catalogue(dataset.catalogue, tmp_path / "catalogue.jsonl")
    stores = []
    for number, shard in make_shards(dataset, config, tmp_path).items():
        write_shard(tmp_path / f"node-{number}", dataset.histories, shard.users)
        stores.append(tmp_path / f"node-{number}")
    return Trial(tmp_path, stores, tmp_path / "simulated")


def test_a_node_that_leaves_in_a_round_and_returns_is_counted_and_a_round_that_was_halted_at_once_is_asked_for_again(
    trial: Trial, capsys: pytest.CaptureFixture[str]
):
    run, began = trial.run, time.monotonic()
    settings = f"round_seconds = {SECONDS:.0f}\nreconnect_seconds = {SECONDS / 2:.0f}\n"
    with federation(trial.stores, None, environment={"OMP_NUM_THREADS": "1"}, settings=settings, start_seconds=SECONDS) as deployed:
        going = trial.begin(deployed)

        # Round 2: node-1 hears the question and cannot answer; it leaves, and is back when Flower says that it is gone.
        until(lambda: len(lines(run)) == 1, going)
        signal_all(deployed, "superexec-node-1", signal.SIGSTOP)
        until(lambda: deployed.processes.log("node-1").count(HEARD) == 3, going)  # The hello, and the questions of two rounds.
        supernode = deployed.processes.running["node-1"]
        supernode.terminate()
        supernode.wait(30)
        until(lambda: deployed.link.nodes()["node-1"] == "offline", going)
        away = len(lines(run))
        time.sleep(3.0)  # The server looks who is there every 2 s.
        deployed.processes.start("node-1", list(supernode.args))
        signal_all(deployed, "superexec-node-1", signal.SIGCONT)
        until(lambda: len(lines(run)) >= 2, going)

        # Round 3 is ended at once: the command that follows it says so, and does not take it for a crash.
        signal_all(deployed, "superexec-node-1", signal.SIGSTOP)
        time.sleep(1.0)
        halted = len(lines(run))
        assert said(operate(deployed, "halt", "--now")) == f"{run}: ended\n"
        assert said(going) == f"{run}: stopped; go on with --resume {run}\n"
        signal_all(deployed, "superexec-node-1", signal.SIGCONT)
        assert json.loads(said(operate(deployed, "status", "--json"))) == {"superlink": "up", "nodes": {"node-0": "online", "node-1": "online"}, "run": "none"}
        assert len(lines(run)) == halted == 2
        assert said(operate(deployed, "run", "--resume", str(run))) == f"{run}: done\n"
    with capsys.disabled():
        print(f" a node away and back, and a halt at once: {time.monotonic() - began:.0f} s ", end="")

    assert away == 1
    trial.check()
    # Rounds 2 and 3 were evaluated where the events are: the numbers of the simulation.
    found, wanted = ({line["round"]: line["evaluation"] for line in lines(folder) if "evaluation" in line} for folder in (run, trial.wanted))
    assert found == wanted and sorted(found) == [2, 3] and found[3]["users"] == 12


def test_a_superlink_that_kept_its_state_in_memory_and_was_killed_loses_the_round_and_no_run(trial: Trial, capsys: pytest.CaptureFixture[str]):
    began, settings = time.monotonic(), '[superlink]\nstate = "memory"\n'
    with federation(trial.stores, None, environment={"OMP_NUM_THREADS": "1"}, settings=settings, start_seconds=SECONDS) as deployed:
        before = deployed.link.nodes()
        going = trial.begin(deployed)
        until(lambda: len(lines(trial.run)) == 1, going)
        (superlink,) = [process for process in psutil.process_iter() if "flower-superlink" in process_words(process, deployed)]
        superlink.kill()

        # A new one knows nobody: its nodes end, without an error, and what keeps them up starts them again.
        ends, deadline = [], time.monotonic() + SECONDS
        while going.poll() is None and time.monotonic() < deadline:
            for name in before:
                node = deployed.processes.running[name]
                if node.poll() is not None:
                    ends.append((name, node.returncode))
                    deployed.processes.start(name, list(node.args))
            time.sleep(1.0)
        assert said(going) == f"{trial.run}: done\n"
        assert deployed.link.nodes() == before
    assert set(ends) == {("node-0", 0), ("node-1", 0)}
    with capsys.disabled():
        print(f" a SuperLink killed with its memory: {time.monotonic() - began:.0f} s ", end="")
    trial.check()


def process_words(process: psutil.Process, deployed: Federation) -> str:
    """The command of a process of this deployment; empty for others."""
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return ""
    return words if str(deployed.link.folder) in words else ""
