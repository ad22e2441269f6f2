"""The ClientApp: a thin door without torch that tells the server no more of a failure than its kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import device
import numpy as np
import pytest
from fedssl_client import app as door
from fedssl_client.child import public_reason
from fedssl_client.device_trainer import train as train_device
from fedssl_client.service import serving
from fedssl_client.store import locked, users_of
from fedssl_client.trainer import answer, train
from fedssl_simulations.grids import InProcessGrid
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedssl import wire
from fedssl.client_round import open_shard, write_shard
from fedssl.config import EncoderConfig, HeadConfig, RunConfig
from fedssl.data.histories import Histories
from fedssl.errors import DataError, WireError
from fedssl.recipe import Recipe, make_recipe
from fedssl.records import Address, Download
from fedssl.server_round import first_state, phases_of

ITEMS = 6
HISTORIES = Histories(np.array([1, 2, 3, 4, 5, 6, 1, 3, 5, 2, 4, 6], np.int32), np.array([0, 6, 12]), None, ("ann", "bob"))


def recipe_of(head: str = "none") -> Recipe:
    encoder = EncoderConfig(width=4, blocks=1, heads=1, hidden=4, window=4)
    return make_recipe(RunConfig(encoder=encoder, head=HeadConfig.model_validate({"name": head})), num_items=ITEMS, catalogue="c" * 64)


def download_of(recipe: Recipe, users: list[int] | None = None) -> Download:
    chosen = None if users is None else np.array(users)
    return Download(Address("run", "training", 1), recipe, phases_of(recipe)[0].tensors(first_state(recipe)), chosen)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_shard(tmp_path / "store", HISTORIES, np.array([0, 1]))
    return tmp_path / "store"


def ask(content: RecordDict, kind: str, store: object, ttl: float = 60.0, sent_hours_ago: float = 0.0, **more: bool | float | int | str) -> Message:
    """One message through the ClientApp, as a SuperNode would bring it. ``sent_hours_ago``: by the clock of the server."""
    config: dict[str, bool | float | int | str] = {name.replace("_", "-"): value for name, value in more.items()}
    if store is not None:
        config["store"] = str(store)
    with InProcessGrid(door.app, {7: config}, run_config={"store": "a server must not choose this"}) as grid:
        message = Message(content, 7, kind, ttl=ttl, group_id="1")
        message.metadata.__dict__["_created_at"] -= sent_hours_ago * 3600
        (reply,) = grid.send_and_receive([message])
    return reply


def test_the_door_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import fedssl_client.app"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_download_is_answered_by_a_child_process_as_it_would_be_here(store: Path):
    download = download_of(recipe_of("user-vector"), users=[1])
    reply = ask(wire.to_record_dict(download), "train", store)
    assert not reply.has_error(), reply.error
    upload = wire.upload_from_record_dict(reply.content)
    (store / "heads" / "user-vector.f32").unlink()
    (store / "heads" / "heads.json").unlink()
    assert wire.to_bytes(upload) == wire.to_bytes(answer(download, open_shard(store)))
    assert wire.to_bytes(upload) == wire.to_bytes(answer(wire.to_bytes(download), open_shard(store)))


def test_a_node_says_whom_it_hosts(store: Path):
    hello = wire.hello_from_record_dict(ask(RecordDict(), "query.hello", store).content)
    assert hello.users.tolist() == [0, 1]


def test_the_store_comes_from_the_node_and_never_from_the_run():
    for kind, content in (("query.hello", RecordDict()), ("train", wire.to_record_dict(download_of(recipe_of())))):
        reply = ask(content, kind, None)
        assert str(reply.error.reason).startswith("ConfigError on the node")


def test_under_flowers_simulation_runtime_the_environment_and_the_partition_name_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_shard(tmp_path / "node-0", HISTORIES, np.array([0]))
    write_shard(tmp_path / "node-1", HISTORIES, np.array([1]))
    monkeypatch.setenv("FEDSSL_STORES", str(tmp_path))
    for partition in (0, 1):
        hello = wire.hello_from_record_dict(ask(RecordDict(), "query.hello", None, partition_id=partition).content)
        assert hello.users.tolist() == [partition]
    # A store in the node's own config comes first, also one that is not there.
    hello = wire.hello_from_record_dict(ask(RecordDict(), "query.hello", tmp_path / "node-1", partition_id=0).content)
    assert hello.users.tolist() == [1]
    assert ask(RecordDict(), "query.hello", "", partition_id=0).error.reason.startswith("ConfigError")
    # No partition, or one that is no number, names no folder.
    assert ask(RecordDict(), "query.hello", None).error.reason.startswith("ConfigError")
    assert ask(RecordDict(), "query.hello", None, partition_id="../node-1").error.reason.startswith("ConfigError")


def test_a_partition_alone_names_no_store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FEDSSL_STORES", raising=False)
    assert ask(RecordDict(), "query.hello", None, partition_id=0).error.reason.startswith("ConfigError")


def test_a_failure_that_concerns_the_owner_names_no_path(tmp_path: Path):
    for kind, content in (("query.hello", RecordDict()), ("train", wire.to_record_dict(download_of(recipe_of())))):
        reply = ask(content, kind, tmp_path / "secret-name")
        assert reply.error.reason == "DataError on the node; its own log says more"


def test_a_download_that_cannot_be_read_is_told_in_words(store: Path):
    reply = ask(RecordDict({"header": ConfigRecord({"json": '{"format": 7}'}), "tensors": ArrayRecord()}), "train", store)
    assert "wire format 7, this version reads 1" in str(reply.error.reason)


def test_what_the_child_finds_wrong_with_a_download_is_told_in_words_too(store: Path):
    reply = ask(wire.to_record_dict(download_of(recipe_of(), users=[5])), "train", store)
    assert str(reply.error.reason).startswith("WireError: the Download names users that this node does not host")


@pytest.mark.parametrize("sent_hours_ago", [-5.0, 5.0])
def test_a_server_whose_clock_is_hours_off_gets_an_answer(sent_hours_ago: float, store: Path):
    reply = ask(wire.to_record_dict(download_of(recipe_of(), users=[1])), "train", store, sent_hours_ago=sent_hours_ago)
    assert not reply.has_error(), reply.error


def test_training_ends_when_the_download_expires(store: Path):
    with pytest.raises(door.TrainerFailed, match="ended after 0 s, when the download expired"):
        door.run_trainer(wire.to_bytes(download_of(recipe_of())), str(store), seconds=0.01)


def test_a_bug_says_its_kind_and_nothing_of_its_words():
    assert public_reason(ValueError("ann watched item 3")) == "ValueError on the node; its own log says more"
    assert public_reason(WireError("recipe format 2")) == "WireError: recipe format 2"


def test_what_training_prints_does_not_spoil_the_upload(store: Path):
    code = (
        "import os, sys, fedssl_client.trainer as trainer\n"
        "inner = trainer.answer\n"
        "def loud(download, shard):\n"
        "    print('printed'); os.write(1, b'written')\n"
        "    return inner(download, shard)\n"
        "trainer.answer = loud\n"
        f"sys.argv = ['trainer', '--store', {str(store)!r}]\n"
        "sys.exit(trainer.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=wire.to_bytes(download_of(recipe_of())), capture_output=True, timeout=60, check=True)
    assert "update" in wire.upload_from_bytes(done.stdout).sums
    assert b"printed" in done.stderr
    assert b"written" in done.stderr


def test_random_bytes_are_refused_before_the_store_is_touched(tmp_path: Path):
    with pytest.raises(WireError):
        train(b"not a download", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("users", [np.array([1, 0]), np.array([1, 1]), np.array([-1]), np.array([0.5]), np.zeros((1, 1), np.int64), np.zeros(0, np.int64)])
def test_numbers_of_users_that_are_not_sorted_whole_and_different_are_refused(tmp_path: Path, users: object):
    np.save(tmp_path / "users.npy", users)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="wanted numbers from 0, each once and sorted"):
        users_of(tmp_path)


def test_a_second_process_waits_for_a_store(tmp_path: Path):
    code = f"import pathlib, fedssl_client.store as s\nwith s.locked(pathlib.Path({str(tmp_path)!r})): print('in')"
    with locked(tmp_path):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=1.0)
    assert other.communicate(timeout=30)[0] == b"in\n"


def test_a_part_of_another_package_is_followed_only_where_the_owner_lists_it(store: Path):
    recipe = recipe_of()
    foreign = recipe.model_copy(update={"server": recipe.server.model_copy(update={"optimizer": "fedssl.server_optimizers:sgd"})})
    asked = wire.to_bytes(download_of(foreign, [0]))
    with pytest.raises(WireError, match=r"fedssl\.server_optimizers:sgd, which is no part of fedssl"):
        train(asked, str(store))
    settings = json.loads((store / "node.json").read_text())
    (store / "node.json").write_text(json.dumps({**settings, "parts": ["fedssl.server_optimizers:sgd"]}))
    assert wire.upload_from_bytes(train(asked, str(store))).sums["update"].any()


def test_a_node_with_an_agent_asks_it_and_brings_back_its_words(tmp_path: Path):
    recipe = device.recipe_of()
    folder = device.make_device(tmp_path / "d", recipe)
    other = device.make_device(tmp_path / "e", recipe)
    config: dict[str, str] = {"agent_socket": str(folder / "training" / "train.sock"), "server": device.SERVER}
    download = device.download_of(recipe)
    with serving(folder):
        assert wire.hello_from_record_dict(ask(RecordDict(), "query.hello", None, **config).content).users.tolist() == [device.USER]
        reply = ask(wire.to_record_dict(download), "train", None, **config)
        assert not reply.has_error(), reply.error
        assert wire.to_bytes(wire.upload_from_record_dict(reply.content)) == train_device(wire.to_bytes(download), other, device.SERVER)
        reply = ask(wire.to_record_dict(download), "train", None, agent_socket=config["agent_socket"], server="stranger")
        assert reply.error.reason == "this device's person has not agreed to train for this server"
        assert ask(wire.to_record_dict(download), "train", None, agent_socket=config["agent_socket"]).error.reason.startswith("ConfigError")
    # Nobody is there: no path leaves.
    assert "d/training" not in str(ask(wire.to_record_dict(download), "train", None, **config).error.reason)
    assert ask(RecordDict(), "query.hello", None, **config).has_error()
