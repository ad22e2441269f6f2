"""`fedssl attack ...` prints a table and leaves JSON where it was told to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import fedssl, tiny_run
from fedssl_simulations.attacks.audit import SCENARIOS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with histories of 60 users, their attributes, a RUN.toml and a finished run."""
    folder = tmp_path_factory.mktemp("attack")
    run = tiny_run(folder, more=f'users = "{folder}/users.csv"')
    names = [line.split()[0] for line in (folder / "h.txt").read_text().splitlines()]
    (folder / "users.csv").write_text("user_id,gender,age\n" + "".join(f"{name},{'FM'[place % 2]},{place}\n" for place, name in enumerate(names)))
    assert fedssl("simulate", run, "--out", folder / "run", "--quiet") == 0
    return folder


def test_items_of_a_trained_model(tiny: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = tiny / "run" / "checkpoints" / "round-000003"
    assert fedssl("attack", "items", tiny / "run.toml", "--users", "5", "--noise", "0.5", "--checkpoint", checkpoint, "--out", tiny / "a") == 0
    assert "raw, one upload" in capsys.readouterr().out
    found = json.loads((tiny / "a" / "items.json").read_text())
    assert {"value", "low", "high"} == found["rows"][0]["f1"].keys()


def test_the_audit_and_its_mistakes(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert fedssl("attack", "audit", "--canaries", "4000", "--out", tiny / "a", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["refuted"] for row in found["rows"]] == ["0 of 1"] * len(SCENARIOS)
    assert found["about"]["confidence"] == 0.999
    assert sorted(path.name for path in (tiny / "a").glob("audit*")) == ["audit.json"]
    assert not [path for path in (tiny / "a").rglob("*") if path.name == "secrets"]


def test_membership_and_then_again_from_what_is_there(tiny: Path, capsys: pytest.CaptureFixture[str]):
    words = ("attack", "membership", tiny / "run.toml", "--shadows", "4", "--processes", "2", "--out", tiny / "m")
    assert fedssl(*words) == 0
    assert "likelihood ratio" in capsys.readouterr().out
    before = (tiny / "m" / "membership.json").read_bytes()
    assert fedssl(*words, "--quiet") == 0
    assert (tiny / "m" / "membership.json").read_bytes() == before


def test_attributes_of_a_run(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert fedssl("attack", "attributes", tiny / "run", "--out", tiny / "a") == 0
    said = capsys.readouterr().out
    for words in ("untrained encoder", "gender is", "age above 29.5", "no noise"):
        assert words in said
    assert fedssl("attack", "attributes", tiny / "run", "--attribute", "zip", "--out", tiny / "a") == 1
    assert "no user has the attribute 'zip'; there is age, gender" in capsys.readouterr().err
