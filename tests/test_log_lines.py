"""Logs of server and device: lines of JSON, and in none of them anything that anybody met."""

from __future__ import annotations

import io
import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device import SERVER, USER, download_of, make_device, recipe_of
from fedssl_client.agent import LOG as DEVICE_LOG
from fedssl_client.agent import Agent
from fedssl_client.device_folder import opened_ledger
from fedssl_client.history import HistoryStore
from fedssl_client.training import TrainingFailed
from fedssl_server import app as door
from fedssl_simulations.grids import InProcessGrid, handler_of
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedssl import wire
from fedssl.catalogue import Catalogue, write_catalogue
from fedssl.client_round import Shard
from fedssl.data.histories import make_histories, take_users
from fedssl.data.interactions import Interactions
from fedssl.data.synthetic import synthesize
from fedssl.errors import ConfigError
from fedssl.log_lines import logged, note, note_failure

KEYS = {"time", "level", "log", "event"}


def read(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_is_json_with_its_facts_and_an_error_is_its_kind_alone():
    log, stream = logging.getLogger("fedssl.test"), io.StringIO()
    with logged(log, stream):
        note(log, "round", round=3, seconds=0.5, refused_for={"norm": 1})
        try:
            raise ValueError("anna watched\nitem 17")
        except ValueError:
            note_failure(log, "stopped", node=2)
    note(log, "after")
    first, second = read(stream.getvalue())
    assert first.keys() == KEYS | {"round", "seconds", "refused_for"} and first["refused_for"] == {"norm": 1}
    assert (first["level"], first["log"], first["event"]) == ("info", "fedssl.test", "round")
    assert second.keys() == KEYS | {"error", "node"} and (second["level"], second["error"]) == ("error", "ValueError")
    assert len(first["time"]) == len("2026-01-31T12:00:00.123Z") and first["time"].endswith("Z")


def test_a_log_file_is_added_to_and_is_its_owners_alone(tmp_path: Path):
    log, path = logging.getLogger("fedssl.test"), tmp_path / "log.jsonl"
    for number in (1, 2):
        with logged(log, path):
            note(log, "run begins", number=number)
    assert [line["number"] for line in read(path.read_text())] == [1, 2]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# ---- a server ----

SETTINGS = """
[encoder]
width = 4
blocks = 1
heads = 1
hidden = 4
window = 6
[server]
rounds = 2
cohort = 12
{sampling}
[evaluation]
on_devices = {devices}
{privacy}
"""


def renamed(interactions: Interactions) -> Interactions:
    """Tokens that occur nowhere else."""
    users, items = (tuple(f"{kind}{token}x" for token in tokens) for kind, tokens in (("pat", interactions.user_tokens), ("film", interactions.item_tokens)))
    return Interactions(interactions.users, interactions.items, interactions.times, users, items)


HISTORIES, FILMS = make_histories(renamed(synthesize(users=12, items=200, seed=2, mean_events=8.0)))


def serve_with_a_gossip(folder: Path, monkeypatch: pytest.MonkeyPatch, *, privacy: str = "") -> list[dict[str, Any]]:
    """Two honest nodes, one that tells what its people watched wherever it can say a word, and one that cannot say hello. The server's log."""
    folder.mkdir()
    settings = SETTINGS.format(devices=0 if privacy else 1, sampling='sampling = "poisson"' if privacy else "", privacy=privacy)
    (folder / "run.toml").write_text(settings)
    write_catalogue(FILMS, folder / "catalogue.jsonl")
    pieces = dict(enumerate(np.array_split(np.arange(12), 3), start=1))
    honest = handler_of({node: Shard(take_users(HISTORIES, users), users) for node, users in pieces.items()})

    def handle(message: Message, context: Context) -> Message:
        gossip = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{HISTORIES.names[5]} watched {' '.join(FILMS.tokens)}")
        if message.metadata.message_type == "query.hello":
            hello = wire.hello_to_record_dict(wire.Hello(pieces[context.node_id])) if context.node_id in pieces else gossip
            return Message(hello, reply_to=message)
        if context.node_id == 2:
            return Message(gossip, reply_to=message)
        return honest(message, context)

    monkeypatch.setenv("FEDSSL_RUN_DIR", str(folder))
    monkeypatch.setenv("FEDSSL_NODES", "3")
    nodes: dict[int, dict[str, Any]] = {node: {"partition-id": node} for node in range(1, 5)}
    with InProcessGrid(handle, nodes) as grid:
        door.main(grid, Context(1, 1, {}, RecordDict(), {}))
    return read((folder / "log.jsonl").read_text())


def assert_nothing_of_theirs(text: str, names: Any) -> None:
    assert text and not [name for name in names if name in text]


def test_no_item_and_no_person_shows_up_in_a_servers_log_whatever_a_node_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = serve_with_a_gossip(tmp_path / "run", monkeypatch)
    assert [line["event"] for line in lines] == ["node left out", "run begins", "round", "evaluation", "round", "evaluation", "run ends"]
    assert all(line.keys() >= KEYS for line in lines)
    assert (lines[2]["phase"], lines[2]["nodes"], lines[2]["nodes_used"], lines[2]["refused_for"]) == ("training", 3, 2, {"failed": 1})
    assert_nothing_of_theirs((tmp_path / "run" / "log.jsonl").read_text(), [*FILMS.tokens, *HISTORIES.names])
    # They were said: what is for the researcher alone has them.
    assert FILMS.tokens[0] in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_under_a_plan_a_servers_log_does_not_tell_who_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = "[privacy]\nclip_norm = 1.0\nnoise_multiplier = 1.0\ndelta = 0.01\n"
    lines = serve_with_a_gossip(tmp_path / "run", monkeypatch, privacy=plan)
    rounds = [line for line in lines if line["event"] == "round"]
    assert len(rounds) == 2
    assert all(line.keys() == KEYS | {"phase", "round", "attempt", "seconds", "epsilon", "is_applied"} for line in rounds)


def test_a_run_that_stops_says_its_kind_of_error_and_no_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run.toml").write_text("[film17x]\n")
    monkeypatch.setenv("FEDSSL_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(door, "wait_for_nodes", lambda *args: [])
    monkeypatch.setattr(door, "say_hello", lambda *args, **more: {})
    with InProcessGrid(lambda message, context: message, {}) as grid, pytest.raises(ConfigError, match="film17x"):
        door.main(grid, Context(1, 1, {}, RecordDict(), {}))
    (line,) = read((tmp_path / "log.jsonl").read_text())
    assert line["event"] == "run stopped" and line["level"] == "error" and line["error"] == "ConfigError"
    assert "film17x" not in json.dumps(line)


# ---- a device ----


def test_no_item_shows_up_in_a_devices_log_or_on_its_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    films = Catalogue(tuple(f"film{row}x" for row in range(1, 31)))
    recipe = recipe_of(films, privacy={"clip_norm": 0.5})
    folder = make_device(tmp_path / "d", recipe, catalogue=films, events=["film3x", "film7x", "film1x", "film9x"])
    stream = io.StringIO()
    with logged(DEVICE_LOG, stream):
        agent = Agent(folder)
        agent.join(SERVER)
        agent.record("film12x", 50.0, None)
        agent.recommend(k=5, include_seen=False)
        agent.train(wire.to_bytes(download_of(recipe)), SERVER, seconds=60)
        other = Catalogue((*films.tokens, "film31x"))
        with pytest.raises(TrainingFailed, match="another catalogue"):
            agent.train(wire.to_bytes(download_of(recipe_of(other))), SERVER, seconds=60)
        agent.export()
        agent.forget("film3x")
        agent.forget(None)
        agent.leave(SERVER)
        agent.close()
    lines = read(stream.getvalue())
    assert [line["event"] for line in lines] == ["joined", "trained", "no training", "forgot", "forgot", "left"]
    assert lines[1]["upload_bytes"] > 0 and lines[2]["error"] == "TrainingFailed"
    captured = capfd.readouterr()
    assert_nothing_of_theirs(stream.getvalue() + captured.err + captured.out, films.tokens)
    with opened_ledger(folder, HistoryStore(folder / "history.sqlite")) as device:
        assert device.ledger.uploads() == {USER: 1}


def test_an_agent_writes_its_log_to_standard_error(tmp_path: Path):
    folder = make_device(tmp_path / "d")
    code = "import os, signal, sys, threading; from pathlib import Path; import fedssl_client.service as service; "
    code += "threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start(); service.run_agent(Path(sys.argv[1]))"
    # The machine whose gates are open is a module of these tests.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120, check=True, env=environment)
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines] == ["agent begins", "agent ends"] and lines[0]["may_train"] is True
