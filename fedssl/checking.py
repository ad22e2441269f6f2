"""Settings from a mapping or a TOML file: checked, or refused with words that say where, what came, what was wanted."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedssl.errors import ConfigError

Checked = TypeVar("Checked", bound=BaseModel)


def check(kind: type[Checked], values: Mapping[str, Any], *, where: str) -> Checked:
    """``kind`` made of ``values``, or a ConfigError that says where, what came, what was wanted."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "extra_forbidden":
            message = f"{_section(path[:-1])}has no key '{path[-1]}'{_neighbour(kind, path)}"
        elif first["type"] == "value_error":
            message = f"{_section(path)}{first['ctx']['error']}"
        else:
            got = first["input"] if not isinstance(first["input"], Mapping) else "a table"
            message = f"{_section(path[:-1])}{path[-1]} = {got!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise ConfigError(f"{where}: {message}{more}") from None


def check_file(kind: type[Checked], path: Path, *, missing: str) -> Checked:
    """`check` of `read_toml`."""
    return check(kind, read_toml(path, missing=missing), where=str(path))


def read_toml(path: Path, *, missing: str) -> dict[str, Any]:
    """What a TOML file says. Raises ConfigError: ``missing`` where there is no file, else where and why it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(missing) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error}); wanted [section] lines and key = value lines") from None


def _section(path: list[str]) -> str:
    names = [part for part in path if not part.isdigit()]
    return f"[{'.'.join(names)}] " if names else ""


def _neighbour(kind: type[BaseModel], path: list[str]) -> str:
    """The known key nearest to an unknown one, found by walking the models along ``path``."""
    here: Any = kind
    for part in path[:-1]:
        if part.isdigit():
            continue
        field = here.model_fields.get(part)
        here = _model_in(field.annotation) if field is not None else None
        if here is None:
            return ""
    near = difflib.get_close_matches(path[-1], list(here.model_fields), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(here.model_fields)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
