"""Asking a SuperLink that does not answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from fedssl_server import link as link_module
from fedssl_server.link import Link
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
