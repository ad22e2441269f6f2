"""Side files, what is known about items or users: any of the formats below as rows of names and values, found by looking.

RecBole's `.item` and `.user`; CSV and TSV with a header; MovieLens' `movies.dat` and `users.dat` (`::`, no header); for items
Amazon's metadata, a JSON object a line (2014: a Python dictionary a line).
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedssl.data.readers.blocks import BadLines
from fedssl.data.readers.columns import CSV, numbered_lines, read_columns, read_header
from fedssl.data.readers.inter import has_typed_header, read_typed_header
from fedssl.data.readers.jsonl import parse_object
from fedssl.data.readers.text import first_line
from fedssl.errors import DataError

# Names that years of Amazon's metadata give the same thing.
_AMAZON = {"title": ("title",), "categories": ("categories", "category"), "brand": ("brand", "store"), "price": ("price",)}


def read_side(path: Path, key_names: Sequence[str], dat_names: Sequence[str], *, has_amazon: bool = False) -> Iterator[tuple[str, dict[str, str]]]:
    """Token and named values of every line, in file order; a value may be empty.

    ``key_names``: what the column of the token may be called, in small letters; ``dat_names``: the columns of the `.dat` file, the
    token's first. Raises DataError with file, line and reason for anything else. A `.dat` file may be in Latin-1, as MovieLens 1M is.
    """
    line = first_line(path)
    bad = BadLines(path)
    if has_amazon and line.startswith("{"):
        yield from _amazon(path, key_names, bad)
        return
    if has_typed_header(line):
        separator, names = "\t", read_typed_header(path)
    elif line.count("::") == len(dat_names) - 1:
        separator, names = "::", list(dat_names)
    else:
        separator = "\t" if "\t" in line else CSV
        names = read_header(path, separator)
    key = next((name for wanted in key_names for name in names if name.lower() == wanted), None)
    if key is None or len(set(names)) != len(names):
        reason = f"no column {key_names[0]} among {', '.join(names)[:200]}" if key is None else f"the header names a column twice: {', '.join(names)}"
        raise DataError(f"{path}: {reason}; wanted a RecBole atomic file, CSV or TSV with a header, or `{'::'.join(dat_names)}`")
    is_dat = separator == "::"
    widths = f"`{'::'.join(dat_names)}` was wanted" if is_dat else ""
    for numbers, columns in read_columns(path, separator, len(names), bad, has_header=not is_dat, wanted=widths, is_latin=is_dat):
        for number, values in zip(numbers, zip(*columns)):
            known = dict(zip(names, values))
            token = known.pop(key)
            if not token:
                bad.add(number, f"an empty {key_names[0].removesuffix('_id')} token; give every line one")
            yield token, known


def _amazon(path: Path, key_names: Sequence[str], bad: BadLines) -> Iterator[tuple[str, dict[str, str]]]:
    for numbers, lines in numbered_lines(path, bad):
        for number, line in zip(numbers, lines):
            found = parse_object(line)
            if isinstance(found, str):
                found = _literal(line) or found
            if isinstance(found, str):
                bad.add(number, found)
                continue
            token = found.get("parent_asin") or found.get("asin")
            if not isinstance(token, str):
                bad.add(number, f"no key asin or parent_asin in {line[:60]!r}")
                continue
            yield token, {name: next((text for key in keys if (text := _flat(found.get(key)))), "") for name, keys in _AMAZON.items()}


def _literal(line: str) -> dict[str, Any] | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            found = ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _flat(value: Any) -> str:
    """Text of a value; those of a list joined by `|`, of lists in lists too, each once."""
    if isinstance(value, list):
        return "|".join(dict.fromkeys(text for inner in value for text in _flat(inner).split("|") if text))
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
