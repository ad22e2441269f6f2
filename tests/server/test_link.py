"""Asking a SuperLink that does not answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from fedssl_server import link as link_module
from fedssl_server.link import Link
from fedssl_server.processes import Processes
from fedssl_server.server_folder import make_server_folder

from fedssl.errors import FedSSLError


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
