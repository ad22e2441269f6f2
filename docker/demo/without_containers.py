"""What compose.yaml shows, on this machine without containers: three people's devices record, train over a SuperLink, and recommend (`make federation`).

The same first model, run and apps, TLS and node authentication. What is not there is what containers are for: everything runs as you.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from contextlib import ExitStack
from pathlib import Path

from fedssl_client.device_folder import app_socket, make_device_folder, training_socket
from fedssl_client.importing import import_model
from fedssl_client.policy import FILE, read_policy
from fedssl_server.processes import Processes, program
from fedssl_simulations.federation import federation

PEOPLE, SERVER = ("anna", "ben", "cleo"), "demo"
HERE = Path(__file__).parent
SECONDS = 600.0
"""The longest that anything may take on a machine that is busy."""


class App(threading.Thread):
    """A person's app, as a process whose lines are printed with the name before them. ``trainings``: how many it last told of."""

    def __init__(self, name: str, number: int, socket: Path):
        super().__init__(daemon=True)
        self.person, self.trainings = name, 0
        self._process = subprocess.Popen([sys.executable, str(HERE / "app.py"), str(number), f"unix:{socket}"], stdout=subprocess.PIPE, text=True)
        self.start()

    def run(self) -> None:
        """Print what the app says until it ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.trainings = json.loads(line).get("trainings", self.trainings)
            print(f"{self.person}: {line}", end="", flush=True)

    def end(self) -> None:
        """End the app."""
        self._process.terminate()
        self._process.wait()
        self.join()


def main(place: Path, stack: ExitStack) -> int:
    """Everything, in ``place``: 0 where the run ended and every device took part in all of its rounds."""
    print("the first model, from people who do not exist", flush=True)
    subprocess.run([sys.executable, str(HERE / "model.py"), str(place / "model")], check=True, stdout=subprocess.DEVNULL)
    rounds = tomllib.loads((place / "model" / "run.toml").read_text())["server"]["rounds"]
    (place / "logs").mkdir()
    agents = Processes(place / "logs", {**os.environ})
    stack.callback(agents.end, 20.0)
    nodes, apps = [], []
    for number, name in enumerate(PEOPLE):
        folder = place / name
        make_device_folder(folder, user=number)
        (folder / FILE).write_text(f"user = {number}\n{(HERE / 'device.toml').read_text()}")
        import_model(folder, place / "model" / "device")
        agents.start(name, [program("fedssl"), "device", "run", str(folder)])
        nodes.append({"agent-socket": str(training_socket(folder, read_policy(folder))), "server": SERVER})
    print("a SuperLink, with TLS and keys of its nodes; a SuperNode for each device, whose agent runs", flush=True)
    with federation(nodes, None, start_seconds=SECONDS) as deployed:
        for number, name in enumerate(PEOPLE):
            apps.append(App(name, number, app_socket(place / name)))
            stack.callback(apps[-1].end)
        command = [program("fedssl"), "server", "run", str(deployed.link.folder), str(place / "model" / "run.toml")]
        operator = [*command, "--catalogue", str(place / "model" / "catalogue.jsonl"), "--out", str(place / "run")]
        code = subprocess.run(operator, env=deployed.processes.environment, timeout=SECONDS, check=False).returncode
        deadline = time.monotonic() + 60.0
        while code == 0 and min(app.trainings for app in apps) < rounds and time.monotonic() < deadline:
            time.sleep(0.5)
        for line in map(json.loads, (place / "run" / "metrics.jsonl").read_text().splitlines()):
            print(f"server: {line['phase']}, round {line['round']}: {line['users']} users, {line['seconds']:.0f} s", flush=True)
    short = [app.person for app in apps if app.trainings < rounds]
    print(f"not all devices trained: {', '.join(short)}" if short else f"three devices recorded, trained {rounds} rounds and recommend from what they learned")
    return int(code != 0 or bool(short))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="fedssl-demo-", ignore_cleanup_errors=True) as folder, ExitStack() as at_the_end:
        sys.exit(main(Path(folder), at_the_end))
