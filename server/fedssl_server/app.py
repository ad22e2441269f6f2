"""The ServerApp: find the run folder, wait for the nodes, ask each who it is, and hand over to the loop of rounds.

Everything is read from this process's environment, never from the run config, which reaches every node:
``FEDSSL_RUN_DIR`` (the run folder), ``FEDSSL_NODES`` (nodes to wait for, default 1), ``FEDSSL_NODES_SECONDS`` (how long, default
300), ``FEDSSL_ROUND_SECONDS`` (how long a round waits for uploads, default 3600), ``FEDSSL_RECONNECT_SECONDS`` (for a node that dropped out, default
0), ``FEDSSL_LEAST_FRACTION`` (of the asked nodes, default 0), ``FEDSSL_WHEN_FEWER`` (stop or continue, default stop), ``FEDSSL_USERS`` (their numbers
are below it), ``FEDSSL_USERS_OF_A_NODE`` (the most; both default 0: as the nodes say) and ``FEDSSL_LEDGER_HEADS`` (the file of nodes' ledgers' heads; without
it one in the run folder).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedssl import wire
from fedssl.errors import ConfigError, FedSSLError, RunFolderError, WireError
from fedssl.log_lines import logged, note, note_failure
from fedssl.recipe import RECIPE_FORMAT
from fedssl.run_lock import held
from fedssl_server.at_work import at_work
from fedssl_server.run_settings import HALT

app = ServerApp()
LOG = logging.getLogger("fedssl.server")


class Waits(TypedDict):
    """What `fedssl_server.serve.serve` is told of nodes that are late or drop out, and of whom it may take."""

    deadline_seconds: float
    reconnect_seconds: float
    least_fraction: float
    goes_on: bool
    num_users: int
    most_users: int
    ledger_heads: Path | None


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or resume, the run of the folder in the environment. A FedSSLError is one clear line, and the run fails."""
    try:
        folder = run_folder()
        with at_work(folder), logged(LOG, folder / "log.jsonl"):
            try:
                _serve(grid, folder)
            except BaseException:
                note_failure(LOG, "run stopped")
                raise
    except FedSSLError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise


def run_folder() -> Path:
    """The folder that FEDSSL_RUN_DIR names. Raises RunFolderError where there is none."""
    name = os.environ.get("FEDSSL_RUN_DIR", "")
    if not name:
        raise RunFolderError("FEDSSL_RUN_DIR is not set; start the server's flower-superexec with FEDSSL_RUN_DIR=<run folder> in its environment")
    if not Path(name).is_dir():
        raise RunFolderError(f"FEDSSL_RUN_DIR={name}: no such folder; make it, with run.toml and catalogue.jsonl in it")
    return Path(name)


def wait_for_nodes(grid: Grid, expected: int, seconds: float) -> list[int]:
    """Ids of the nodes that are there, sorted, once there are ``expected``. Raises FedSSLError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while len(nodes := sorted(grid.get_node_ids())) < expected:
        if time.monotonic() > deadline:
            fewer = f", or wait for {len(nodes)} ([rounds] nodes in server.toml, else FEDSSL_NODES)" if nodes else ""
            raise FedSSLError(f"{len(nodes)} of {expected} nodes after {seconds:.0f} s; start the missing flower-supernodes{fewer}")
        time.sleep(0.2)
    return nodes


def say_hello(grid: Grid, nodes: Iterable[int], seconds: float, *, at_least: int | None = None) -> dict[int, wire.Hello]:
    """What each node says of itself, in the order of ``nodes``.

    A node that fails, speaks another format or is silent for ``seconds`` is left out, and said. Raises WireError where fewer than ``at_least``
    (None: all) are left.
    """
    messages = [Message(RecordDict(), node, "query.hello", ttl=seconds, group_id="hello") for node in nodes]
    asked = {str(name): message.metadata.dst_node_id for name, message in zip(grid.push_messages(messages), messages, strict=True)}
    waiting, answers, wrong = set(asked), {}, {}
    deadline = time.monotonic() + seconds
    while waiting and time.monotonic() < deadline:
        for reply in grid.pull_messages(waiting):
            name = reply.metadata.reply_to_message_id
            waiting.discard(name)
            try:
                answers[asked[name]] = _hello(reply)
            except WireError as error:
                wrong[asked[name]] = str(error)
        time.sleep(0.1 if waiting else 0)
    wrong |= {asked[name]: f"did not say hello within {seconds:.0f} s; is its flower-superexec running?" for name in waiting}
    for node, why in wrong.items():
        print(f"node {node} is left out: {why}", flush=True)
        note(LOG, "node left out", node=node)
    if len(answers) < (len(asked) if at_least is None else at_least):
        node, why = next(iter(wrong.items()))
        raise WireError(f"{len(answers)} of {len(asked)} nodes can take part; node {node} {why}")
    return {node: answers[node] for node in asked.values() if node in answers}


def _hello(reply: Message) -> wire.Hello:
    if reply.has_error():
        raise WireError(f"does not say hello: {' '.join(str(reply.error.reason).split())[:500]}")
    hello = wire.hello_from_record_dict(reply.content)
    if RECIPE_FORMAT not in hello.recipe_formats:
        raise WireError(f"(fedssl {hello.version}) reads recipe formats {hello.recipe_formats}, not {RECIPE_FORMAT}; install one fedssl on both", "version")
    return hello


def _serve(grid: Grid, folder: Path) -> None:
    expected, seconds = int(_number("FEDSSL_NODES", 1)), _number("FEDSSL_NODES_SECONDS", 300)
    waits = _waits()
    nodes = say_hello(grid, wait_for_nodes(grid, expected, seconds), seconds, at_least=expected)
    print(f"{len(nodes)} nodes host {sum(len(hello.users) for hello in nodes.values())} users", flush=True)

    # Torch is paid for only now.
    from fedssl_server.serve import serve

    with held(folder):
        users = {node: hello.users for node, hello in nodes.items()}
        serve(grid, users, folder, **waits, should_stop=(folder / HALT).exists)


def _waits() -> Waits:
    """How long a round waits, what it needs and of whom, as the environment says."""
    fraction, fewer = _number("FEDSSL_LEAST_FRACTION", 0, may_be_0=True), os.environ.get("FEDSSL_WHEN_FEWER", "stop")
    if fraction > 1 or fewer not in ("stop", "continue"):
        raise ConfigError(f"FEDSSL_LEAST_FRACTION={fraction:g}, FEDSSL_WHEN_FEWER={fewer}: wanted a number from 0 to 1, and stop or continue")
    return {
        "deadline_seconds": _number("FEDSSL_ROUND_SECONDS", 3600),
        "reconnect_seconds": _number("FEDSSL_RECONNECT_SECONDS", 0, may_be_0=True),
        "least_fraction": fraction,
        "goes_on": fewer == "continue",
        "num_users": int(_number("FEDSSL_USERS", 0, may_be_0=True)),
        "most_users": int(_number("FEDSSL_USERS_OF_A_NODE", 0, may_be_0=True)),
        "ledger_heads": Path(os.environ["FEDSSL_LEDGER_HEADS"]) if os.environ.get("FEDSSL_LEDGER_HEADS") else None,
    }


def _number(name: str, default: float, *, may_be_0: bool = False) -> float:
    text = os.environ.get(name, "") or str(default)
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (0 < number < 1e9 or (may_be_0 and number == 0)):
        raise ConfigError(f"{name}={text}: wanted {'0 or ' * may_be_0}a number above 0")
    return number
