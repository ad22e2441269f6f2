"""A whole deployment on this machine, for a trial or a test: SuperLink, SuperNodes and their SuperExecs, and an end to all of them.

What runs is what an operator starts: a server's folder as `fedssl server init` makes it, `fedssl server start` on it,
``flower-supernode`` and ``flower-superexec`` as processes, a run submitted with ``flwr run``, messages over TLS on
127.0.0.1, nodes that prove who they are. Nearly all of a round's time is polling (a SuperNode sleeps 3 s when idle) and
new processes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedssl_server.link import FLOWER_APP, REGISTERED, Link, Outcome
from fedssl_server.processes import Processes, free_ports, program
from fedssl_server.server_folder import FILE as SETTINGS
from fedssl_server.server_folder import SECRET, make_server_folder

from fedssl.errors import FedSSLError


@dataclass
class Federation:
    """A running deployment. ``processes`` holds its processes, a log file each."""

    link: Link
    processes: Processes

    def run(self, *, seconds: float = 300.0, app: Path = FLOWER_APP) -> Outcome:
        """Submit the app and wait for its end. Raises FedSSLError when it is refused, a process dies, or time is up."""
        return self.link.follow(self.link.submit(app), self.processes, seconds=seconds)

    def logs(self, *, lines: int | None = None) -> str:
        """What all processes wrote, each under its name."""
        return self.processes.all_logs(lines=lines)


@contextmanager
def federation(
    stores: Sequence[Path | Mapping[str, str]],
    run_dir: Path | None,
    *,
    environment: Mapping[str, str] | None = None,
    as_user: Mapping[int, OtherUser] | None = None,
    settings: str = "",
    start_seconds: float = 60.0,
    stop_seconds: float = 30.0,
) -> Iterator[Federation]:
    """A deployment with one SuperNode a store, up when the block begins and gone, to the last process, when it ends.

    A store is a node's folder, or the whole node config of one that has an agent (``{"agent-socket": PATH, "server": NAME}``).
    ``run_dir``: the run folder of the ServerApp; None: `fedssl server run` will bring it. ``environment``: added to that of all processes.
    ``as_user``: stores by number whose SuperNode, and so all that a server ships to it, runs as another user. ``settings``: added to server.toml, whose
    last section is [rounds].
    ``start_seconds``: time for everything to come up; ``stop_seconds``: how long the processes have to end by themselves, then they are killed.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedssl-federation-", ignore_cleanup_errors=True)))
        homes = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedssl-nodes-", ignore_cleanup_errors=True)))
        homes.chmod(0o711)
        port, *ports = free_ports(1 + len(stores))
        names = [f"node-{number}" for number in range(len(stores))]
        make_server_folder(folder, nodes=names, port=port)
        with (folder / SETTINGS).open("a") as file:
            file.write(settings)
        link = Link(folder, dict(environment or {}))
        processes = link.processes()
        stack.callback(processes.end, stop_seconds)
        processes.start("start", [program("fedssl"), "server", "start", str(folder)])
        processes.wait_for_port(port, start_seconds)
        _wait_for_keys(link, names, processes, start_seconds)
        nodes = [
            Node(homes / name, link, name, store, local, (as_user or {}).get(number))
            for number, (name, store, local) in enumerate(zip(names, stores, ports, strict=True))
        ]
        for node in nodes:
            processes.start(node.name, node.supernode)
        if run_dir is not None:
            link.start_superexec(processes, run_dir)
        for node in nodes:
            processes.wait_for_port(node.port, start_seconds)
            processes.start(f"superexec-{node.name}", node.superexec)
        yield Federation(link, processes)


@dataclass(frozen=True)
class OtherUser:
    """Who runs a node's SuperNode and its SuperExec, started by root. ``programs``: a folder of Flower's commands that this user may run."""

    uid: int
    programs: Path
    environment: Mapping[str, str]

    def before(self, home: Path) -> list[str]:
        """What a command begins with so that this user runs it, in and with a folder of their own (setpriv: util-linux)."""
        own = {**self.environment, "HOME": str(home), "FLWR_HOME": str(home), "PATH": f"{self.programs}{os.pathsep}{os.environ.get('PATH', '')}"}
        words = [f"{name}={value}" for name, value in own.items()]
        return ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "env", f"--chdir={home}", *words]


class Node:
    """A device's side: a folder ``home`` with the server's certificate, the node's key and a secret, and the two commands that run from it.

    ``store``: a node's folder, or a node config. ``port``: where the SuperExec reaches the SuperNode. ``user``: None: our own.
    """

    def __init__(self, home: Path, link: Link, name: str, store: Path | Mapping[str, str], port: int, user: OtherUser | None = None):
        self.name, self.port = name, port
        home.mkdir(mode=0o700)
        for source, copy in ((link.ca, "ca.crt"), (link.folder / "nodes" / f"{name}.key", "node.key"), (link.folder / SECRET, SECRET)):
            shutil.copy(source, home / copy)
        own = {"store": str(store.resolve())} if isinstance(store, Path) else store
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in own.items())
        supernode, superexec = [program("flower-supernode")], [program("flower-superexec")]
        if user is not None:
            for path in (home, *home.iterdir()):
                os.chown(path, user.uid, user.uid)
            supernode, superexec = ([*user.before(home), str(user.programs / Path(words[0]).name)] for words in (supernode, superexec))
        secret = ["--superexec-auth-secret-file", str(home / SECRET)]
        proof = ["--root-certificates", str(home / "ca.crt"), "--auth-supernode-private-key", str(home / "node.key")]
        where = ["--superlink", link.address, "--port", str(port), "--node-config", config]
        self.supernode = [*supernode, *where, *proof, "--isolation", "process", *secret]
        # Between a SuperNode and its SuperExec nothing leaves the device: no TLS there.
        self.superexec = [*superexec, "--insecure", *secret, "--runtime-api-address", f"127.0.0.1:{port}"]
        if user is None:  # Another user cannot tell whether our process is there.
            self.superexec += ["--parent-pid", str(os.getpid())]


def _wait_for_keys(link: Link, names: Sequence[str], processes: Processes, seconds: float) -> None:
    """Return once the SuperLink knows these nodes. Raises FedSSLError when it ends, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if set(json.loads((link.folder / REGISTERED).read_text())) >= set(names):
                return
        except FileNotFoundError:
            pass
        processes.check()
        if time.monotonic() > deadline:
            raise FedSSLError(f"not all of {len(names)} nodes could be registered in {seconds:.0f} s\n{processes.all_logs(lines=10)}")
        time.sleep(0.1)
