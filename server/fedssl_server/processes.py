"""Processes that are started together, watched, and ended to the last one, with a log file each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from fedssl.errors import FedSSLError


@dataclass
class Processes:
    """Processes by name. ``logs``: the folder of their logs; ``environment``: what all of them get."""

    logs: Path
    environment: dict[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, command: Sequence[str], extra: Mapping[str, str] | None = None) -> None:
        """Start a process whose output is added to its log.

        In a session of its own: its process group holds what it starts, and a Ctrl-C reaches only us, who end it in order.
        """
        with (self.logs / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.logs,
                env={**self.environment, **(extra or {})},
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise FedSSLError when a process has ended by itself."""
        for name, process in self.running.items():
            if process.poll() is not None:
                raise FedSSLError(f"{name} ended with {process.returncode}; its log:\n{self.log(name, lines=20)}")

    def wait_for_port(self, port: int, seconds: float, *, host: str = "127.0.0.1") -> None:
        """Return once something listens. Raises FedSSLError when a process ends, or after ``seconds``."""
        deadline = time.monotonic() + seconds
        while not listens(host, port):
            self.check()
            if time.monotonic() > deadline:
                raise FedSSLError(f"nothing listens on {host}:{port} after {seconds:.0f} s\n{self.all_logs(lines=10)}")
            time.sleep(0.05)

    def log(self, name: str, *, lines: int | None = None) -> str:
        """What a process wrote, or the end of it."""
        text = (self.logs / f"{name}.log").read_text(errors="replace")
        return text if lines is None else "\n".join(text.splitlines()[-lines:])

    def all_logs(self, *, lines: int | None = None) -> str:
        """What all processes wrote, each under its name."""
        return "\n".join(f"--- {name}\n{self.log(name, lines=lines)}" for name in self.running)

    def end(self, seconds: float) -> None:
        """End every process group, the last one first: ask, wait until ``seconds`` are over, kill. Reaps what was started here."""
        groups = [process.pid for process in reversed(self.running.values())]
        for step in (signal.SIGTERM, signal.SIGKILL):
            for group in groups:
                _signal(group, step)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                for process in self.running.values():
                    process.poll()
                groups = [group for group in groups if _signal(group, 0)]
                if not groups:
                    return
                time.sleep(0.05)


def program(name: str) -> str:
    """A command of the environment that this Python belongs to. Raises FedSSLError where it is not there."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise FedSSLError(f"{path}: no such command; install fedssl with its extra `server` into this environment, flwr comes with it")
    return str(path)


def flower_environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of Flower's processes: nothing is sent to anybody, nothing is installed; ``home``: where `flwr` keeps its own."""
    scripts = sysconfig.get_path("scripts")
    return {
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",  # Twenty questions a second: who has many devices on one machine says more in the environment.
        **os.environ,
        # A SuperExec starts `flwr-serverapp` and `flwr-clientapp` by name.
        "PATH": os.pathsep.join([scripts, str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


def listens(host: str, port: int) -> bool:
    """Whether a port takes connections."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0


def free_ports(number: int) -> list[int]:
    """Ports of 127.0.0.1 that are free now; held open together so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _signal(group: int, number: int) -> bool:
    """Signal a process group; False where nobody is left in it. Groups are those of processes started here, and never ours."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
