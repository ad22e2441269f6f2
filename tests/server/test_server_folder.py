"""server.toml: what it says of rounds is checked, and reaches the ServerApp."""

from __future__ import annotations

from pathlib import Path

import pytest
from fedssl_server import app as door
from fedssl_server.server_folder import FILE, Rounds, make_server_folder, read_server

from fedssl.errors import ConfigError


def with_rounds(folder: Path, **rounds: object) -> Path:
    make_server_folder(folder)
    lines = [f"{name} = {value!r}".replace("'", '"') for name, value in rounds.items()]
    (folder / FILE).write_text("[rounds]\n" + "\n".join(lines) + "\n")
    return folder


def test_what_server_toml_says_of_rounds_is_what_the_server_app_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = with_rounds(tmp_path / "s", round_seconds=900.0, reconnect_seconds=120.0, least_fraction=0.5, when_fewer="continue")
    for name, value in read_server(folder).rounds.environment.items():
        monkeypatch.setenv(name, value)
    assert door._waits() == {"deadline_seconds": 900.0, "reconnect_seconds": 120.0, "least_fraction": 0.5, "goes_on": True}


def test_where_it_says_nothing_a_round_waits_an_hour_for_all_and_takes_what_came(monkeypatch: pytest.MonkeyPatch):
    nothing = {"deadline_seconds": 3600.0, "reconnect_seconds": 0.0, "least_fraction": 0.0, "goes_on": False}
    assert door._waits() == nothing
    for name, value in Rounds().environment.items():
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
        read_server(with_rounds(tmp_path / "s", **rounds))
    assert f"[rounds] {why}" in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("FEDSSL_LEAST_FRACTION", "2"), ("FEDSSL_WHEN_FEWER", "hope"), ("FEDSSL_RECONNECT_SECONDS", "-1")])
def test_an_environment_that_cannot_be_is_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        door._waits()
