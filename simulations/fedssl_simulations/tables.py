"""The table of results: which recommender reached what, as rows for a page and as a table for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from fedssl_simulations.merge import merged

Kind = Literal["baseline", "part", "federated"]

_LABELS = {
    "popularity": "Popularity",
    "markov": "Markov chain",
    "counts": "Item-to-item counts",
    "encoder": "Encoder",
    "head": "Personal head",
    "central": "Central training",
    "each alone": "Each user alone",
}


@dataclass(frozen=True)
class Recommender:
    """One row: metrics by name over all items and over those a user has not met. ``kind``: baseline, part of the run's model, or the model."""

    label: str
    kind: Kind
    all: Mapping[str, float]
    unseen: Mapping[str, float]


def opened(value: Any, *, public: bool) -> Any:
    """What a run wrote, with every `researcher_only` at any depth left out (``public``) or laid among its neighbours.

    Where both hold a name and both values are tables, they are merged; else what was released stands.
    """
    if isinstance(value, Mapping):
        released = {name: opened(part, public=public) for name, part in value.items() if name != "researcher_only"}
        kept = value.get("researcher_only")
        return released if public or not isinstance(kept, Mapping) else merged(opened(kept, public=False), released)
    if isinstance(value, list):
        return [opened(part, public=public) for part in value]
    return value


def recommenders(report: Mapping[str, Any], split: Literal["test", "validation"] = "test") -> list[Recommender]:
    """The rows that an opened `report.json` holds: baselines, then the model's parts alone, then the model itself."""
    found = report.get(split) or {}
    rows = [_row(label(name), "baseline", values[split]) for name, values in (report.get("baselines") or {}).items() if values.get(split)]
    rows += [_row(f"{label(name)} alone", "part", values) for name, values in (found.get("parts") or {}).items()]
    if found.get("all") or found.get("unseen"):
        fleet = (report.get("privacy") or {}).get("fleet_users")
        rows.append(_row(f"Federated, noise of a fleet of {fleet:,}" if fleet else "Federated", "federated", found))
    return rows


def label(name: str) -> str:
    """What a reader calls a recommender or part of that name."""
    return _LABELS.get(name) or name.replace("_", " ").strip().capitalize()


def metric_names(rows: Iterable[Recommender]) -> list[str]:
    """All metrics of the rows: by kind in the order hr, ndcg, mrr, others, and by cut-off within."""
    order = ["hr", "ndcg", "mrr"]

    def place(name: str) -> tuple[int, str, int]:
        kind, _, cut = name.partition("@")
        return (order.index(kind) if kind in order else len(order), kind, int(cut) if re.fullmatch(r"\d+", cut) else 0)

    return sorted({name for row in rows for name in (*row.all, *row.unseen)}, key=place)


def best(rows: Sequence[Recommender]) -> dict[tuple[str, str], float]:
    """The largest value of each (column, metric), for columns that more than one row fills."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for column, values in (("all", row.all), ("unseen", row.unseen)):
            for name, value in values.items():
                found.setdefault((column, name), []).append(value)
    return {cell: max(values) for cell, values in found.items() if len(values) > 1}


def results_table(report: Mapping[str, Any]) -> Table:
    """NDCG@10 and HR@10 of every recommender of a `report.json`, over all and over unseen items, for the terminal; what leads is bold.

    Numbers kept for the researcher are shown. Without a test the table has no rows.
    """
    rows = recommenders(opened(report, public=False))
    leading = best(rows)
    table = Table(title="Test, ranked against the whole catalogue")
    table.add_column("recommender")
    columns = [(column, name) for name in ("ndcg@10", "hr@10") for column in ("all", "unseen")]
    for column, name in columns:
        table.add_column(f"{name.upper()}\n{column}", justify="right")
    for row in rows:
        cells = []
        for column, name in columns:
            value = (row.all if column == "all" else row.unseen).get(name)
            text = "" if value is None else f"{value:.4f}"
            cells.append(f"[bold]{text}[/bold]" if value is not None and value == leading.get((column, name)) else text)
        table.add_row(escape(row.label), *cells, style="green" if row.kind == "federated" else None)
    return table


def _row(name: str, kind: Kind, values: Mapping[str, Any]) -> Recommender:
    def clean(part: str) -> dict[str, float]:
        return {metric: float(value) for metric, value in (values.get(part) or {}).items() if isinstance(value, int | float) and value == value}

    return Recommender(name, kind, clean("all"), clean("unseen"))
