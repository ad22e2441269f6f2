"""A whole deployment on this machine, for a trial or a test: SuperLink, SuperNodes and their SuperExecs, and an end to all of them.

What runs is what an operator starts: ``flower-superlink``, ``flower-supernode`` and ``flower-superexec`` as processes, a run
submitted with ``flwr run``, messages over HTTP on 127.0.0.1. Isolation is by process, so tasks need the secret that
only the SuperExecs hold. There is no TLS: nothing leaves this machine. A round costs some 4 to 6 seconds, nearly all
of it polling (a SuperNode sleeps 3 s when idle) and new processes.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fedssl_server

from fedssl.errors import FedSSLError

# The folder that `flwr run` packs; it ships inside the package.
FLOWER_APP = Path(fedssl_server.__file__).parent / "flower_app"
_CONNECTION = "trial"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: Flower's status (``finished:completed``, ``finished:failed``, ...), the seconds it took, the ServerApp's log."""

    status: str
    seconds: float
    log: str

    @property
    def is_completed(self) -> bool:
        """Whether the ServerApp came to its end without an error."""
        return self.status == "finished:completed"


@dataclass
class Federation:
    """A running deployment. ``folder`` holds its logs, one file a process."""

    folder: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *, seconds: float = 300.0, app: Path = FLOWER_APP) -> Outcome:
        """Submit the app and wait for its end. Raises FedSSLError when it is refused, a process dies, or time is up."""
        if not (app / "pyproject.toml").exists():
            raise FedSSLError(f"{app}: no Flower app there; it ships inside the package fedssl_server, so install fedssl again")
        start = time.monotonic()
        answer = self._flwr("run", str(app), _CONNECTION, "--format", "json")
        run_id = str(answer.get("run-id", ""))
        if not run_id:
            raise FedSSLError(f"`flwr run` was refused: {answer}; logs are in {self.folder}")
        # One process follows the run's log to its end, instead of asking again and again: each `flwr` costs a second of a core.
        with (self.folder / "serverapp.log").open("wb") as log:
            follow = self._command("log", run_id, _CONNECTION, "--stream")
            follower = subprocess.Popen(follow, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=self.environment)
        try:
            while follower.poll() is None:
                self.check()
                if time.monotonic() - start > seconds:
                    raise FedSSLError(f"run {run_id} has not ended after {seconds:.0f} s\n{self.log('serverapp', lines=20)}")
                time.sleep(0.1)
        finally:
            follower.kill()
            follower.wait()
        runs = self._flwr("ls", _CONNECTION, "--run-id", run_id, "--format", "json").get("runs")
        status = str(runs[0].get("status", "")) if isinstance(runs, list) and runs else "unknown"
        return Outcome(status, time.monotonic() - start, self.log("serverapp"))

    def check(self) -> None:
        """Raise FedSSLError when a process of the deployment has ended by itself."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise FedSSLError(f"{name} ended with {process.returncode}; its log:\n{self.log(name, lines=20)}")

    def log(self, name: str, *, lines: int | None = None) -> str:
        """What a process wrote, or the end of it."""
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return text if lines is None else "\n".join(text.splitlines()[-lines:])

    def logs(self, *, lines: int | None = None) -> str:
        """What all processes wrote, each under its name."""
        return "\n".join(f"--- {name}\n{self.log(name, lines=lines)}" for name in self.processes)

    def _start(self, name: str, command: Sequence[str], extra: Mapping[str, str] | None = None) -> None:
        # A session of its own: its process group holds what it starts, and a Ctrl-C reaches only us, who end it in order.
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**self.environment, **(extra or {})},
                start_new_session=True,
            )

    def _command(self, *words: str) -> list[str]:
        return [_program("flwr"), *words]

    def _flwr(self, *words: str) -> dict[str, object]:
        done = subprocess.run(self._command(*words), capture_output=True, cwd=self.folder, env=self.environment, timeout=120, check=False)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise FedSSLError(f"`flwr {words[0]}` ended with {done.returncode}: {(done.stderr or done.stdout).decode(errors='replace').strip()[-2000:]}")
        return answer


@contextmanager
def federation(
    stores: Sequence[Path], run_dir: Path, *, environment: Mapping[str, str] | None = None, start_seconds: float = 60.0, stop_seconds: float = 10.0
) -> Iterator[Federation]:
    """A deployment with one SuperNode a store, up when the block begins and gone, to the last process, when it ends.

    ``run_dir``: the run folder of the ServerApp. ``environment``: added to that of all processes. ``start_seconds``: time
    for everything to come up; ``stop_seconds``: how long the processes have to end by themselves, then they are killed.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedssl-federation-", ignore_cleanup_errors=True)))
        secret = folder / "superexec.secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32))
        home = folder / "flwr"
        home.mkdir()
        link, *ports = _free_ports(1 + len(stores))
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
        )
        running = Federation(folder, _environment(home, environment))
        stack.callback(_end, running, stop_seconds)

        guard = ["--insecure", "--superexec-auth-secret-file", str(secret)]
        isolated = [*guard, "--isolation", "process"]
        running._start("superlink", [_program("flower-superlink"), "--host", "127.0.0.1", "--port", str(link), *isolated])
        _wait_for_port(running, link, start_seconds)
        for number, (store, port) in enumerate(zip(stores, ports, strict=True)):
            config = f"partition-id={number} store={json.dumps(str(store.resolve()))}"
            where = ["--superlink", f"127.0.0.1:{link}", "--port", str(port), "--node-config", config]
            running._start(f"supernode-{number}", [_program("flower-supernode"), *where, *isolated])
        superexec = [_program("flower-superexec"), *guard, "--parent-pid", str(os.getpid()), "--runtime-api-address"]
        # Run folder and expected nodes reach the ServerApp through its process alone.
        server = {"FEDSSL_RUN_DIR": str(run_dir.resolve()), "FEDSSL_NODES": str(len(stores)), "FEDSSL_NODES_SECONDS": str(start_seconds)}
        running._start("superexec-server", [*superexec, f"127.0.0.1:{link}"], server)
        for number, port in enumerate(ports):
            _wait_for_port(running, port, start_seconds)
            running._start(f"superexec-{number}", [*superexec, f"127.0.0.1:{port}"])
        yield running


def _environment(home: Path, extra: Mapping[str, str] | None) -> dict[str, str]:
    scripts = sysconfig.get_path("scripts")
    return {
        **os.environ,
        # A SuperExec starts `flwr-serverapp` and `flwr-clientapp` by name.
        "PATH": os.pathsep.join([scripts, str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


def _program(name: str) -> str:
    """A command of the environment that this Python belongs to."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise FedSSLError(f"{path}: no such command; install fedssl with its extra `sim` into this environment, flwr comes with it")
    return str(path)


def _free_ports(number: int) -> list[int]:
    """Ports that are free now; held open together so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_for_port(running: Federation, port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        running.check()
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            raise FedSSLError(f"nothing listens on 127.0.0.1:{port} after {seconds:.0f} s\n{running.logs(lines=10)}")
        time.sleep(0.05)


def _end(running: Federation, seconds: float) -> None:
    """End every process group, nodes before the link: ask, wait until ``seconds`` are over, kill. Reaps what was started here."""
    groups = [process.pid for process in reversed(running.processes.values())]
    for step in (signal.SIGTERM, signal.SIGKILL):
        for group in groups:
            _signal(group, step)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for process in running.processes.values():
                process.poll()
            groups = [group for group in groups if _signal(group, 0)]
            if not groups:
                return
            time.sleep(0.05)


def _signal(group: int, number: int) -> bool:
    """Signal a process group; False where nobody is left in it. Groups are those of processes started here, and never ours."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
