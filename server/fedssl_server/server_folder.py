"""A server's folder: what lies where in it, what server.toml says, and how one is made. All of it is its operator's alone (0700).

A run's folder is another one: this one holds what outlives a run (keys, who may join, Flower's database).
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedssl.checking import check_file
from fedssl.disk import write_whole, writing
from fedssl.errors import ConfigError

FILE, DATABASE, SECRET, LOGS, CURRENT, HEADS = "server.toml", "superlink.db", "superexec.secret", "logs", "current.json", "ledger_heads.json"
HERE = ("localhost", "127.0.0.1")
_FIRST = """\
# The server: where it listens, with which keys, for whom. Paths are relative to this file. All settings: server/README.md
[listen]
host = "{host}"    # who reaches this port reaches Flower's Control API too: before anybody else may, put a proxy in front
port = {port}

[tls]                   # bring your own: name its files here
ca = "ca.crt"
certificate = "server.crt"
key = "server.key"

[nodes]
keys = "nodes"          # every NAME.pub in this folder may join
# most_users = 1        # for devices of one person each: the most that a node may host

[rounds]
nodes = {nodes}               # a run begins when so many are there
"""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(_Section):
    """Where the SuperLink listens. ``name``: how this machine's own commands call it, which must be a name in its certificate."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    name: str = "127.0.0.1"


class Tls(_Section):
    """The certificate of the server, its key, and that of who signed it."""

    ca: str = "ca.crt"
    certificate: str = "server.crt"
    key: str = "server.key"


class Nodes(_Section):
    """The folder with the public keys of the nodes that may join, and what they may say of themselves.

    ``most_users``: so many users one node may host, and so its sums may be as long as theirs; 0: as many as it says. ``users``: they have the
    numbers 0 to ``users`` - 1; 0: up to the highest that a node says.
    """

    keys: str = "nodes"
    most_users: int = Field(default=0, ge=0)
    users: int = Field(default=0, ge=0, lt=2**31)


class Rounds(_Section):
    """How a run waits: for ``nodes`` up to ``nodes_seconds``, for the uploads of a round ``round_seconds``; ``tries``: in a row without a new checkpoint.

    ``reconnect_seconds``: within ``round_seconds``, for a node that dropped out to come back (0: not at all). ``least_fraction``: of the nodes that were
    asked, below which a round is not applied; ``when_fewer``: what the run does then.
    """

    nodes: int = Field(default=1, ge=1)
    nodes_seconds: float = Field(default=300.0, gt=0)
    round_seconds: float = Field(default=3600.0, gt=0)
    reconnect_seconds: float = Field(default=0.0, ge=0)
    least_fraction: float = Field(default=0.0, ge=0, le=1)
    when_fewer: Literal["stop", "continue"] = "stop"
    tries: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _reconnecting_ends_before_the_round(self) -> Rounds:
        if self.reconnect_seconds >= self.round_seconds:
            raise ValueError(
                f"reconnect_seconds = {self.reconnect_seconds:g} is not below round_seconds = {self.round_seconds:g}; who comes back needs time to train"
            )
        return self

    @property
    def environment(self) -> dict[str, str]:
        """That part of `ServerSettings.environment`."""
        return {
            "FEDSSL_NODES": str(self.nodes),
            "FEDSSL_NODES_SECONDS": str(self.nodes_seconds),
            "FEDSSL_ROUND_SECONDS": str(self.round_seconds),
            "FEDSSL_RECONNECT_SECONDS": str(self.reconnect_seconds),
            "FEDSSL_LEAST_FRACTION": str(self.least_fraction),
            "FEDSSL_WHEN_FEWER": self.when_fewer,
        }


class SuperLink(_Section):
    """Where Flower's SuperLink keeps who joined and the messages under way: in a database on the disk, or in memory, which holds many more nodes.

    What is in memory is gone with the process: its SuperNodes end, without an error, join again once they are started again (fedssl-node.service does so),
    and `fedssl server run` goes on from its checkpoint as after any crash.
    """

    state: Literal["disk", "memory"] = "disk"


class ServerSettings(_Section):
    """server.toml."""

    listen: Listen = Listen()
    tls: Tls = Tls()
    nodes: Nodes = Nodes()
    rounds: Rounds = Rounds()
    superlink: SuperLink = SuperLink()

    @property
    def environment(self) -> dict[str, str]:
        """What the ServerApp is told, which reads its environment alone."""
        return {**self.rounds.environment, "FEDSSL_USERS": str(self.nodes.users), "FEDSSL_USERS_OF_A_NODE": str(self.nodes.most_users)}


def make_server_folder(folder: Path, *, names: Sequence[str] = (), nodes: Sequence[str] = (), host: str = "127.0.0.1", port: int = 8000) -> None:
    """A new server's folder, with keys for a trial: of an authority, of the server for ``names`` and this machine's own, of ``nodes``.

    Raises ConfigError where there is a server already; DiskError where it cannot be written.
    """
    from fedssl_server.trial_keys import make_certificates, make_node_key

    if (folder / FILE).exists():
        raise ConfigError(f"{folder / FILE} is there already; its keys are in use. Begin another folder, or edit it")
    for name in nodes:
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"node {name!r}: wanted letters, digits, - and _, because files are named so")
    for name in names:
        if not all(part.replace("-", "").replace("_", "").isalnum() for part in re.split("[.:]+", name.strip(":"))):
            raise ConfigError(f"name {name!r}: no host name and no address; nodes would not find the server by it")
    with writing(folder):
        for one in (folder, folder / "nodes", folder / LOGS):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chmod(one, 0o700)
        descriptor = os.open(folder / SECRET, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    make_certificates(folder, list(dict.fromkeys([*HERE, *names])))
    for name in nodes:
        make_node_key(folder / "nodes", name)
    # Who finds half a folder here finds no settings in it.
    write_whole(folder / FILE, _FIRST.format(host=host, port=port, nodes=max(len(nodes), 1)))


def read_server(folder: Path) -> ServerSettings:
    """server.toml. Raises ConfigError where it cannot be read, is not right, a file it names is missing, or a key is open to others."""
    path = folder / FILE
    settings = check_file(ServerSettings, path, missing=f"{path}: no such file; make a server with `fedssl server init {folder}`")
    for name in (settings.tls.ca, settings.tls.certificate, settings.tls.key, SECRET):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / name}: no such file, and {path} needs it")
    for name in (settings.tls.key, SECRET):
        mode = stat.S_IMODE((folder / name).stat().st_mode)
        if mode & 0o077:
            raise ConfigError(f"{folder / name}: mode {mode:04o} lets others read it; chmod 0600 {folder / name}")
    return settings


def node_keys(folder: Path, settings: ServerSettings) -> dict[str, Path]:
    """The public keys of the nodes that may join, by name."""
    return {path.stem: path for path in sorted((folder / settings.nodes.keys).glob("*.pub"))}
