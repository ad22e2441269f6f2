"""The catalogue: item tokens, their rows, titles and attributes. Row 0 is padding and is never scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fedssl.errors import CatalogueMismatch, DataError


@dataclass(frozen=True)
class Catalogue:
    """Items in row order: ``tokens[0]`` is row 1. Titles and attributes may be missing (empty)."""

    tokens: tuple[str, ...]
    titles: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        """Items, without the padding row."""
        return len(self.tokens)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each token, from 1."""
        return {token: row for row, token in enumerate(self.tokens, start=1)}

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the tokens in order: equal hashes mean equal rows."""
        return hashlib.sha256("\x1f".join(self.tokens).encode()).hexdigest()

    def row(self, token: str) -> int:
        """The row of ``token``. Raises CatalogueMismatch for a token that is not listed."""
        try:
            return self.rows[token]
        except KeyError:
            raise CatalogueMismatch(f"item '{token}' is not in the catalogue of {self.num_items} items; check its spelling in catalogue.jsonl") from None

    def title(self, row: int) -> str:
        """Title of a row where known, else its token; row 0 is padding."""
        token = self.tokens[row - 1] if row else "padding"
        return self.titles.get(token, token)


def write_catalogue(catalogue: Catalogue, path: Path) -> None:
    """One JSON object a line in row order: token, title, attributes; the first line is the padding row."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"row": 0, "token": None}) + "\n")
        for row, token in enumerate(catalogue.tokens, start=1):
            line = {"row": row, "token": token, "title": catalogue.titles.get(token), "attributes": dict(catalogue.attributes.get(token, {}))}
            file.write(json.dumps({name: value for name, value in line.items() if value}, ensure_ascii=False) + "\n")


def read_catalogue(path: Path) -> Catalogue:
    """A catalogue that `write_catalogue` wrote. Raises DataError with the line that is wrong."""
    tokens: list[str] = []
    titles: dict[str, str] = {}
    attributes: dict[str, Mapping[str, str]] = {}
    try:
        # Not splitlines: it would also cut at U+2028 within a title.
        lines: Sequence[str] = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a catalogue ({error})") from None
    for number, line in enumerate(lines):
        try:
            item = json.loads(line)
            row, token = item["row"], item["token"]
            if type(token) not in (str, type(None)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}, line {number + 1}: not a JSON object with row and token; take the catalogue.jsonl of a checkpoint, as it was written"
            ) from None
        if row != number or (row == 0) != (token is None):
            raise DataError(f"{path}, line {number + 1}: row {row} where {number} was wanted; rows count from 0, row 0 is padding")
        if row:
            tokens.append(token)
            if item.get("title"):
                titles[token] = item["title"]
            if item.get("attributes"):
                attributes[token] = item["attributes"]
    if not tokens:
        raise DataError(f"{path}: no items; a catalogue has a padding row and at least one item")
    if len(set(tokens)) != len(tokens):
        raise DataError(f"{path}: a token is listed twice; tokens name rows and must differ")
    return Catalogue(tuple(tokens), titles, attributes)
