"""The settings of a run on a server: read from run.toml, and refused where only a simulation could follow them."""

from __future__ import annotations

from pathlib import Path

from fedssl.checking import check, read_toml
from fedssl.config import RunConfig
from fedssl.errors import ConfigError

HALT = "halt"
"""A file of this name in a run's folder asks the run to stop after the round at hand."""


def read_settings(path: Path) -> RunConfig:
    """A whole run.toml: every setting stands in it, or has its default. Raises ConfigError where it cannot be read, or a server cannot follow it."""
    values = read_toml(path, missing=f"{path}: no such file; a run folder begins with run.toml and catalogue.jsonl")
    # What a simulation writes about itself: versions, fingerprint. Its settings are whole, whatever preset they began from.
    is_whole = values.pop("about", None) is not None
    config = check(RunConfig, values, where=str(path))
    if config.preset and not is_whole:
        raise ConfigError(f"{path}: preset = {config.preset!r} stands for settings that only `fedssl simulate` looks up; take the run.toml that it writes")
    if config.start:
        raise ConfigError(f"{path}: start = {config.start!r} is for simulations; a server's run begins from nothing. Take it away, or --resume a run")
    if config.evaluation.patience:
        raise ConfigError(f"{path}: [evaluation] patience needs validations, which only a simulation makes yet; set patience = 0")
    if config.privacy.fleet_users:
        raise ConfigError(f"{path}: [privacy] fleet_users is a question for a simulation; these users would get too little noise. Set it to 0")
    return config
