"""The page of a study: utility against epsilon with its spread, attacks beside it, cost, the promise in words, a table to copy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from fedssl import __version__
from fedssl_simulations.charts import LineChart, Series, line_chart
from fedssl_simulations.promise import Promise, promise
from fedssl_simulations.study import Done, Outcome, test_of
from fedssl_simulations.study_file import StudyConfig


@dataclass(frozen=True)
class Cell:
    """One method at one epsilon: means over seeds, smallest and largest of the first column, and what it cost."""

    method: str
    colour: int
    epsilon: float
    seeds: int
    unseen: float
    lowest: float
    highest: float
    all: float
    kept: float | None
    spent: float | None
    seconds: float
    upload_bytes: float


@dataclass(frozen=True)
class AttackTable:
    """What an attack found at each epsilon: the words of its columns, and rows of text."""

    title: str
    chart: LineChart | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def render_study(study: StudyConfig, outcome: Outcome) -> str:
    """The page as text: self-contained, nothing on it is fetched. It shows what no epsilon covers, so it is for the researcher."""
    names = epsilons(study)
    cells = cells_of(study, outcome)
    runs = [one for one in outcome.done if one.point.what == "run"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedssl_simulations"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("study.html").render(
        title=study.title,
        methods=[(method.name, number % 6) for number, method in enumerate(study.method)],
        charts=[chart for column in ("unseen", "all") if (chart := _utility(study, runs, names, column)) is not None],
        cells=cells,
        attacks=_attacks(study, outcome, names),
        promises=_promises(study, runs),
        table=as_markdown(study, cells),
        left=[point.folder for point in outcome.left],
        failed=[(point.folder, words) for point, words in outcome.failed],
        metric=study.metric.upper(),
        word=_word,
        version=__version__,
    )


def epsilons(study: StudyConfig) -> list[float]:
    """All that occur, ascending, infinity last."""
    return sorted({*study.epsilon, *(epsilon for attack in study.attack for epsilon in attack.epsilon)})


def cells_of(study: StudyConfig, outcome: Outcome) -> list[Cell]:
    """A cell for each method and epsilon that has a run, no privacy first."""
    cells: list[Cell] = []
    for number, method in enumerate(study.method):
        without: float | None = None
        for epsilon in sorted(study.epsilon, reverse=True):
            runs = [one for one in outcome.done if one.point.what == "run" and (one.point.method, one.point.epsilon) == (method.name, epsilon)]
            if not runs:
                continue
            unseen = [test_of(one.found)["unseen"][study.metric] for one in runs]
            mean = statistics.fmean(unseen)
            without = mean if math.isinf(epsilon) else without
            spent = [float(one.found["privacy"]["epsilon"]) for one in runs if one.found.get("privacy")]
            cells.append(
                Cell(
                    method.name,
                    number % 6,
                    epsilon,
                    len(runs),
                    mean,
                    min(unseen),
                    max(unseen),
                    statistics.fmean(test_of(one.found)["all"][study.metric] for one in runs),
                    mean / without if without else None,
                    max(spent) if spent else None,
                    statistics.fmean(one.seconds for one in runs),
                    statistics.fmean(float(one.found["cost"]["upload_bytes_per_user"]) * float(one.found["cost"]["rounds"]) for one in runs),
                )
            )
    return cells


def as_markdown(study: StudyConfig, cells: Sequence[Cell]) -> str:
    """The table to copy."""
    metric = study.metric.upper()
    lines = [
        f"| method | epsilon | seeds | {metric} unseen (lowest to highest) | {metric} all | of no privacy | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        kept = "" if cell.kept is None else f"{cell.kept:.0%}"
        spread = f"{cell.unseen:.4f} ({cell.lowest:.4f} to {cell.highest:.4f})"
        lines.append(f"| {cell.method} | {_word(cell.epsilon)} | {cell.seeds} | {spread} | {cell.all:.4f} | {kept} | {cell.seconds:.0f} |")
    return "\n".join(lines)


def _utility(study: StudyConfig, runs: Sequence[Done], names: Sequence[float], column: str) -> LineChart | None:
    series = []
    for number, method in enumerate(study.method):
        xs, means, low, high = [], [], [], []
        for place, epsilon in enumerate(names):
            found = [test_of(one.found)[column][study.metric] for one in runs if (one.point.method, one.point.epsilon) == (method.name, epsilon)]
            if found:
                xs.append(float(place))
                means.append(statistics.fmean(found))
                low.append(min(found))
                high.append(max(found))
        if xs:
            series.append(Series(method.name, number % 6, xs, means, marked=True, low=low, high=high))
    if not series:
        return None
    words = [_word(epsilon) for epsilon in names]
    title = f"{study.metric.upper()}, {'unseen' if column == 'unseen' else 'all'} items"
    return line_chart(title, series, digits=".4f", from_zero=True, x_label="epsilon", x_names=words)


def _attacks(study: StudyConfig, outcome: Outcome, names: Sequence[float]) -> list[AttackTable]:
    """A table for each kind of attack: a row an epsilon and row of what was found; the figures with intervals as a chart."""
    tables = []
    for what in dict.fromkeys(one.point.what for one in outcome.done if one.point.what != "run"):
        found = sorted((one for one in outcome.done if one.point.what == what), key=lambda one: one.point.epsilon)
        columns = ["epsilon", *found[0].found["rows"][0]]
        rows = [[_word(one.point.epsilon), *(_text(value) for value in row.values())] for one in found for row in one.found["rows"]]
        measured = [name for name, value in found[0].found["rows"][0].items() if isinstance(value, dict)]
        series = []
        for colour, name in enumerate(measured):
            points = [(float(names.index(one.point.epsilon)), one.found["rows"][0][name]) for one in found]
            values = [value for _, value in points]
            means, low, high = ([float(value[key]) for value in values] for key in ("value", "low", "high"))
            series.append(Series(name, colour % 6, [x for x, _ in points], means, marked=True, low=low, high=high))
        words = [_word(epsilon) for epsilon in names]
        chart = line_chart(found[0].found["title"], series, digits=".3f", from_zero=True, x_label="epsilon", x_names=words) if series else None
        tables.append(AttackTable(found[0].found["title"], chart, columns, rows, found[0].found["notes"]))
    return tables


def _promises(study: StudyConfig, runs: Sequence[Done]) -> list[Promise]:
    """What is promised at each epsilon, in words: of the first method that has a run there."""
    kept = []
    for epsilon in sorted(study.epsilon, reverse=True):
        found = next((one for method in study.method for one in runs if (one.point.method, one.point.epsilon) == (method.name, epsilon)), None)
        if found is not None:
            kept.append(promise(found.found.get("privacy") or {}, {}))
    return kept


def _word(epsilon: float) -> str:
    return "∞" if math.isinf(epsilon) else f"{epsilon:g}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
