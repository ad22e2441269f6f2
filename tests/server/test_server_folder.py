"""server.toml: what it says of rounds and nodes is checked, and reaches the ServerApp."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w
from fedssl_server import app as door
from fedssl_server.server_folder import FILE, ServerSettings, make_server_folder, read_server

from fedssl.errors import ConfigError


def with_settings(folder: Path, **sections: dict[str, object]) -> Path:
    make_server_folder(folder)
    (folder / FILE).write_text(tomli_w.dumps(sections))
    return folder


def test_what_server_toml_says_of_rounds_and_nodes_is_what_the_server_app_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rounds: dict[str, object] = {"round_seconds": 900.0, "reconnect_seconds": 120.0, "least_fraction": 0.5, "when_fewer": "continue"}
    folder = with_settings(tmp_path / "s", rounds=rounds, nodes={"most_users": 1, "users": 200})
    for name, value in read_server(folder).environment.items():
        monkeypatch.setenv(name, value)
    told: dict[str, object] = {"ledger_heads": None}
    told |= {"deadline_seconds": 900.0, "reconnect_seconds": 120.0, "least_fraction": 0.5, "goes_on": True, "num_users": 200, "most_users": 1}
    assert door._waits() == told


def test_where_it_says_nothing_a_round_waits_an_hour_for_all_and_takes_what_came(monkeypatch: pytest.MonkeyPatch):
    nothing: dict[str, object] = {"ledger_heads": None}
    nothing |= {"deadline_seconds": 3600.0, "reconnect_seconds": 0.0, "least_fraction": 0.0, "goes_on": False, "num_users": 0, "most_users": 0}
    assert door._waits() == nothing
    for name, value in ServerSettings().environment.items():
        monkeypatch.setenv(name, value)
    assert door._waits() == nothing


@pytest.mark.parametrize(
    ("rounds", "why"),
    [
        ({"least_fraction": 1.5}, "least_fraction = 1.5: input should be less than or equal to 1"),
        ({"least_fraction": -0.1}, "least_fraction = -0.1: input should be greater than or equal to 0"),
        ({"when_fewer": "hope"}, "when_fewer = 'hope': input should be 'stop' or 'continue'"),
        ({"round_seconds": 0}, "round_seconds = 0: input should be greater than 0"),
        ({"round_seconds": 60, "reconnect_seconds": 60}, "reconnect_seconds = 60 is not below round_seconds = 60"),
        ({"reconect_seconds": 60}, "has no key 'reconect_seconds'; did you mean 'reconnect_seconds'?"),
    ],
)
def test_a_setting_of_rounds_that_cannot_be_is_refused_by_name(rounds: dict[str, object], why: str, tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        read_server(with_settings(tmp_path / "s", rounds=rounds))
    assert f"[rounds] {why}" in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("FEDSSL_LEAST_FRACTION", "2"), ("FEDSSL_WHEN_FEWER", "hope"), ("FEDSSL_RECONNECT_SECONDS", "-1")])
def test_an_environment_that_cannot_be_is_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        door._waits()


@pytest.mark.parametrize("name", ["bad name", "", "a/b", "*.example.org"])
def test_a_name_that_no_node_could_find_makes_no_folder(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="no host name and no address"):
        make_server_folder(tmp_path / "server", names=[name])
    assert not (tmp_path / "server").exists()


@pytest.mark.parametrize("name", ["fl.example.org", "10.0.0.7", "::1", "my-host_2"])
def test_host_names_and_addresses_get_a_certificate(name: str, tmp_path: Path):
    make_server_folder(tmp_path / "server", names=[name])
    assert (tmp_path / "server" / FILE).exists()
