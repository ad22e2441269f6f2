"""From a name to what it stands for: something that ships, or ``package.module:name`` of one's own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fedssl.errors import ConfigError


def find(known: Mapping[str, Any], name: str, *, what: str) -> Any:
    """What ``name`` stands for: an entry of ``known``, else an object by ``package.module:name``, which must be callable.

    Raises ConfigError that lists what there is.
    """
    if name in known:
        return known[name]
    if ":" not in name:
        raise ConfigError(f"there is no {what} '{name}'; there is {', '.join(sorted(known))}, or package.module:name of your own")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what} '{name}' cannot be loaded ({error}); write package.module:name of something that can be imported") from None
    if not callable(found):
        raise ConfigError(f"{what} '{name}' is not a function; CONTRIBUTING.md shows what it must be")
    return found
