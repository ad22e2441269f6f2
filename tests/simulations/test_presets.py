"""Presets are found by name, wherever the command is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from fedssl_simulations.run_files import presets, read_run

from fedssl.errors import ConfigError


def test_every_preset_is_a_run_and_says_what_it_is():
    assert {"demo", "ml-1m"} <= presets().keys()
    for name, about in presets().items():
        assert read_run(name).preset == name
        assert about


def test_a_folder_does_not_hide_a_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_run("demo").preset == "demo"


def test_a_folder_is_not_taken_for_a_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="no preset or file"):
        read_run(str(tmp_path))
