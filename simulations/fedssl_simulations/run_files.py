"""RUN.toml: read with its preset and overrides, and written resolved into the run folder."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from fedssl.checking import check, read_toml
from fedssl.config import RunConfig
from fedssl.disk import write_whole
from fedssl.errors import ConfigError
from fedssl_simulations.merge import merged


def presets() -> dict[str, str]:
    """Names of the presets that ship, each with the first line of its comment."""
    found = {}
    for entry in sorted(resources.files("fedssl_simulations").joinpath("presets").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            first = entry.read_text(encoding="utf-8").splitlines()[0]
            found[entry.name.removesuffix(".toml")] = first.lstrip("# ") if first.startswith("#") else ""
    return found


def read_run(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, seed: int | None = None) -> RunConfig:
    """A run from a TOML file, a preset's name, or a mapping.

    ``overrides``: ``section.key=value`` each, the value as TOML or, where it is not TOML, as text; ``task.0.weight=0.1``
    reaches into lists. A file may begin with ``preset = "name"`` and change only what it names; the run.toml of a run
    folder is whole, so it is taken as it is and begins the same run anew.
    Raises ConfigError that says where, what came, what was wanted.
    """
    if isinstance(source, Mapping):
        where, values = "run", copy.deepcopy(dict(source))
    else:
        where, values = _read(source)
    is_whole = values.pop("about", None) is not None
    if isinstance(values.get("preset"), str) and values["preset"] and not is_whole:
        values = merged(_preset(values["preset"], where), values)
    for text in overrides:
        _override(values, text)
    if overrides:
        where += f" with {' '.join(f'--set {text}' for text in overrides)}"
    if seed is not None:
        values["seed"] = seed
    return check(RunConfig, values, where=where)


def write_run(config: RunConfig, path: Path, **about: Any) -> None:
    """The resolved config and ``about`` (versions, fingerprint, run id) as TOML, written beside and renamed."""
    values = _without_none(config.model_dump(mode="json"))
    write_whole(path, tomli_w.dumps({"about": _without_none(about), **values}))


def read_written_run(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """What `write_run` wrote: the config and what is about it."""
    values = _parse(path)
    about = values.pop("about", {})
    return check(RunConfig, values, where=str(path)), about


def _read(source: str | Path) -> tuple[str, dict[str, Any]]:
    path = Path(source)
    # A folder of that name, like the one `make demo` makes, does not hide a preset.
    if path.suffix != ".toml" and not path.is_file():
        return str(source), {**_preset(str(source), "command line"), "preset": str(source)}
    return path.name, _parse(path)


def _parse(path: Path) -> dict[str, Any]:
    return read_toml(path, missing=f"{path}: no such file; give a RUN.toml or the name of a preset ({', '.join(presets())})")


def _preset(name: str, where: str) -> dict[str, Any]:
    file = resources.files("fedssl_simulations").joinpath("presets", f"{name}.toml")
    if not file.is_file():
        raise ConfigError(f"{where}: there is no preset or file '{name}'; presets: {', '.join(presets())}")
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _override(values: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: wanted section.key=value, for example --set server.rounds=50")
    try:
        parsed: Any = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if path[0] == "task" and len(path) > 1:
        # The default list written out, so that a number reaches into it.
        values.setdefault("task", [task.model_dump() for task in RunConfig().task])
    here: Any = values
    for part in path[:-1]:
        try:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
        except (IndexError, ValueError, AttributeError):
            raise ConfigError(f"--set {text}: there is no '{part}' to set '{path[-1]}' in") from None
    if parsed == "none" and len(path) == 1 and path[0] in ("counts", "distillation"):
        values.pop(path[0], None)
    elif isinstance(here, dict):
        here[path[-1]] = None if parsed == "none" and path[-1] != "name" else parsed
    else:
        raise ConfigError(f"--set {text}: '{'.'.join(path[:-1])}' is not a section")


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value
