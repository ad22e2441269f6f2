"""A server as an operator has it, for a trial: the processes of `fedssl server init`, `start` and `run`, and how much memory and CPU they take."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from fedssl_server.processes import free_ports, listens
from fedssl_server.server_folder import make_server_folder
from fedssl_server.trial_keys import make_node_key
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedssl.disk import write_whole

FEDSSL = [str(Path(sys.executable).with_name("fedssl"))]


class TrialServer:
    """`fedssl server start` on a new folder, with the keys of ``nodes`` in it. ``rounds``: the values of its section [rounds].

    ``here``: another address of this machine, by which nodes reach it too. ``state``: where the SuperLink keeps its own.
    """

    def __init__(self, folder: Path, nodes: Sequence[str], *, rounds: Mapping[str, float], here: str | None = None, state: str = "disk"):
        self.folder, self.nodes = folder, list(nodes)
        self.port = free_ports(1)[0]
        make_server_folder(folder, port=self.port, names=[here] if here else [], host="0.0.0.0" if here else "127.0.0.1")
        text = (folder / "server.toml").read_text()
        head = text[: text.index("[rounds]")]
        waits = "".join(f"{name} = {value}\n" for name, value in rounds.items())
        write_whole(folder / "server.toml", f'{head}[rounds]\n{waits}[superlink]\nstate = "{state}"\n')
        (folder / "keys").mkdir()
        for name in nodes:
            make_node_key(folder / "keys", name)
        self.starting: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def ca(self) -> Path:
        """The certificate of who signed the server's."""
        return self.folder / "ca.crt"

    def key(self, name: str) -> Path:
        """The private key of a node."""
        return self.folder / "keys" / f"{name}.key"

    def start(self) -> None:
        """Start it, wait until it listens, and let the nodes join."""
        self.starting = self.command("start")
        end = time.monotonic() + 320
        while not listens("127.0.0.1", self.port):
            if time.monotonic() > end or self.starting.poll() is not None:
                sys.exit(f"the SuperLink does not come up; see {self.folder}/*.log")
            time.sleep(0.1)
        self._register()

    def _register(self) -> None:
        """What `fedssl server start` does for each new key by a `flwr supernode register` of its own, a second each, over one connection."""
        known = {}
        with ControlHttpClient.from_server_address(self.address, False, str(self.ca), [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]) as control:
            for name in self.nodes:
                public = load_ssh_public_key((self.folder / "keys" / f"{name}.pub").read_bytes())
                known[name] = str(control.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(public), name=name)).node_id)
        write_whole(self.folder / "registered.json", json.dumps(known))
        for name in self.nodes:
            os.rename(self.folder / "keys" / f"{name}.pub", self.folder / "nodes" / f"{name}.pub")

    def command(self, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        """`fedssl server WHAT` on the folder; its words are added to WHAT.log there."""
        with (self.folder / f"{what}.log").open("ab") as log:
            return subprocess.Popen([*FEDSSL, "server", what, str(self.folder), *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end(self) -> None:
        """End `start`, and with it the SuperLink."""
        if self.starting is not None and self.starting.poll() is None:
            self.starting.send_signal(signal.SIGTERM)
            self.starting.wait(60)


class Watch(threading.Thread):
    """The largest RSS and the CPU seconds of process trees, by the name of their program, sampled twice a second until `stop`."""

    def __init__(self, roots: Sequence[int]):
        super().__init__(daemon=True)
        self._roots, self._end = [psutil.Process(root) for root in roots], threading.Event()
        self.bytes: dict[str, int] = {}
        self._seconds: dict[tuple[str, int], float] = {}
        self.start()

    def run(self) -> None:
        while not self._end.wait(0.5):
            for root in self._roots:
                try:
                    for each in [root, *root.children(recursive=True)]:
                        name = _program(each)
                        self.bytes[name] = max(self.bytes.get(name, 0), each.memory_info().rss)
                        used = each.cpu_times()
                        self._seconds[name, each.pid] = used.user + used.system
                except psutil.Error:
                    continue

    @property
    def seconds(self) -> dict[str, float]:
        """CPU seconds by program."""
        found: dict[str, float] = {}
        for (name, _), used in self._seconds.items():
            found[name] = found.get(name, 0.0) + used
        return found

    def stop(self) -> None:
        self._end.set()
        self.join()


def _program(process: psutil.Process) -> str:
    """flower-superlink, flwr-serverapp, ...; or the command of `fedssl`."""
    words = process.cmdline()
    names = [Path(word).name for word in words[:3]]
    found = next((name for name in names if name.startswith(("flower-", "flwr"))), None)
    return found or (f"fedssl server {words[words.index('server') + 1]}" if "server" in words else names[0] if names else "?")
