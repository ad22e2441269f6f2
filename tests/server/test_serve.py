"""The ServerApp's steps and a run from its folder, with nodes in this process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from fedssl_server import app as door
from fedssl_server.run_settings import read_settings
from fedssl_server.serve import serve
from fedssl_simulations.grids import InProcessGrid, handler_of
from flwr.app import Context, Message, RecordDict

from fedssl import wire
from fedssl.catalogue import Catalogue, write_catalogue
from fedssl.client_round import Shard
from fedssl.data.histories import make_histories, take_users
from fedssl.data.synthetic import synthesize
from fedssl.errors import CheckpointError, ConfigError, FedSSLError, RunFolderError, WireError

SETTINGS = """
[encoder]
width = 4
blocks = 1
heads = 1
hidden = 4
window = 6
[counts]
lags = 1
clip_norm = 1.0
[server]
rounds = 3
cohort = 8
sampling = "{sampling}"
[privacy]
clip_norm = 1.0
{privacy}
"""
HISTORIES, CATALOGUE = make_histories(synthesize(users=12, items=200, seed=2, mean_events=8.0))


def run_folder(folder: Path, *, privacy: str = "") -> Path:
    folder.mkdir()
    (folder / "run.toml").write_text(SETTINGS.format(privacy=privacy, sampling="poisson" if privacy else "passes"))
    write_catalogue(CATALOGUE, folder / "catalogue.jsonl")
    return folder


def play(folder: Path, *, rounds: int | None = None, nodes: int = 2) -> None:
    """Serve the run in ``folder`` to nodes in this process; stop before another round once ``rounds`` were begun."""
    pieces = np.array_split(np.arange(12), nodes)
    shards = {index: Shard(take_users(HISTORIES, users), users) for index, users in enumerate(pieces)}
    begun = itertools.count()
    with InProcessGrid(handler_of(shards), {index + 1: {"partition-id": index} for index in shards}) as grid:
        serve(grid, {index + 1: shard.users for index, shard in shards.items()}, folder, should_stop=lambda: rounds is not None and next(begun) >= rounds)


def learned(folder: Path) -> dict[str, bytes]:
    (newest,) = (folder / "checkpoints").iterdir()
    return {path.name: path.read_bytes() for path in sorted(newest.glob("*.safetensors"))} | {"name": newest.name.encode()}


def lines(folder: Path) -> list[tuple[str, int]]:
    return [(line["phase"], line["round"]) for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path):
    whole, stopped = run_folder(tmp_path / "whole"), run_folder(tmp_path / "stopped")
    play(whole)
    play(stopped, rounds=2)
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "training", "round": 2}\n{"phase": "trai')  # A round that no checkpoint has, and half of a line.
    play(stopped)
    assert learned(stopped) == learned(whole)
    assert learned(whole)["name"] == b"round-000003"
    assert lines(stopped) == lines(whole) == [("counts", 1), ("training", 1), ("training", 2), ("training", 3)]


def test_under_a_plan_keys_and_ledger_are_kept_and_the_metrics_do_not_tell_the_cohort(tmp_path: Path):
    folder = run_folder(tmp_path / "run", privacy="noise_multiplier = 1.0\ncounts_noise_multiplier = 1.0")
    play(folder, rounds=2)
    keys = (folder / "secrets" / "noise.key").read_bytes()
    play(folder)
    assert (folder / "secrets" / "noise.key").read_bytes() == keys
    first, *_, last = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert set(last) == {"phase", "round", "attempt", "seconds", "epsilon", "researcher_only"}
    assert first["epsilon"] < last["epsilon"]
    assert json.loads((folder / "checkpoints" / "round-000003" / "state.json").read_text())["charged"] == {"popularity": 1, "counts": 1, "training": 3}


def test_settings_that_changed_since_the_checkpoint_are_refused(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    play(folder, rounds=1)
    (folder / "run.toml").write_text((folder / "run.toml").read_text().replace("lags = 1", "lags = 2"))
    with pytest.raises(CheckpointError, match="made by another recipe"):
        play(folder)


def test_a_catalogue_that_grew_is_another_run(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    play(folder, rounds=1)
    write_catalogue(Catalogue((*CATALOGUE.tokens, "new")), folder / "catalogue.jsonl")
    with pytest.raises(CheckpointError, match="made by another recipe than"):
        play(folder)


def test_a_run_has_one_name_also_where_it_ends_before_its_first_checkpoint(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    play(folder, rounds=0)
    assert not (folder / "checkpoints").exists()
    name = (folder / "name").read_text()
    play(folder)
    (newest,) = (folder / "checkpoints").iterdir()
    assert json.loads((newest / "state.json").read_text())["run"] == name
    other = run_folder(tmp_path / "other")
    play(other, rounds=0)
    assert (other / "name").read_text() != name


def test_what_only_a_simulation_looks_up_or_begins_from_is_refused(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "ml-1m"\n')
    with pytest.raises(ConfigError, match=r"run.toml: preset = 'ml-1m' stands for settings that only `fedssl simulate` looks up; take the run.toml that it"):
        read_settings(path)
    path.write_text('start = "runs/first/checkpoints/round-000400"\n')
    with pytest.raises(ConfigError, match=r"run.toml: start = .* is for simulations; a server's run begins from nothing"):
        read_settings(path)
    # What a simulation of the preset wrote has all its settings.
    path.write_text('preset = "ml-1m"\n[server]\nrounds = 7\n[about]\nfedssl = "0.1.0"\n')
    assert read_settings(path).server.rounds == 7


def test_patience_is_refused_where_nobody_validates(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    with (folder / "run.toml").open("a") as file:
        file.write("[evaluation]\nevery = 1\npatience = 2\n")
    with pytest.raises(ConfigError, match=r"run.toml: \[evaluation\] patience needs validations, which only a simulation makes yet"):
        play(folder)


def test_a_folder_without_settings_is_no_run(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run.toml: no such file; a run folder begins with run.toml and catalogue.jsonl"):
        play(tmp_path)


def test_the_run_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FEDSSL_RUN_DIR", raising=False)
    with pytest.raises(RunFolderError, match="FEDSSL_RUN_DIR is not set"):
        door.run_folder()
    monkeypatch.setenv("FEDSSL_RUN_DIR", str(tmp_path / "none"))
    with pytest.raises(RunFolderError, match="no such folder"):
        door.run_folder()
    monkeypatch.setenv("FEDSSL_RUN_DIR", str(tmp_path))
    assert door.run_folder() == tmp_path
    monkeypatch.setenv("FEDSSL_NODES", "many")
    with pytest.raises(ConfigError, match="FEDSSL_NODES=many: wanted a number above 0"):
        door._number("FEDSSL_NODES", 1)


def test_waiting_for_nodes_ends_in_time_and_says_how_many_came():
    with InProcessGrid(speak, {3: {}, 2: {}}) as grid:
        assert door.wait_for_nodes(grid, 2, 5.0) == [2, 3]
        with pytest.raises(FedSSLError, match="2 of 3 nodes after 0 s"):
            door.wait_for_nodes(grid, 3, 0.1)


def speak(message: Message, context: Context) -> Message:
    """Answer a hello as the node's config says."""
    reads = (99,) if context.node_config.get("new") else (1,)
    content = RecordDict() if context.node_config.get("mute") else wire.hello_to_record_dict(wire.Hello(np.array([context.node_id]), recipe_formats=reads))
    return Message(content, reply_to=message)


def test_each_node_says_whom_it_hosts():
    with InProcessGrid(speak, {3: {}, 2: {}}) as grid:
        assert {node: hello.users.tolist() for node, hello in door.say_hello(grid, [2, 3], 5.0).items()} == {2: [2], 3: [3]}


def test_a_node_that_speaks_otherwise_or_fails_is_named():
    with InProcessGrid(speak, {2: {}, 3: {"new": True}, 4: {"mute": True}}) as grid:
        with pytest.raises(WireError, match=r"1 of 2 nodes can take part; node 3 \(fedssl .*\) reads recipe formats \(99,\), not 1"):
            door.say_hello(grid, [2, 3], 5.0)
        with pytest.raises(WireError, match="node 4 message with records"):
            door.say_hello(grid, [2, 4], 5.0)
        with pytest.raises(FedSSLError, match="node 9 does not say hello: no node 9"):
            door.say_hello(grid, [9], 5.0)


def test_a_node_that_cannot_take_part_is_left_out_and_said_and_the_run_begins_with_enough_others(capsys: pytest.CaptureFixture[str]):
    with InProcessGrid(speak, {2: {}, 3: {"new": True}, 4: {"mute": True}, 5: {}}) as grid:
        assert list(door.say_hello(grid, [2, 3, 4, 5, 9], 5.0, at_least=2)) == [2, 5]
        with pytest.raises(WireError, match="2 of 3 nodes can take part; node 3"):
            door.say_hello(grid, [2, 3, 5], 5.0, at_least=3)
    said = capsys.readouterr().out
    assert all(f"node {node} is left out: " in said for node in (3, 4, 9))


def test_a_node_that_says_more_than_it_may_is_left_out_and_the_run_goes_on_as_if_it_were_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders = [run_folder(tmp_path / name) for name in ("with", "without")]
    liars = {8: np.arange(3), 9: np.array([10**6])}
    for folder, more in zip(folders, (liars, {}), strict=True):
        users = {node: np.array([node - 1]) for node in range(1, 5)}
        users[3] = np.array([4])
        shards = {node: Shard(take_users(HISTORIES, own), own) for node, own in users.items()}
        with InProcessGrid(handler_of(shards), {node: {"partition-id": node} for node in users}) as grid:
            serve(grid, {**users, **more}, folder, num_users=12, most_users=1)
    said = capsys.readouterr().out
    assert "node 8 is left out: it hosts 3 users, and a node may host 1 ([nodes] most_users)" in said
    assert "node 9 is left out: it hosts user 1000000, and the run's users have the numbers 0 to 11 ([nodes] users)" in said
    ours = {name: value for name, value in learned(folders[0]).items() if name != "state"}
    assert ours == {name: value for name, value in learned(folders[1]).items() if name != "state"}
