"""The resident agent: what the app on the device asks, what the ClientApp may ask, and that torch is in neither."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from device import EVENTS, RUN, SERVER, USER, download_of, make_device, recipe_of, write_policy
from fedssl_client.agent import Agent
from fedssl_client.connection import AgentError, Connection, connect
from fedssl_client.device_folder import app_socket, heads_folder
from fedssl_client.device_trainer import train
from fedssl_client.recommender import DeviceRecommender
from fedssl_client.service import serving
from fedssl_client.training import NotNow, TrainingFailed
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedssl.config import HeadConfig
from fedssl.errors import ConfigError, DataError, WireError
from fedssl.heads.store import HeadStore
from fedssl.privacy.uploads import open_device
from fedssl.wire import to_bytes, upload_from_bytes

Asked = tuple[Agent, Connection, Connection]


@contextmanager
def agent_of(folder: Path, command: list[str] | None = None) -> Iterator[Asked]:
    """An agent in this process, a connection of the app, one of the ClientApp."""
    agent = Agent(folder, command=(lambda server: command) if command else None)
    with serving(folder, agent), connect(f"unix:{app_socket(folder)}") as app, connect(f"unix:{folder / 'training' / 'train.sock'}", "Training") as clientapp:
        yield agent, app, clientapp


def code_of(connection: Connection, method: str, fields: dict[str, Any] | None = None) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(AgentError) as refused:
        connection.ask(method, fields)
    return refused.value.code, str(refused.value)


def test_the_agent_records_recommends_and_forgets_where_torch_cannot_be_imported(tmp_path: Path):
    folder = make_device(tmp_path / "d", events=[], gates={"platform": ""})
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['flwr'] = None; from pathlib import Path; from fedssl_client.service import run_agent; "
        f"run_agent(Path({str(folder)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline().startswith(b"agent of")
        with connect(f"unix:{app_socket(folder)}") as app:
            for item in EVENTS:
                app.ask("Record", {"item": item})
            found = app.ask("Recommend", {"k": 5}).items
            wanted = DeviceRecommender(folder / "model").recommend(EVENTS, k=5, exclude_seen=True)
            assert [(one.item, one.title) for one in found] == [(one.item, one.title) for one in wanted]
            assert len(app.ask("Recommend").items) == 10
            assert {one.item for one in app.ask("Recommend", {"k": 30, "include_seen": True}).items} > set(EVENTS)
            status = app.ask("Status")
            assert (status.events, status.model_run, status.may_train, status.is_training) == (len(EVENTS), RUN, True, False)
            exported = json.loads(app.ask("Export").json)
            assert [event["item"] for event in exported["events"]] == EVENTS
            assert app.ask("Forget", {"item": "i7"}).events == 2
            assert app.ask("Forget", {"all": True}).events == len(EVENTS) - 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()


def test_sockets_lie_in_folders_that_are_their_owners_alone_and_one_agent_runs_on_a_device(tmp_path: Path):
    folder = make_device(tmp_path / "d")
    with agent_of(folder):
        for name in ("", "app", "training"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o700
        with pytest.raises(ConfigError, match="an agent runs on it already"), serving(folder):
            pass
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0755 lets others in"), serving(folder):
        pass


def test_a_killed_agents_socket_is_taken_over(tmp_path: Path):
    folder = make_device(tmp_path / "d")
    (folder / "app").mkdir(mode=0o700)
    (folder / "app" / "agent.sock").touch()
    with agent_of(folder) as (_, app, _):
        assert app.ask("Status").events == len(EVENTS)


def test_health_and_reflection_answer(tmp_path: Path):
    folder = make_device(tmp_path / "d")
    with agent_of(folder), grpc.insecure_channel(f"unix:{app_socket(folder)}") as channel:
        asked = health_pb2.HealthCheckRequest(service="fedssl.device.v1.Device")
        assert health_pb2_grpc.HealthStub(channel).Check(asked, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing]), timeout=10)
        assert "fedssl.device.v1.Device" in {service.name for service in reply.list_services_response.service}


def test_over_tcp_only_who_shows_the_token_is_answered_and_only_on_this_machine(tmp_path: Path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = make_device(tmp_path / "d", agent={"port": port})
    token = (folder / "token").read_text()
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    with agent_of(folder):
        with connect(f"127.0.0.1:{port}", token=token) as app:
            assert app.ask("Status").events == len(EVENTS)
        for shown in (None, "", token[:-1], token + "x"):
            with connect(f"127.0.0.1:{port}", token=shown) as app:
                assert code_of(app, "Status")[0] == grpc.StatusCode.UNAUTHENTICATED
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.RpcError):
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            listing = reflection_pb2.ServerReflectionRequest(list_services="")
            with pytest.raises(grpc.RpcError):
                list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing]), timeout=10))
        # The training service is on no port.
        with connect(f"127.0.0.1:{port}", "Training", token=token) as training:
            assert code_of(training, "Hello")[0] == grpc.StatusCode.UNIMPLEMENTED


def test_the_training_socket_reaches_neither_history_nor_recommendations(tmp_path: Path):
    folder = make_device(tmp_path / "d")
    with agent_of(folder), connect(f"unix:{folder / 'training' / 'train.sock'}", "Device") as intruder:
        for method in ("Export", "Recommend", "Status", "Forget", "Record", "Join", "Leave"):
            assert code_of(intruder, method)[0] == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/usr/bin/python3").exists(), reason="only root can become another user, and that one needs a Python outside of ours"
)
def test_another_user_reaches_the_training_socket_where_its_folder_lets_them_in_and_nothing_else():
    knock = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        shared = Path(name) / "run"
        shared.mkdir()
        shared.chmod(0o711)
        folder = make_device(Path(name) / "d", agent={"training_socket": str(shared / "train.sock")})
        with serving(folder):
            for path, may in ((shared / "train.sock", True), (app_socket(folder), False)):
                done = subprocess.run(["/usr/bin/python3", "-c", knock, str(path)], user=65534, group=65534, extra_groups=[], capture_output=True, check=False)
                assert (done.returncode == 0) is may, done.stderr
                assert may or b"PermissionError" in done.stderr
            for file in ("history.sqlite", "device.toml", "uploads.sqlite", "device.key", "token"):
                done = subprocess.run(["/bin/cat", str(folder / file)], user=65534, group=65534, extra_groups=[], capture_output=True, check=False)
                assert b"Permission denied" in done.stderr


def test_the_clientapp_gets_through_the_agent_what_the_child_gives(tmp_path: Path):
    recipe = recipe_of(head={"name": "user-vector"})
    folder, other = make_device(tmp_path / "d", recipe), make_device(tmp_path / "e", recipe)
    download = to_bytes(download_of(recipe))
    with agent_of(folder) as (agent, app, clientapp):
        assert list(clientapp.ask("Hello").users) == [USER]
        before = [one.score for one in app.ask("Recommend").items]
        upload = clientapp.ask("Train", {"server": SERVER, "download": download, "seconds": 60.0}, seconds=60).upload
        assert upload == train(download, other, SERVER)
        assert app.ask("Status").trainings_today == 1
        # The head of this round is merged in at once.
        head = HeadStore(heads_folder(folder, RUN), np.array([USER]), 8).read(np.array([USER]))[0]
        wanted = DeviceRecommender(folder / "model").recommend(EVENTS, k=10, exclude_seen=True, head_D=head)
        after = app.ask("Recommend").items
        assert [one.item for one in after] == [one.item for one in wanted]
        np.testing.assert_allclose([one.score for one in after], [one.score for one in wanted], rtol=1e-6)
        assert [one.score for one in after] != before
        exported = json.loads(app.ask("Export").json)
        assert len(exported["heads"]) == len(exported["trainings"]) == 1
        assert exported["kept_uploads"] == {"number": 1, "bytes": len(upload)}
    assert not agent._trainer.is_training


def test_what_is_outside_the_policy_is_refused_on_the_training_socket_with_the_reason(tmp_path: Path):
    folder = make_device(tmp_path / "d", allow={"most_epsilon": 1.0})
    asked = {"server": SERVER, "download": to_bytes(download_of(recipe_of())), "seconds": 60.0}
    with agent_of(folder) as (_, app, clientapp):
        code, words = code_of(clientapp, "Train", asked)
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert words == "this device's policy refuses the recipe: no privacy plan, and [allow] most_epsilon is 1"
        assert code_of(clientapp, "Train", {**asked, "server": "stranger"})[0] == grpc.StatusCode.PERMISSION_DENIED
        # Random bytes are the server's own; their words may go back to it.
        write_policy(folder)
        assert code_of(clientapp, "Train", {**asked, "download": b"x" * 100})[0] == grpc.StatusCode.ABORTED
        # Consent that is taken back in the file holds at the next question.
        write_policy(folder, consent={"train": False})
        assert code_of(clientapp, "Train", asked)[0] == grpc.StatusCode.PERMISSION_DENIED
        assert code_of(app, "Join", {"server": SERVER})[0] == grpc.StatusCode.PERMISSION_DENIED


def test_joining_and_leaving(tmp_path: Path):
    folder = make_device(tmp_path / "d", allow={"servers": [SERVER, "work"]})
    with agent_of(folder) as (_, app, _):
        app.ask("Join", {"server": "work"})
        assert list(app.ask("Status").servers) == [SERVER, "work"]
        assert app.ask("Leave", {"server": SERVER}).had_joined
        assert not app.ask("Leave", {"server": SERVER}).had_joined
        assert list(app.ask("Status").servers) == ["work"]
        assert code_of(app, "Join", {"server": "stranger"}) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "server 'stranger' is not one of [allow] servers in device.toml",
        )


@pytest.mark.parametrize("what", [{"all": True}, {"item": "SECRET-ITEM"}], ids=["all", "one item"])
def test_forgetting_takes_back_head_and_kept_uploads_and_leaves_what_was_charged(what: dict[str, Any], tmp_path: Path):
    recipe = recipe_of(head={"name": "user-vector"})
    folder = make_device(tmp_path / "d", recipe, events=[*EVENTS, "SECRET-ITEM"])
    upload = train(to_bytes(download_of(recipe)), folder, SERVER)
    learned = {"upload": upload[200:300], "head": (heads_folder(folder, RUN) / "user-vector.f32").read_bytes(), "item": b"SECRET-ITEM"}

    def found() -> list[str]:
        raw = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        return [name for name, data in learned.items() if data in raw]

    with agent_of(folder) as (agent, app, _):
        assert found() == ["upload", "head", "item"]
        assert agent._head is not None
        app.ask("Forget", what)
        assert found() == []
        assert agent._head is None
    with pytest.raises(WireError, match="no longer kept"):
        train(to_bytes(download_of(recipe)), folder, SERVER)
    assert open_device(folder).ledger.uploads() == {USER: 1}


def test_a_request_that_makes_no_sense_is_refused(tmp_path: Path):
    with agent_of(make_device(tmp_path / "d")) as (_, app, _):
        assert code_of(app, "Forget")[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert code_of(app, "Forget", {"all": False})[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert code_of(app, "Record", {"item": ""})[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert app.ask("Status").events == len(EVENTS)


def test_without_a_model_events_are_kept_and_recommendations_wait_for_one(tmp_path: Path):
    import shutil

    folder = make_device(tmp_path / "d", events=[])
    shutil.rmtree(folder / "model")
    with agent_of(folder) as (agent, app, _):
        app.ask("Record", {"item": "i3", "time": 5.0, "value": 2.0})
        code, words = code_of(app, "Recommend")
        assert code == grpc.StatusCode.FAILED_PRECONDITION and "no model yet" in words
        assert json.loads(app.ask("Export").json)["events"] == [{"item": "i3", "time": 5.0, "value": 2.0}]


FOREVER = [sys.executable, "-c", "import sys, time; sys.stdin.buffer.read(); time.sleep(600)"]


def begin(agent: Agent) -> tuple[threading.Thread, list[Exception]]:
    """A training that would take ten minutes, under way."""
    failed: list[Exception] = []

    def ask() -> None:
        try:
            agent.train(b"x", SERVER, seconds=600)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while agent._trainer._child is None:
        time.sleep(0.01)
    return thread, failed


@pytest.mark.parametrize(
    "closed", [{"on_power": False}, {"unmetered": False}, {"busy": 0.9}, {"free_disk": 1000}, {"free_memory": 1000}], ids=lambda closed: next(iter(closed))
)
def test_training_stops_within_two_seconds_of_a_gate_that_closes_and_none_begins_behind_it(closed: dict[str, Any], tmp_path: Path):
    agent = Agent(make_device(tmp_path / "d"), command=lambda server: FOREVER)
    machine: Any = agent._trainer.platform
    open_gates = machine.now
    thread, failed = begin(agent)
    child = agent._trainer._child
    assert child is not None
    before = time.monotonic()
    machine.now = replace(open_gates, **closed)
    thread.join(timeout=10)
    assert time.monotonic() - before < 2
    assert child.poll() == -signal.SIGKILL
    assert [str(error) for error in failed] == ["not now: a gate of this device closed"]
    with pytest.raises(NotNow, match="a gate of this device is closed"):
        agent.train(b"x", SERVER, seconds=10)
    assert agent.status()["closed_gates"]
    machine.now = open_gates
    thread, _ = begin(agent)
    assert agent.status()["is_training"]
    agent.close()
    thread.join(timeout=10)


def test_one_training_at_a_time_which_forgetting_ends_and_which_counts_towards_the_day(tmp_path: Path):
    agent = Agent(make_device(tmp_path / "d", gates={"rounds_a_day": 2}), command=lambda server: FOREVER)
    thread, failed = begin(agent)
    with pytest.raises(NotNow, match="training already"):
        agent.train(b"x", SERVER, seconds=10)
    assert agent.leave(SERVER)
    thread.join(timeout=10)
    assert [str(error) for error in failed] == ["not now: the person ended it"]
    agent.join(SERVER)
    thread, _ = begin(agent)
    assert agent.forget("i3") == 1
    thread.join(timeout=10)
    with pytest.raises(NotNow, match="not now"):  # Forgetting one item does not free the day's trainings.
        agent.train(b"x", SERVER, seconds=10)
    agent.close()


def test_training_ends_when_the_download_expires_or_nobody_waits(tmp_path: Path):
    agent = Agent(make_device(tmp_path / "d"), command=lambda server: FOREVER)
    with pytest.raises(NotNow, match="when the download expired"):
        agent.train(b"x", SERVER, seconds=0.1)
    with pytest.raises(NotNow, match="nobody waits"):
        agent.train(b"x", SERVER, seconds=60, is_wanted=lambda: False)
    agent.close()


def test_a_child_that_dies_is_told_without_its_words(tmp_path: Path):
    agent = Agent(make_device(tmp_path / "d"), command=lambda server: [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(TrainingFailed, match="ended with -9"):
        agent.train(b"x", SERVER, seconds=60)
    agent.close()


@pytest.mark.parametrize("seconds", [0.0, 2.0], ids=["before it looked", "while it waits for its download"])
def test_a_child_ends_with_a_killed_agent(seconds: float, tmp_path: Path):
    folder = make_device(tmp_path / "d")
    code = (
        "import os, subprocess, sys; child = subprocess.Popen([sys.executable, '-m', 'fedssl_client.device_trainer', '--folder', "
        f"{str(folder)!r}, '--server', 'home', '--agent', str(os.getpid())], stdin=subprocess.PIPE); print(child.pid, flush=True); import time; time.sleep(60)"
    )
    agent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert agent.stdout is not None
    child = int(agent.stdout.readline())
    time.sleep(seconds)
    hold = os.open(f"/proc/{child}/fd/0", os.O_WRONLY | os.O_NONBLOCK)  # So that it is not the end of its input that ends it.
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(hold)


def test_an_agent_does_not_start_on_a_ledger_that_is_missing(tmp_path: Path):
    folder = make_device(tmp_path / "d")
    train(to_bytes(download_of(recipe_of())), folder, SERVER)
    (folder / "uploads.sqlite").unlink()
    with pytest.raises(DataError, match="is missing"):
        Agent(folder)


def test_the_head_of_another_run_is_not_merged_in(tmp_path: Path):
    recipe = recipe_of(head=HeadConfig(name="user-vector").model_dump())
    folder = make_device(tmp_path / "d", recipe)
    store = HeadStore(heads_folder(folder, "another run"), np.array([USER]), 8)
    store.write(np.array([USER]), np.ones((1, 8), np.float32), round=1)
    agent = Agent(folder)
    assert agent._head is None
    agent.close()
    assert upload_from_bytes(train(to_bytes(download_of(recipe)), folder, SERVER)).recipe == recipe.hash
