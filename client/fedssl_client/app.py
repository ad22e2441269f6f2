"""The ClientApp of a node: a thin door without torch. It hands a Download on, and brings the Upload back.

On a person's device the node's own config names the agent's training socket, and how the device calls this server
(``flower-supernode --node-config 'agent-socket="PATH" server="NAME"'``): all else is the agent's. A node without an agent, which hosts users for
a trial, has a folder there (``store="DIR"``) and starts a child process on it. Flower's simulation runtime writes that config itself, with a
``partition-id`` and no more; its nodes find ``node-<partition-id>`` in the folder that ``FEDSSL_STORES`` of their environment names. Never from
the run config: that one the server writes. What a failure says to the server names no history and no path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray

from fedssl import wire
from fedssl.errors import ConfigError, FedSSLError, WireError
from fedssl_client.store import users_of

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a Download with an Upload, or with an error that says what kind of failure it was."""
    try:
        download = wire.to_bytes(wire.download_from_record_dict(message.content))
        # From now on and not from when it was sent: the server's clock and this device's may be hours apart.
        seconds = message.metadata.ttl
        agent = _agent(context)
        if agent is None:
            upload, head = run_trainer(download, _store(context), seconds=seconds), None
        else:
            upload, head = ask_agent(download, *agent, seconds=seconds, known=wire.ledger_head_of(message.content))
        return Message(wire.with_ledger_head(wire.to_record_dict(wire.upload_from_bytes(upload)), head), reply_to=message)
    except FedSSLError as error:
        return _failed(message, error)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answer a Download whose phase is evaluation: the same way, and the person's policy says whether."""
    return train(message, context)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say which users this node hosts, and which formats it reads."""
    try:
        agent = _agent(context)
        users = users_of(Path(_store(context))) if agent is None else users_of_agent(agent[0])
        return Message(wire.hello_to_record_dict(wire.Hello(users)), reply_to=message)
    except FedSSLError as error:
        return _failed(message, error)


class TrainerFailed(FedSSLError):
    """The child process, or the agent, brought no Upload. Its words were chosen there and may leave the node."""


def ask_agent(download: bytes, socket: str, server: str, *, seconds: float, known: wire.LedgerHead | None = None) -> tuple[bytes, wire.LedgerHead | None]:
    """The Upload that the agent at ``socket`` gives, and the head of its ledger (None: of an agent that does not say it).

    ``known``: that head, as the server last heard of it. Raises TrainerFailed with the agent's words: the policy's reasons, that it is not now, or that the
    ledger was put back to an older one.
    Raises AgentError, whose words stay here, where no agent answers.
    """
    from fedssl_client.connection import AgentError, StatusCode, connect

    its_own = (StatusCode.PERMISSION_DENIED, StatusCode.FAILED_PRECONDITION, StatusCode.ABORTED, StatusCode.DATA_LOSS)
    rows, chain = known or (0, b"")
    try:
        with connect(f"unix:{socket}", "Training") as agent:
            fields = {"server": server, "download": download, "seconds": seconds, "known_rows": rows, "known_chain": chain}
            reply = agent.ask("Train", seconds=seconds, fields=fields)
            return reply.upload, (reply.ledger_rows, reply.ledger_chain) if reply.ledger_rows else None
    except AgentError as error:
        if error.code not in its_own:
            raise  # gRPC's words name the path.
        raise TrainerFailed(str(error)) from None


def users_of_agent(socket: str) -> NDArray[np.int64]:
    """The users of an agent's device. Raises AgentError."""
    from fedssl_client.connection import connect

    with connect(f"unix:{socket}", "Training") as agent:
        return np.array(agent.ask("Hello").users, dtype=np.int64)


def run_trainer(download: bytes, store: str, *, seconds: float) -> bytes:
    """One call of `fedssl_client.trainer.train` in a process of its own, ended after ``seconds``. Raises TrainerFailed."""
    command = [sys.executable, "-m", "fedssl_client.trainer", "--store", store]
    try:
        done = subprocess.run(command, input=download, stdout=subprocess.PIPE, timeout=max(seconds, 0.0), check=False)
    except subprocess.TimeoutExpired:
        raise TrainerFailed(f"training was ended after {seconds:.0f} s, when the download expired") from None
    if done.returncode == 1 and done.stdout:
        raise TrainerFailed(done.stdout.decode(errors="replace"))
    if done.returncode != 0:
        raise TrainerFailed(f"the training process ended with {done.returncode} (a negative number: by that signal); the node's own log may say more")
    return done.stdout


def _agent(context: Context) -> tuple[str, str] | None:
    """The agent's training socket and this server's name on the device; None for a node without an agent."""
    socket, server = context.node_config.get("agent-socket"), context.node_config.get("server")
    if socket is None:
        return None
    if not isinstance(socket, str) or not isinstance(server, str) or not socket or not server:
        raise ConfigError('a node with an agent names its socket and the server: --node-config \'agent-socket="PATH" server="NAME"\'')
    return socket, server


def _store(context: Context) -> str:
    store, partition, folder = context.node_config.get("store"), context.node_config.get("partition-id"), os.environ.get("FEDSSL_STORES", "")
    if store is None and folder and type(partition) is int:
        return str(Path(folder) / f"node-{partition}")
    if not isinstance(store, str) or not store:
        raise ConfigError(
            "this node's config names no store; start it with --node-config 'store=\"DIR\"', "
            "or under Flower's simulation runtime with FEDSSL_STORES=DIR in its environment, where DIR has node-0, node-1, ..."
        )
    return store


def _failed(message: Message, error: FedSSLError) -> Message:
    print(f"error: {error}", file=sys.stderr)
    reason = str(error) if isinstance(error, TrainerFailed | WireError) else f"{type(error).__name__} on the node; its own log says more"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
