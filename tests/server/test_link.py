"""A SuperLink that does not answer, that starts anew, and who it lets in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from fedssl_server import link as link_module
from fedssl_server.ledger_heads import digest, noted_keys
from fedssl_server.link import Link
from fedssl_server.processes import Processes
from fedssl_server.server_folder import make_server_folder
from fedssl_server.trial_keys import make_node_key

from fedssl.errors import FedSSLError, RunFolderError


def test_a_superlink_that_does_not_answer_is_an_error_that_a_run_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_server_folder(tmp_path / "server")
    silent = tmp_path / "flwr"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(link_module, "program", lambda name: str(silent))
    monkeypatch.setattr(link_module, "ASK_SECONDS", 0.2)
    with pytest.raises(FedSSLError, match=r"`flwr ls` has no answer after 0 s"):
        Link(tmp_path / "server").ask("ls")


class NothingStarts(Processes):
    """Notes the command lines; nothing listens."""

    def __init__(self, folder: Path):
        super().__init__(folder, {})
        self.commands: list[list[str]] = []

    def start(self, name: str, command: Sequence[str], extra: Mapping[str, str] | None = None) -> None:
        self.commands.append(list(command))

    def wait_for_port(self, port: int, seconds: float, host: str = "127.0.0.1") -> None:
        pass


@pytest.mark.parametrize("state", ["disk", "memory"])
def test_a_superlink_that_keeps_its_state_in_memory_knows_nobody_when_it_starts(state: str, tmp_path: Path):
    make_server_folder(tmp_path / "server", port=9)
    with (tmp_path / "server" / "server.toml").open("a") as file:
        file.write(f'[superlink]\nstate = "{state}"\n')
    registered = tmp_path / "server" / "registered.json"
    registered.write_text('{"anna": "7"}')
    processes = NothingStarts(tmp_path / "server" / "logs")
    Link(tmp_path / "server").start(processes)
    assert registered.exists() == ("--database" in processes.commands[0]) == (state == "disk")


class Flower:
    """Stands for Flower's commands: registers each key once, under a number of its own."""

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}
        self.is_killed, self.given = False, 0

    def __call__(self, *words: str) -> dict[str, object]:
        if words[1] == "list":
            listed = [{"node-id": number, "status": "online"} for number in self.numbers.values()]
            return {"nodes": [*listed, {"node-id": "5", "status": "unregistered"}]}
        if words[1] == "unregister":
            self.numbers = {key: number for key, number in self.numbers.items() if number != words[2]}
            return {}
        key = Path(words[2]).read_text()
        if key in self.numbers:
            raise FedSSLError("`flwr supernode register`: [code: 23] Public key already in use.")
        self.given += 1
        self.numbers[key] = str(100 + self.given)
        if self.is_killed:
            raise KeyboardInterrupt
        return {"node-id": self.numbers[key]}


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Link:
    make_server_folder(tmp_path / "server", nodes=["anna", "ben"])
    link = Link(tmp_path / "server")
    monkeypatch.setattr(link, "ask", Flower())
    return link


def flower_of(link: Link) -> Flower:
    assert isinstance(link.ask, Flower)
    return link.ask


def test_a_node_that_was_registered_when_the_server_was_killed_joins_under_that_number(link: Link):
    flower = flower_of(link)
    flower.is_killed = True
    with pytest.raises(KeyboardInterrupt):
        list(link.let_join())
    flower.is_killed = False
    assert list(link.let_join()) == ["node anna may join", "node ben may join"]
    assert link.nodes() == {"anna": "online", "ben": "online"} and len(flower.numbers) == 2
    assert noted_keys(link.folder) == {flower.numbers[path.read_text()]: digest(path) for path in (link.folder / "nodes").glob("*.pub")}
    assert list(link.let_join()) == []


def test_a_node_whose_key_goes_may_join_no_longer_whatever_is_wrong_with_others(link: Link):
    nodes = link.folder / "nodes"
    assert len(list(link.let_join())) == 2
    (nodes / "anna.pub").unlink()
    (nodes / "adam.pub").write_text("no key")
    (nodes / "bella.pub").mkdir()
    make_node_key(nodes, "carl")
    said = list(link.let_join())
    assert [line.split("(")[0] for line in said] == [
        f"error: {nodes / 'bella.pub'}: cannot be read as a node's public key ",
        "node anna may join no longer",
        f"error: {nodes / 'adam.pub'}: cannot be read as a public key ",
        "node carl may join",
    ]
    assert "ssh-keygen -t ecdsa" in said[2] and link.nodes() == {"ben": "online", "carl": "online"}


def test_a_node_that_comes_with_another_key_is_registered_anew(link: Link):
    nodes = link.folder / "nodes"
    assert len(list(link.let_join())) == 2
    before = dict(flower_of(link).numbers)
    (nodes / "anna.key").unlink()
    make_node_key(nodes, "anna")
    assert list(link.let_join()) == ["node anna may join no longer with the key of before", "node anna may join"]
    assert len(before.keys() & flower_of(link).numbers.keys()) == 1 and list(link.let_join()) == []


def test_a_key_that_is_registered_under_one_of_several_unknown_numbers_is_told(link: Link):
    flower = flower_of(link)
    flower.numbers = {(link.folder / "nodes" / "anna.pub").read_text(): "7", "by hand": "8"}
    first, second = link.let_join()
    assert "anna.pub: registered already, by another hand than ours: its number is one of 7, 8; end it with `FLWR_HOME=" in first
    assert second == "node ben may join"


def test_two_nodes_with_one_key_are_told_and_do_not_become_one(link: Link):
    nodes = link.folder / "nodes"
    (nodes / "ben.pub").write_text((nodes / "anna.pub").read_text())
    flower_of(link).numbers["by hand"] = "8"
    for _ in range(2):
        assert "ben.pub: the key of node anna; let this node make its own: `ssh-keygen" in list(link.let_join())[-1]
    assert link.nodes() == {"anna": "online"}


def test_keys_that_were_not_noted_are_noted_from_the_nodes_files(link: Link):
    assert len(list(link.let_join())) == 2
    wanted = noted_keys(link.folder)
    (link.folder / "node_keys.json").unlink()
    assert list(link.let_join()) == []
    assert noted_keys(link.folder) == wanted


@pytest.mark.parametrize("name", ["node_keys.json", "registered.json"])
def test_nobody_is_registered_where_the_nodes_of_before_cannot_be_read(name: str, link: Link):
    (link.folder / name).write_text("[")
    with pytest.raises(RunFolderError, match=rf"{name}: cannot be read"):
        list(link.let_join())
    assert flower_of(link).numbers == {}
