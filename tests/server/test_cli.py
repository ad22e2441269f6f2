"""The commands of a server, as far as they go without a SuperLink."""

from __future__ import annotations

import json
import stat
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import pytest
from commands import fedssl, write_tiny
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from fedssl_server.link import FLOWER_APP, Link
from fedssl_server.operate import begin_run, run_to_end, state_of
from fedssl_server.run_settings import HALT
from flwr.cli.build import build_fab_from_disk

from fedssl.catalogue import Catalogue, write_catalogue
from fedssl.errors import FedSSLError, RunFolderError


def test_init_makes_keys_that_fit_and_that_others_cannot_read(tmp_path: Path):
    folder = tmp_path / "server"
    assert fedssl("server", "init", folder, "--name", "fl.example.org", "--node", "anna", "--node", "ben", "--port", "8123") == 0
    for path in (folder, folder / "nodes", folder / "logs"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for name in ("ca.key", "server.key", "superexec.secret", "nodes/anna.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    authority, server = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fl.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    private = load_ssh_private_key((folder / "nodes" / "anna.key").read_bytes(), None)
    assert private.public_key() == load_ssh_public_key((folder / "nodes" / "anna.pub").read_bytes())
    settings = Link(folder).settings
    assert (settings.listen.port, settings.rounds.nodes) == (8123, 2)


def test_init_does_not_touch_a_server_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fedssl("server", "init", tmp_path) == 0
    before = (tmp_path / "ca.key").read_bytes()
    assert fedssl("server", "init", tmp_path) == 1
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "ca.key").read_bytes() == before


def test_a_key_that_others_can_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fedssl("server", "init", tmp_path) == 0
    (tmp_path / "server.key").chmod(0o644)
    assert fedssl("server", "status", tmp_path) == 1
    assert "server.key: mode 0644 lets others read it" in capsys.readouterr().err


def test_status_and_halt_say_that_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fedssl("server", "init", tmp_path) == 0
    capsys.readouterr()
    assert fedssl("server", "status", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"superlink": "down", "run": "none"}
    assert fedssl("server", "halt", tmp_path, "--all") == 0
    assert capsys.readouterr().out == "no run\nthe SuperLink was not up\n"


def test_a_run_begins_once_and_its_crashes_are_counted(tmp_path: Path):
    server, run = tmp_path / "server", tmp_path / "run"
    assert fedssl("server", "init", server, "--port", "9") == 0
    with (server / "server.toml").open("a") as file:
        file.write("nodes_seconds = 0.1\ntries = 2\n")
    write_catalogue(Catalogue(("a", "b")), tmp_path / "catalogue.jsonl")
    begin_run(write_tiny(tmp_path, tmp_path / "h.txt"), tmp_path / "catalogue.jsonl", run)
    with pytest.raises(RunFolderError, match="there is a run already"):
        begin_run(tmp_path / "run.toml", tmp_path / "catalogue.jsonl", run)
    (run / HALT).touch()
    said: list[str] = []
    with pytest.raises(FedSSLError, match="2 crashes in a row without a new checkpoint"):
        run_to_end(Link(server), run, said.append)
    assert said[0].startswith(f"no SuperLink runs on {server} yet; waiting for 127.0.0.1:9 ")
    assert not (run / HALT).exists() and sum(line.startswith("lost: nothing listens") for line in said) == 2


def test_a_run_that_is_lost_after_it_was_asked_to_halt_does_not_begin_again(tmp_path: Path):
    server, run = tmp_path / "server", tmp_path / "run"
    assert fedssl("server", "init", server, "--port", "9") == 0
    with (server / "server.toml").open("a") as file:
        file.write("nodes_seconds = 0.1\n")
    write_catalogue(Catalogue(("a", "b")), tmp_path / "catalogue.jsonl")
    begin_run(write_tiny(tmp_path, tmp_path / "h.txt"), tmp_path / "catalogue.jsonl", run)
    # `fedssl server halt --now` asks first and ends the run then.
    assert run_to_end(Link(server), run, lambda line: (run / HALT).touch()) == "stopped"


def test_state_counts_what_was_refused_and_passes_over_half_a_line(tmp_path: Path):
    lines = [{"phase": "training", "round": number, "refused_for": {"norm": 1, "missing": number}} for number in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"phase": "tr')
    assert state_of(tmp_path) == {"run": str(tmp_path), "checkpoint": None, "phase": "training", "round": 2, "refused": {"norm": 2, "missing": 3}}


def test_no_code_travels():
    assert sorted(path.name for path in FLOWER_APP.iterdir()) == ["README.md", "pyproject.toml"]
    # What Flower itself packs and sends: these two, and its own list of them.
    with ZipFile(BytesIO(build_fab_from_disk(FLOWER_APP))) as packed:
        assert sorted(packed.namelist()) == [".info/CONTENT", "README.md", "pyproject.toml"]
