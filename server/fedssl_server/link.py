"""Flower's SuperLink as a server's folder says: its command, what is asked of it, and who may join.

TLS and node authentication are always on. Isolation is by process: a task goes only to who holds the secret of the SuperExecs.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedssl.disk import write_whole
from fedssl.errors import ConfigError, FedSSLError
from fedssl_server.ledger_heads import digest, note_key, noted_keys, read_names
from fedssl_server.processes import Processes, flower_environment, listens, program
from fedssl_server.server_folder import DATABASE, HEADS, LOGS, SECRET, ServerSettings, node_keys, read_server
from fedssl_server.trial_keys import MAKE_KEY, check_key

FLOWER_APP = Path(__file__).parent / "flower_app"
"""All that `flwr run` packs and sends; it ships inside the package."""
REGISTERED = "registered.json"
KEY_IS_KNOWN = "Public key already in use"
"""Flower's words for it."""
ASK_SECONDS = 120.0
"""How long the SuperLink may take to answer."""


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


class Link:
    """The SuperLink of a server's folder, whether it runs or not.

    ``environment``: added to that of what is started. Raises ConfigError where the folder is not a server's.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder.resolve()
        self.settings: ServerSettings = read_server(self.folder)
        home = self.folder / "flwr"
        home.mkdir(mode=0o700, exist_ok=True)
        address = f"{self.settings.listen.name}:{self.settings.listen.port}"
        # JSON's strings are TOML's.
        connection = f"address = {json.dumps(address)}\nroot-certificates = {json.dumps(str(self.ca))}\n"
        write_whole(home / "config.toml", f'[superlink]\ndefault = "server"\n\n[superlink.server]\n{connection}')
        self.address = address
        self.environment = flower_environment(home, environment)

    @property
    def ca(self) -> Path:
        """The certificate of who signed the server's."""
        return self.folder / self.settings.tls.ca

    def processes(self) -> Processes:
        """Nothing yet, with logs in this folder."""
        return Processes(self.folder / LOGS, self.environment)

    def start(self, processes: Processes, seconds: float = 300.0) -> None:
        """Start the SuperLink, and wait until it listens. Raises FedSSLError where it does not come up."""
        tls, listen = self.settings.tls, self.settings.listen
        if listens(listen.name, listen.port):
            raise FedSSLError(f"{self.address}: something listens there already; end it, or change [listen] port in server.toml")
        certificates = ["--ssl-ca-certfile", str(self.ca), "--ssl-certfile", str(self.folder / tls.certificate), "--ssl-keyfile", str(self.folder / tls.key)]
        guards = ["--enable-supernode-auth", "--isolation", "process", "--superexec-auth-secret-file", str(self.folder / SECRET)]
        where = ["--host", listen.host, "--port", str(listen.port)]
        if self.settings.superlink.state == "disk":
            where += ["--database", str(self.folder / DATABASE)]
        else:
            (self.folder / REGISTERED).unlink(missing_ok=True)  # A new SuperLink knows nobody.
        processes.start("superlink", [program("flower-superlink"), *where, *certificates, *guards])
        processes.wait_for_port(listen.port, seconds, host=listen.name)

    def start_superexec(self, processes: Processes, run: Path) -> None:
        """Start what runs the ServerApp. The run folder reaches it through its process alone: a run config would go to every node."""
        extra = {"FEDSSL_RUN_DIR": str(run.resolve()), **self.settings.environment, "FEDSSL_LEDGER_HEADS": str(self.folder / HEADS)}
        guards = ["--root-certificates", str(self.ca), "--superexec-auth-secret-file", str(self.folder / SECRET)]
        command = [program("flower-superexec"), *guards, "--parent-pid", str(os.getpid()), "--runtime-api-address", self.address]
        processes.start("superexec", command, extra)

    def let_join(self) -> Iterator[str]:
        """Unregister the nodes whose keys are gone or others, and register those whose keys are new; what changed, or was refused, in words as it happens.

        What is wrong with one node's key keeps no other out. Raises FedSSLError where the SuperLink does not answer, RunFolderError, before
        it is asked, where the nodes of before cannot be read.
        """
        path, keys = self.folder / REGISTERED, node_keys(self.folder, self.settings)
        known, noted = self._registered(), noted_keys(self.folder)
        digests: dict[str, str] = {}
        for name, key in keys.items():
            try:
                digests[name] = digest(key)
            except ConfigError as error:
                yield f"error: {error}"
        # Where it was never noted, or cannot be read now, it counts as the key that was registered.
        replaced = {name for name, number in known.items() if noted.get(number, digests.get(name)) != digests.get(name, noted.get(number))}
        for name in sorted(replaced | (known.keys() - keys.keys())):
            self.ask("supernode", "unregister", known.pop(name))
            write_whole(path, json.dumps(known))
            yield f"node {name} may join no longer" + (" with the key of before" if name in keys else "")
        for name in sorted(digests):
            if name in known and known[name] not in noted:
                note_key(self.folder, known[name], digests[name])
            elif name not in known:
                shared = [other for other in known if digests.get(other) == digests[name]]
                try:
                    if shared:
                        raise ConfigError(f"{keys[name]}: the key of node {shared[0]}; let this node make its own: `{MAKE_KEY}`")
                    known[name] = self._register(name, keys[name], known)
                except ConfigError as error:
                    yield f"error: {error}"
                    continue
                note_key(self.folder, known[name], digests[name])
                write_whole(path, json.dumps(known))
                yield f"node {name} may join"

    def _register(self, name: str, key: Path, known: dict[str, str]) -> str:
        """Flower's number of a node: registered now, or by a server that was killed before it had noted it. Raises ConfigError for what is no new key."""
        check_key(key)
        try:
            return str(self.ask("supernode", "register", str(key), "--name", name)["node-id"])
        except FedSSLError as error:
            if KEY_IS_KNOWN in str(error):
                others = sorted(self._status_of_nodes().keys() - set(known.values()))
                if len(others) == 1:
                    return others[0]
                which = f"its number is one of {', '.join(others)}; end it with `FLWR_HOME={self.folder / 'flwr'} flwr supernode unregister NUMBER`"
                raise ConfigError(f"{key}: registered already, by another hand than ours: {which}") from None
            raise

    def _registered(self) -> dict[str, str]:
        """Flower's numbers of the nodes that were registered, by name. Raises RunFolderError where the file cannot be read."""
        return read_names(self.folder / REGISTERED, str, "put it back, or remove it: it is made anew, where Flower knows no other nodes")

    def submit(self, app: Path = FLOWER_APP) -> str:
        """Submit the app; Flower's number of the run. Raises FedSSLError where it is refused."""
        if not (app / "pyproject.toml").exists():
            raise FedSSLError(f"{app}: no Flower app there; it ships inside the package fedssl_server, so install fedssl again")
        return str(self.ask("run", str(app))["run-id"])

    def follow(
        self,
        number: str,
        processes: Processes,
        *,
        seconds: float | None = None,
        log_name: str = "serverapp",
        is_lost: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Wait for the end of a run. Raises FedSSLError when a process dies, ``is_lost`` says that the ServerApp has died, or time is up."""
        start = time.monotonic()
        # One process follows the run's log to its end, instead of asking again and again: each `flwr` costs a second of a core.
        path = processes.logs / f"{log_name}.log"
        with path.open("ab") as log:
            begin = log.tell()
            follower = subprocess.Popen(
                [program("flwr"), "log", number, "--stream"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=self.environment
            )

        def said() -> str:
            with path.open("rb") as file:
                file.seek(begin)
                return file.read().decode(errors="replace")

        try:
            while follower.poll() is None:
                processes.check()
                if is_lost():
                    raise FedSSLError(f"the ServerApp of run {number} has died; its log: {path}")
                if seconds is not None and time.monotonic() - start > seconds:
                    end = "\n".join(said().splitlines()[-20:])
                    raise FedSSLError(f"run {number} has not ended after {seconds:.0f} s\n{end}")
                time.sleep(0.1)
        finally:
            follower.kill()
            follower.wait()
        return Outcome(self.status(number), time.monotonic() - start, said())

    def status(self, number: str) -> str:
        """Flower's status of a run. Raises FedSSLError where the SuperLink cannot be asked."""
        runs = self.ask("ls", "--run-id", number).get("runs")
        return str(runs[0].get("status", "")) if isinstance(runs, list) and runs else "unknown"

    def nodes(self) -> dict[str, str]:
        """Flower's status of each node that may join, by name. Raises FedSSLError where the SuperLink cannot be asked."""
        status = self._status_of_nodes()
        return {name: status.get(number, "unknown") for name, number in self._registered().items()}

    def _status_of_nodes(self) -> dict[str, str]:
        """Flower's status of each node that may join, by Flower's number."""
        listed = self.ask("supernode", "list").get("nodes")
        return {str(node["node-id"]): str(node["status"]) for node in listed if node["status"] != "unregistered"} if isinstance(listed, list) else {}

    def stop(self, number: str) -> None:
        """End a run at once. Raises FedSSLError where it is over already."""
        self.ask("stop", number)

    def ask(self, *words: str) -> dict[str, object]:
        """What Flower's own command answers. Raises FedSSLError where it fails."""
        command = [program("flwr"), *words, "--format", "json"]
        try:
            done = subprocess.run(command, capture_output=True, cwd=self.folder, env=self.environment, timeout=ASK_SECONDS, check=False)
        except subprocess.TimeoutExpired:  # Such as of a SuperLink that was killed while it was asked.
            raise FedSSLError(f"`flwr {' '.join(words)}` has no answer after {ASK_SECONDS:.0f} s; logs are in {self.folder / LOGS}") from None
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-2000:]
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or answer.get("success") is False:
            raise FedSSLError(f"`flwr {' '.join(words)}` ended with {done.returncode}: {answer or said}; logs are in {self.folder / LOGS}")
        return answer
