"""The ClientApp of a hostile server: on the device it tries to read, to write, to reach and to train what it wants, and says what came of it."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """All attempts, by name: what was got, or which error there was."""
    told = json.loads(str(message.content["told"]["json"]))
    to = str(context.node_config["agent-socket"])
    device = next(one for one in told["devices"] if one["training_socket"] == to)
    found = {"socket": to, "user": os.geteuid(), "shadows": __file__} | {name: _tried(attempt) for name, attempt in _attempts(device, to).items()}
    return Message(RecordDict({"found": ConfigRecord({"json": json.dumps(found)})}), reply_to=message)


def _attempts(device: dict[str, Any], to: str) -> dict[str, Callable[[], object]]:
    folder, agent = Path(device["folder"]), int(device["agent"])
    attempts: dict[str, Callable[[], object]] = {
        "list the folder": lambda: sorted(os.listdir(folder)),
        "reach the app's socket": lambda: socket.socket(socket.AF_UNIX).connect(device["app_socket"]),
        "write the policy": lambda: (folder / "device.toml").open("a").close(),
        "take the training socket's place": lambda: os.rename(to, f"{to}.old") or os.rename(f"{to}.old", to),
        "signal the agent": lambda: os.kill(agent, 0),
        "read the agent's memory": lambda: Path(f"/proc/{agent}/mem").open("rb").close(),
        "read the agent's environment": lambda: len(Path(f"/proc/{agent}/environ").read_bytes()),
        "hello": lambda: list(_ask(to, "Training", "Hello").users),
    }
    for name in device["files"]:
        attempts[f"read {name}"] = lambda name=name: (folder / name).read_bytes()[:16].decode("latin-1")
    for method in ("Export", "Recommend", "Status", "Forget", "Record", "Join", "Leave"):
        attempts[f"call {method}"] = lambda method=method: str(_ask(to, "Device", method))
    for name, asked in device["trainings"].items():
        attempts[f"train {name}"] = lambda asked=asked: _train(to, asked)
    return attempts


def _train(to: str, asked: dict[str, str]) -> str:
    fields = {"server": asked["server"], "download": base64.b64decode(asked["download"]), "seconds": 250.0}
    return base64.b64encode(_ask(to, "Training", "Train", fields).upload).decode()


def _ask(to: str, service: str, method: str, fields: dict[str, Any] | None = None) -> Any:
    with _installed().connect(f"unix:{to}", service) as agent:
        return agent.ask(method, fields, seconds=250.0)


@cache
def _installed() -> Any:
    """`fedssl_client.connection` of the package that this one stands before."""
    here = Path(__file__).resolve().parents[1]
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != here]
    for name in [name for name in sys.modules if name.split(".")[0] == "fedssl_client"]:
        del sys.modules[name]
    import fedssl_client.connection as connection

    return connection


def _tried(attempt: Callable[[], object]) -> list[object]:
    try:
        return ["got", attempt()]
    except Exception as error:  # Whatever it is, it is what came of it.
        return [type(error).__name__, str(error)[:300]]
