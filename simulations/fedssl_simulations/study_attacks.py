"""Attacks on the page of a study: what each finds at every epsilon, as charts with chance beside them and as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedssl_simulations.charts import LineChart, Series, line_chart
from fedssl_simulations.study import Done, Outcome

DRAWN = {
    "membership": ("attack", ("likelihood ratio",), ("auc", "true positives at 1 % false")),
    "attributes": ("model", (), ("auc",)),
}
"""For each attack: the column that says whose a row is, the rows that are drawn (empty: all but the untrained encoder's), and the figures."""
CHANCE = {"auc": 0.5, "true positives at 1 % false": 0.01}


@dataclass(frozen=True)
class AttackTable:
    """What an attack found at each epsilon: the words of its columns, and rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


@dataclass(frozen=True)
class Drawing:
    """A chart, and the names of its lines where they are not the methods that the head of the page names."""

    chart: LineChart
    has_key: bool


def against_epsilon(title: str, series: Sequence[Series], names: Sequence[float], *, digits: str) -> LineChart:
    """Lines over epsilons, each at the place it has among ``names``."""
    return line_chart(title, series, digits=digits, from_zero=True, x_label="epsilon", x_names=[epsilon_word(epsilon) for epsilon in names])


def _by_attack(outcome: Outcome) -> dict[tuple[str, str], list[Done]]:
    """What attacks found, those of one label together, by epsilon."""
    found: dict[tuple[str, str], list[Done]] = {}
    for one in sorted(outcome.done, key=lambda one: one.point.epsilon):
        if one.point.what != "run":
            found.setdefault((one.point.what, one.point.method), []).append(one)
    return found


def attack_charts(outcome: Outcome, names: Sequence[float]) -> list[Drawing]:
    """For each attack what it finds against epsilon, bands its intervals, and what chance would find, dashed."""
    drawings = []
    for (what, label), found in _by_attack(outcome).items():
        column, wanted, figures = DRAWN[what]
        lines: dict[tuple[str, str], list[tuple[float, Mapping[str, float]]]] = {}
        for one in found:
            for row in one.found["rows"]:
                if row[column] in wanted or (not wanted and row[column] != "untrained encoder"):
                    for figure in figures:
                        name = figure.upper() if figure == "auc" else figure
                        lines.setdefault((figure, f"{name}: {row['question']}" if "question" in row else name), []).append(
                            (float(names.index(one.point.epsilon)), row[figure])
                        )
        series = []
        for number, ((_, name), points) in enumerate(lines.items()):
            xs = [x for x, _ in points]
            ys, low, high = ([values[key] for _, values in points] for key in ("value", "low", "high"))
            series.append(Series(name, number % 6, xs, ys, marked=True, low=low, high=high))
        for number, figure in enumerate(dict.fromkeys(figure for figure, _ in lines)):
            of = number if len(figures) > 1 else len(lines)
            ends = [0.0, float(len(names) - 1)]
            name = f"chance, of {figure.upper() if figure == 'auc' else figure}"
            series.append(Series(name, of % 6, ends, [CHANCE[figure]] * 2, dashed=True))
        if lines:
            drawings.append(Drawing(against_epsilon(_title(what, label), series, names, digits=".3f"), has_key=True))
    return drawings


def _title(what: str, label: str) -> str:
    plain = {"membership": "Who was trained on?", "attributes": "What does a frozen encoder tell?"}[what]
    return plain if label == what else f"{plain} {label}"


def attack_tables(outcome: Outcome) -> list[AttackTable]:
    """A table for each attack: a row an epsilon and row of what was found, no privacy first; what is the same at every epsilon stands once, first.

    Notes that hold of one epsilon alone are left to the attack's own file.
    """
    tables = []
    for (what, label), found in _by_attack(outcome).items():
        columns = ["epsilon", *(name for name in found[0].found["rows"][0] if name != "epsilon")]
        rows = [(one, row) for one in reversed(found) for row in one.found["rows"]]
        texts = [[_word_of(one, row, name) for name in columns[1:]] for one, row in rows]
        always = [list(row) for row in dict.fromkeys(map(tuple, texts)) if len(found) > 1 and texts.count(list(row)) == len(found)]
        told = [["any", *row] for row in always]
        told += [[epsilon_word(one.point.epsilon), *row] for (one, _), row in zip(rows, texts, strict=True) if row not in always]
        notes = [note for note in found[0].found["notes"] if all(note in one.found["notes"] for one in found)]
        tables.append(AttackTable(_title(what, label), ["ε", *(_heading(name) for name in columns[1:])], told, notes))
    return tables


def _word_of(one: Done, row: Mapping[str, Any], name: str) -> str:
    """A cell; a run that was probed goes by its method, because its epsilon stands beside it."""
    value = row[name]
    return _method_of(one.point.source) if name == "model" and value == one.point.source.rpartition("/")[2] else _text(value)


def _method_of(folder: str) -> str:
    """The method in the name of a run's folder (`Point.folder`)."""
    return folder.rpartition("/")[2].partition("-epsilon-")[0].replace("-", " ")


def _heading(name: str) -> str:
    return name.upper() if name == "auc" else name.capitalize()


def epsilon_word(epsilon: float) -> str:
    """As it is printed."""
    return "∞" if math.isinf(epsilon) else f"{epsilon:g}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
