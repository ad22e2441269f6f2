"""What an attack found: JSON in a folder, and the same as a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedssl.disk import write_whole


@dataclass(frozen=True)
class Figure:
    """A number and the interval it lies in with the confidence that the attack names."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_short(self.value)} ({_short(self.low)} to {_short(self.high)})"


@dataclass(frozen=True)
class Found:
    """``rows``: of one table, values by column; a `Figure`, a number or text. ``about``: what they depend on, as plain values.

    ``notes``: sentences without which the table would be misread, such as the statement behind an epsilon.
    """

    attack: str
    title: str
    rows: Sequence[Mapping[str, Figure | float | int | str]]
    notes: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values; a figure is {value, low, high}."""
        rows = [{name: vars(value) if isinstance(value, Figure) else value for name, value in row.items()} for row in self.rows]
        return {"attack": self.attack, "title": self.title, "rows": rows, "notes": list(self.notes), "about": dict(self.about)}

    def as_table(self) -> Table:
        """The rows for a terminal."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD)
        for name, example in self.rows[0].items():
            table.add_column(name, justify="left" if isinstance(example, str) else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(_short(value) if isinstance(value, float) else str(value) for value in row.values()))
        return table


def write_found(found: Found, folder: Path) -> Path:
    """``folder``/<attack>.json, whole or as it was before. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found.attack}.json"
    write_whole(path, json.dumps(found.as_json(), indent=1))
    return path


def statement_line(statement: Mapping[str, Any] | None) -> str:
    """What stands behind an epsilon, in one line: unit, neighbours, trust, sampling, accountant, delta."""
    if not statement:
        return "no noise, so no epsilon is promised"
    sampling = "; ".join(f"{phase}: {how}" for phase, how in statement["sampling"].items())
    return (
        f"epsilon {statement['epsilon']:.4g} at delta {statement['delta']:g} (unit: {statement['unit']}; neighbours: {statement['neighbours']}; "
        f"trust: {statement['trust']}; sampling: {sampling}; accountant: {statement['accountant']})"
    )


def _short(value: float) -> str:
    if math.isinf(value):
        return "inf"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}"
