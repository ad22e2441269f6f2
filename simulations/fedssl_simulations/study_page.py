"""The page of a study: utility against epsilon with its spread, attacks beside it, cost, the promise in words and its terms, a table to copy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedssl import __version__
from fedssl_simulations.charts import Series
from fedssl_simulations.pages import render
from fedssl_simulations.promise import Promise, promise
from fedssl_simulations.study import Done, Outcome, test_of
from fedssl_simulations.study_attacks import Drawing, against_epsilon, attack_charts, attack_tables, epsilon_word
from fedssl_simulations.study_file import Method, StudyConfig

TERMS = ("unit", "neighbours", "trust", "sampling", "accountant", "delta")


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


def render_study(study: StudyConfig, outcome: Outcome) -> str:
    """The page as text: self-contained, nothing on it is fetched. It shows what no epsilon covers, so it is for the researcher."""
    names = epsilons(study)
    cells = cells_of(study, outcome)
    runs = [one for one in outcome.done if one.point.what == "run"]
    return render(
        "study.html",
        title=study.title,
        methods=[(method.name, number % 6) for number, method in enumerate(study.method)],
        drawings=[*_utility(study, runs, names), *attack_charts(outcome, names)],
        cells=cells,
        attacks=attack_tables(outcome),
        words=_promises(study, runs),
        terms=_terms(study, runs),
        table=as_markdown(study, cells),
        left=[point.folder for point in outcome.left],
        failed=[(point.folder, words) for point, words in outcome.failed],
        metric=study.metric.upper(),
        word=epsilon_word,
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
            runs = _at(method, epsilon, [one for one in outcome.done if one.point.what == "run"])
            if not runs:
                continue
            unseen = [_quality(method, one)["unseen"][study.metric] for one in runs]
            mean = statistics.fmean(unseen)
            without = mean if math.isinf(epsilon) else without
            spent = [float(one.found["privacy"]["epsilon"]) for one in runs if one.found.get("privacy") and not math.isinf(epsilon)]
            cells.append(
                Cell(
                    method.name,
                    number % 6,
                    epsilon,
                    len(runs),
                    mean,
                    min(unseen),
                    max(unseen),
                    statistics.fmean(_quality(method, one)["all"][study.metric] for one in runs),
                    mean / without if without else None,
                    max(spent) if spent else None,
                    statistics.fmean(one.seconds for one in runs),
                    statistics.fmean(_sent(one.found["cost"]) for one in runs),
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
        lines.append(f"| {cell.method} | {epsilon_word(cell.epsilon)} | {cell.seeds} | {spread} | {cell.all:.4f} | {kept} | {cell.seconds:.0f} |")
    return "\n".join(lines)


def _at(method: Method, epsilon: float, runs: Sequence[Done]) -> list[Done]:
    """The runs that a method's line is about at one epsilon."""
    return [one for one in runs if (one.point.method, one.point.epsilon) == (method.of or method.name, epsilon)]


def _quality(method: Method, one: Done) -> Mapping[str, Any]:
    """The test of the model, or of the method's part of it."""
    test = test_of(one.found)
    found: Mapping[str, Any] = test["parts"][method.part] if method.part and "parts" in test else test
    return found


def _sent(cost: Mapping[str, Any]) -> float:
    """Bytes that a user sends who is asked in every round, what is counted among them."""
    return float(cost["upload_bytes_per_user"]) * float(cost["rounds"]) + float(cost.get("counts_upload_bytes_per_user", 0))


def _utility(study: StudyConfig, runs: Sequence[Done], names: Sequence[float]) -> list[Drawing]:
    """Quality against epsilon, over items a user has not met and over all: a line a method, its band the lowest and highest seed."""
    drawings = []
    for column in ("unseen", "all"):
        series = []
        for number, method in enumerate(study.method):
            points = [
                (float(place), [_quality(method, one)[column][study.metric] for one in _at(method, epsilon, runs)]) for place, epsilon in enumerate(names)
            ]
            if points:
                xs, found = [place for place, _ in points], [found for _, found in points]
                low, high = [min(values) for values in found], [max(values) for values in found]
                series.append(Series(method.name, number % 6, xs, [statistics.fmean(values) for values in found], marked=True, low=low, high=high))
        if series:
            title = f"{study.metric.upper()}, {'unseen' if column == 'unseen' else 'all'} items"
            drawings.append(Drawing(against_epsilon(title, series, names, digits=".4f"), has_key=False))
    return drawings


@dataclass(frozen=True)
class _Words:
    """What is promised at each epsilon, a sentence each with its epsilon; what holds at all of them; and what no privacy means."""

    at_each: Sequence[tuple[str, str]]
    at_all: Sequence[str]
    without: Promise | None


def _promises(study: StudyConfig, runs: Sequence[Done]) -> _Words:
    """In words, of all methods with runs of their own: the first sentence says epsilon, the others hold at every one."""
    at_each: dict[str, str] = {}
    at_all: dict[str, None] = {}
    for epsilon in sorted((epsilon for epsilon in study.epsilon if not math.isinf(epsilon)), reverse=True):
        for one in [one for method in study.method if method.run for one in _at(method, epsilon, runs)]:
            kept = promise(one.found.get("privacy") or {}, {})
            at_each.setdefault(kept.title, kept.sentences[0])
            at_all.update(dict.fromkeys(kept.sentences[1:]))
    is_open = any(math.isinf(one.point.epsilon) for one in runs)
    return _Words(list(at_each.items()), list(at_all), promise({}, {}) if is_open else None)


def _terms(study: StudyConfig, runs: Sequence[Done]) -> list[tuple[str, list[str]]]:
    """For each method with runs of its own the terms of its promise, at the smallest epsilon that it has a run for."""
    found = []
    for method in study.method:
        private = [one for epsilon in sorted(study.epsilon) for one in _at(method, epsilon, runs) if method.run and one.found.get("privacy")]
        if private:
            facts = dict(promise(private[0].found["privacy"], {}).facts)
            found.append((method.name, [facts.get(name.capitalize(), "–") for name in TERMS]))
    return found
