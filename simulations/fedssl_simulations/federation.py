"""A whole deployment on this machine, for a trial or a test: SuperLink, SuperNodes and their SuperExecs, and an end to all of them.

What runs is what an operator starts: a server's folder as `fedssl server init` makes it, ``flower-superlink``,
``flower-supernode`` and ``flower-superexec`` as processes, a run submitted with ``flwr run``, messages over TLS on
127.0.0.1, nodes that prove who they are. A round costs some 4 to 6 seconds, nearly all of it polling (a SuperNode sleeps
3 s when idle) and new processes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedssl_server.link import FLOWER_APP, Link, Outcome
from fedssl_server.processes import Processes, free_ports, program
from fedssl_server.server_folder import SECRET, make_server_folder


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
    run_dir: Path,
    *,
    environment: Mapping[str, str] | None = None,
    start_seconds: float = 60.0,
    stop_seconds: float = 10.0,
) -> Iterator[Federation]:
    """A deployment with one SuperNode a store, up when the block begins and gone, to the last process, when it ends.

    A store is a node's folder, or the whole node config of one that has an agent (``{"agent-socket": PATH, "server": NAME}``).
    ``run_dir``: the run folder of the ServerApp. ``environment``: added to that of all processes. ``start_seconds``: time
    for everything to come up; ``stop_seconds``: how long the processes have to end by themselves, then they are killed.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedssl-federation-", ignore_cleanup_errors=True)))
        port, *ports = free_ports(1 + len(stores))
        names = [f"node-{number}" for number in range(len(stores))]
        make_server_folder(folder, nodes=names, port=port)
        link = Link(folder, dict(environment or {}))
        processes = link.processes()
        stack.callback(processes.end, stop_seconds)
        link.start(processes, start_seconds)
        link.let_join()
        secret = ["--superexec-auth-secret-file", str(folder / SECRET)]
        for name, store, local in zip(names, stores, ports, strict=True):
            start_node(processes, link, name, store, local, secret)
        link.start_superexec(processes, run_dir)
        # Between a SuperNode and its SuperExec nothing leaves the device: no TLS there.
        superexec = [program("flower-superexec"), "--insecure", *secret, "--parent-pid", str(os.getpid()), "--runtime-api-address"]
        for name, local in zip(names, ports, strict=True):
            processes.wait_for_port(local, start_seconds)
            processes.start(f"superexec-{name}", [*superexec, f"127.0.0.1:{local}"])
        yield Federation(link, processes)


def start_node(processes: Processes, link: Link, name: str, store: Path | Mapping[str, str], port: int, secret: Sequence[str]) -> None:
    """Start a SuperNode with the key that `fedssl server init` made for it; its SuperExec reaches it at ``port``."""
    own = {"store": str(store.resolve())} if isinstance(store, Path) else store
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in own.items())
    proof = ["--root-certificates", str(link.ca), "--auth-supernode-private-key", str(link.folder / "nodes" / f"{name}.key")]
    where = ["--superlink", link.address, "--port", str(port), "--node-config", config]
    processes.start(name, [program("flower-supernode"), *where, *proof, "--isolation", "process", *secret])
