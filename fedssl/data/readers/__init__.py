"""Reading histories: one file per format, a dict for look-up, and a look at the content where no format is named.

A format of one's own is a function from a path to `Interactions`, given by object or as `"package.module:name"`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from fedssl.data.interactions import Interactions
from fedssl.data.paths import find_path
from fedssl.data.readers.inter import has_typed_header, read_inter, write_inter
from fedssl.data.readers.items import read_items
from fedssl.data.readers.lines import read_lines, write_lines
from fedssl.data.readers.text import first_line
from fedssl.errors import ConfigError, DataError

__all__ = ["FORMATS", "Reader", "find_format", "find_reader", "read_interactions", "read_items", "write_inter", "write_lines"]

Reader = Callable[[Path], Interactions]

FORMATS: dict[str, Reader] = {"inter": read_inter, "lines": read_lines}


def read_interactions(path: str | Path, format: str | Reader = "auto") -> Interactions:
    """The events of a file, in file order.

    ``path``: as it is, else in $FEDSSL_DATA. ``format``: auto (found by looking), a name in FORMATS, `package.module:name`, or a
    reader. Raises DataError for a file that is missing, empty, damaged or of another format; ConfigError for an unknown format.
    """
    found = find_path(path)
    if found.is_dir():
        raise DataError(f"{found}: a folder, not a file of histories; a folder that `fedssl data convert` made goes straight into [data] path")
    reader = format if callable(format) else find_reader(find_format(found) if format == "auto" else format)
    interactions = reader(found)
    if not isinstance(interactions, Interactions):
        raise ConfigError(f"[data] format {format!r}: returned {type(interactions).__name__}; a reader returns fedssl.data.interactions.Interactions")
    return interactions


def find_format(path: Path) -> str:
    """The format of a file, by its first line and not its name. Raises DataError where it is none that ships.

    A tab-separated first line without types is refused rather than guessed at: `user item rating time` would read as four items.
    """
    line = first_line(path)
    if has_typed_header(line):
        return "inter"
    tokens = line.split()
    if "\t" not in line and len(tokens) > 1 and "," not in tokens[0] and "::" not in tokens[0] and tokens[0][0] not in "{[<":
        return "lines"
    raise DataError(
        f"{path}: starts with {line[:60]!r}, which is neither a RecBole header (`user_id:token`, `item_id:token`, tab-separated) nor `user item item ...`; "
        "name its format in [data] format, or convert it"
    )


def find_reader(name: str) -> Reader:
    """The reader called ``name``: one of FORMATS, or `package.module:name`. Raises ConfigError for anything else."""
    if name in FORMATS:
        return FORMATS[name]
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigError(f"[data] format {name!r} is unknown; known: auto, {', '.join(FORMATS)}, or package.module:name")
    try:
        reader = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"[data] format {name!r} cannot be loaded ({error}); is its package installed?") from None
    if not callable(reader):
        raise ConfigError(f"[data] format {name!r} is not a function; wanted one from a path to Interactions")
    return reader  # type: ignore[no-any-return]
