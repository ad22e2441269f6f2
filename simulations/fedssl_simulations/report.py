"""The report: one self-contained page from what runs left behind. Nothing on it is fetched, and it names no folder.

It reads `run.toml`, `metrics.jsonl` and `report.json` of each run folder; what is missing, as in a run that is still
going, is left out. Runs of different data never share a chart or a table of results.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedssl import __version__
from fedssl.disk import write_whole
from fedssl.errors import RunFolderError
from fedssl_simulations.charts import BarChart, LineChart, Series, bar_chart, line_chart
from fedssl_simulations.pages import in_words, render
from fedssl_simulations.promise import Promise, promise
from fedssl_simulations.tables import Recommender, best, metric_names, opened, recommenders

_COLOURS = 6
_ENCODERS = {"sasrec": "SASRec", "gru4rec": "GRU4Rec", "bert4rec": "BERT4Rec", "hgrn": "HGRN"}


@dataclass(frozen=True)
class Run:
    """What one run left behind, opened. ``holds_private``: something on the page is for the researcher's eyes alone."""

    name: str
    colour: int
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    report: Mapping[str, Any]
    holds_private: bool

    @property
    def promise(self) -> Promise:
        """Its privacy, in words."""
        return promise(self.report.get("privacy") or {}, self.config)


@dataclass(frozen=True)
class Results:
    """Runs over the same data: their chart and their tables."""

    data: str
    runs: Sequence[Run]
    chart: BarChart | None
    tables: Sequence[ResultsTable]


@dataclass(frozen=True)
class ResultsTable:
    """Rows (with the colour of their run) and metrics; ``leading`` are the largest values, to be set in bold."""

    title: str
    metrics: Sequence[str]
    rows: Sequence[tuple[int, Recommender]]
    leading: Mapping[tuple[str, str], float]


def write_report(run_dirs: Sequence[Path], out: Path, *, public: bool = False) -> None:
    """Write the page of one run, or of several side by side, to ``out``.

    ``public`` leaves out all that stands under `researcher_only`. Raises RunFolderError for a folder that holds no run, for
    files in it that cannot be read; DiskError where ``out`` cannot be written.
    """
    page = render_report(run_dirs, public=public)
    write_whole(out, page)


def render_report(run_dirs: Sequence[Path], *, public: bool = False) -> str:
    """The page as text; see `write_report`."""
    runs = [_read_run(folder, public=public) for folder in run_dirs]
    if not runs:
        raise RunFolderError("no run folder was named, so there is nothing to report; name one or more")
    runs = [replace(run, name=name, colour=number % _COLOURS) for number, (run, name) in enumerate(zip(runs, _names(run_dirs), strict=True))]
    return render(
        "report.html",
        title=" · ".join(run.name for run in runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else ""),
        runs=runs,
        cards=_cards(runs[0]) if len(runs) == 1 else [],
        summary=_summary(runs[0]) if len(runs) == 1 else "",
        results=_results(runs),
        curves=_curves(runs),
        groups=[(run, run.report["groups"], metric_names(_members(run.report["groups"]))) for run in runs if run.report.get("groups")],
        beyond=[(run, run.report["beyond_accuracy"]) for run in runs if run.report.get("beyond_accuracy")],
        contrast=_side_by_side([_facts(run.report.get("contrast") or {}) for run in runs]),
        cost=_side_by_side([_cost(run) for run in runs]),
        settings=sorted(_side_by_side([_settings(run.config) for run in runs]), key=lambda row: len(set(row[1])) == 1),
        public=public,
        version=__version__,
    )


def _read_run(folder: Path, *, public: bool) -> Run:
    config, lines, report = _read_config(folder / "run.toml"), _read_lines(folder / "metrics.jsonl"), _read_report(folder / "report.json")
    if config is None and lines is None and report is None:
        raise RunFolderError(f"{folder}: no run.toml, metrics.jsonl or report.json in it; name the folder that a run wrote (`fedssl simulate --out`)")
    found = [config or {}, lines or [], report or {}]
    shown_config, shown_lines, shown_report = (opened(part, public=public) for part in found)
    # Opening for the public drops, opening for the researcher lays in: they differ where something is private.
    holds_private = not public and [opened(part, public=True) for part in found] != [shown_config, shown_lines, shown_report]
    return Run(folder.name, 0, shown_config, shown_lines, shown_report, holds_private)


def _read_config(path: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read as TOML ({error}); was it changed by hand?") from None


def _read_report(path: Path) -> dict[str, Any] | None:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read as JSON ({error}); was it changed by hand?") from None
    if not isinstance(report, dict):
        raise RunFolderError(f"{path}: holds a {type(report).__name__} where a JSON object was wanted; was it written by fedssl?")
    return report


def _read_lines(path: Path) -> list[dict[str, Any]] | None:
    """A last line that is cut short is one that a run is writing, and is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error})") from None
    lines = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if line.endswith("\n"):
                raise RunFolderError(f"{path}, line {number}: not a JSON object ({error}); was it changed by hand?") from None
    return lines


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' own names, numbered where two are the same."""
    names = [folder.resolve().name for folder in run_dirs]
    return [f"{name} ({names[: at + 1].count(name)})" if names.count(name) > 1 else name for at, name in enumerate(names)]


def _summary(run: Run) -> str:
    """One sentence on what was learned, as far as the settings are known."""
    encoder, server = run.config.get("encoder") or {}, run.config.get("server") or {}
    if not encoder.get("name"):
        return ""
    tasks = [str(task.get("name")) for task in run.config.get("task") or [] if task.get("weight", 1)]
    counts = " and item-to-item counts" if run.config.get("counts") else ""
    model, planned = run.report.get("model") or {}, server.get("rounds")
    done = (run.report.get("cost") or {}).get("rounds", planned)
    task = f" by {_and(tasks)}" if tasks else ""
    name = _ENCODERS.get(str(encoder["name"]), str(encoder["name"]))
    if planned == 0 and counts:
        taught = f", and one {name} encoder that the server taught from it" if run.config.get("distillation") else ""
        return f"Item-to-item counts, summed once over histories that stay with their users{taught}. No round of training."
    rounds = f", over {done:,} rounds of about {server['cohort']:g} users" if {"rounds", "cohort"} <= server.keys() else ""
    kept = f" Training was stopped early, of {planned:,} planned rounds." if model.get("stopped_early") and planned else ""
    if model.get("round", done) != done:
        kept += f" What is reported is the model after round {model['round']:,}, the best on validation."
    if model.get("average_from"):
        kept += f" Its weights are the mean of those after rounds {model['average_from']:,} to {model['round']:,}."
    return f"One {name} encoder{counts}, learned{task} from histories that stay with their users{rounds}.{kept}"


def _cards(run: Run) -> list[tuple[str, str, str]]:
    """(name, large number, small words) of what a reader wants first."""
    rows = recommenders(run.report)
    cards = []
    for column, words in (("all", "all items"), ("unseen", "unseen items")):
        own = [getattr(row, column).get("ndcg@10") for row in rows if row.kind == "federated"]
        others = [(getattr(row, column)["ndcg@10"], row.label) for row in rows if row.kind == "baseline" and getattr(row, column).get("ndcg@10")]
        if own and own[0] is not None:
            value, name = max(others, default=(0.0, ""))
            cards.append(
                (f"NDCG@10, {words}", f"{own[0]:.4f}", f"{own[0] / value - 1:+.0%} on the best baseline ({name})".replace("-", "−") if name else "test")
            )
    kept = run.promise
    privacy = run.report.get("privacy") or {}
    epsilon, delta = privacy.get("epsilon"), privacy.get("delta")
    if kept.has_plan:
        fleet = _fleet(run, " of a fleet, none here: ")
        cards.append(
            (
                "Privacy",
                f"ε = {epsilon:.4g}" if isinstance(epsilon, int | float) else "planned",
                f"δ = {delta:g}, for each {privacy.get('unit', 'user')}{fleet}".replace("e-0", "e-") if delta else "see below",
            )
        )
    elif run.config or run.report:
        cards.append(("Privacy", "no promise", "no noise was added; see below"))
    cost = run.report.get("cost") or {}
    if "upload_bytes_per_user" in cost:
        seconds = f"{_duration(cost['seconds'])} in all" if "seconds" in cost else ""
        if not cost.get("rounds") and cost.get("counts_upload_bytes_per_user"):
            cards.append(("Upload, per user, once", _bytes(cost["counts_upload_bytes_per_user"]), seconds))
        else:
            rounds = f"{cost.get('rounds', 0):,} rounds"
            cards.append(("Upload, per user and round", _bytes(cost["upload_bytes_per_user"]), f"{rounds}, {seconds}" if seconds else rounds))
    return cards


def _fleet(run: Run, words: str) -> str:
    """The fleet a run asked about, after ``words``; empty where it asked none."""
    fleet = (run.report.get("privacy") or {}).get("fleet_users") or (run.config.get("privacy") or {}).get("fleet_users")
    return f"{words}{fleet:,}" if fleet else ""


def _results(runs: Sequence[Run]) -> list[Results]:
    """By data set. A baseline that several runs measured alike stands once."""
    by_data: dict[str, list[Run]] = {}
    for run in runs:
        data = run.report.get("data") or {}
        key = str(data.get("fingerprint") or json.dumps(data, sort_keys=True))
        if run.report:
            by_data.setdefault(key, []).append(run)
    found = []
    for same in by_data.values():
        tables = [_table(title, same, split) for title, split in (("Test", "test"), ("Validation", "validation"))]
        tables = [table for table in tables if table.rows]
        chart = None
        if tables and tables[0].title == "Test":
            ordered = [row for row in tables[0].rows if "ndcg@10" in row[1].all or "ndcg@10" in row[1].unseen]
            bars = [(row.label, row.kind, colour, [row.all.get("ndcg@10"), row.unseen.get("ndcg@10")]) for colour, row in ordered]
            chart = bar_chart("NDCG@10 on the test items", ["all items", "unseen items"], bars) if bars else None
        data = same[0].report.get("data") or {}
        words = " · ".join(f"{data[name]:,} {name}" for name in ("users", "items", "events") if isinstance(data.get(name), int))
        if tables or words:
            found.append(Results(words, same, chart, tables))
    return found


def _table(title: str, runs: Sequence[Run], split: Any) -> ResultsTable:
    """Models first, then parts, then baselines, each by NDCG@10 over unseen items."""
    rows: list[tuple[int, Recommender]] = []
    for run in runs:
        for row in recommenders(run.report, split):
            if row.kind != "baseline" and len(runs) > 1:
                is_whole = row.kind == "federated"
                row = replace(row, label=run.name + (row.label.removeprefix("Federated") if is_whole else f": {row.label[0].lower()}{row.label[1:]}"))
            if not (row.kind == "baseline" and any(row == other for _, other in rows)):
                rows.append((run.colour, row))
    place = {"federated": 0, "part": 1, "baseline": 2}
    rows.sort(key=lambda pair: (place[pair[1].kind], -pair[1].unseen.get("ndcg@10", 0.0)))
    plain = [row for _, row in rows]
    return ResultsTable(title, metric_names(plain), rows, best(plain))


def _curves(runs: Sequence[Run]) -> list[LineChart]:
    """Loss, validation, epsilon and an adaptive clip over the rounds of training, for the runs that wrote them."""

    def read(run: Run, *path: str) -> tuple[list[float], list[float]]:
        xs, ys = [], []
        for line in run.lines:
            value: Any = line
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            if isinstance(value, int | float) and isinstance(line.get("round"), int) and line.get("phase", "training") == "training":
                xs.append(float(line["round"]))
                ys.append(float(value))
        return xs, ys

    def named(run: Run, words: str) -> str:
        return words if len(runs) == 1 else f"{run.name}, {words}"

    loss = [Series(named(run, "loss"), run.colour, *read(run, "loss")) for run in runs]
    validation = [
        Series(named(run, words), run.colour, *read(run, "validation", column, "ndcg@10"), dashed=column == "all", marked=True)
        for run in runs
        for column, words in (("unseen", "unseen items"), ("all", "all items"))
    ]
    epsilon = [Series(named(run, f"epsilon{_fleet(run, ' of a fleet of ')}"), run.colour, *read(run, "epsilon")) for run in runs]
    clip = [Series(named(run, "clip norm"), run.colour, *read(run, "clip_norm")) for run in runs]
    charts = [
        ("Training loss", loss, {"digits": ".4g"}),
        ("Validation NDCG@10", validation, {"digits": ".4f", "from_zero": True}),
        ("Epsilon spent", epsilon, {"digits": ".4g", "from_zero": True}),
        ("Adaptive clip", clip, {"digits": ".4g", "from_zero": True}),
    ]
    return [line_chart(title, series, **options) for title, series, options in charts if any(one.ys for one in series)]  # type: ignore[arg-type]


def _members(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Recommender]:
    return [Recommender(name, "part", one.get("all") or {}, one.get("unseen") or {}) for kind in groups.values() for name, one in kind.items()]


def _cost(run: Run) -> dict[str, str]:
    words: dict[str, str] = {}
    cost = run.report.get("cost") or {}
    for name, value in cost.items():
        if value == 0 and cost.get("rounds") == 0:
            continue  # Of rounds, and there were none.
        shown = "Peak memory" if name == "peak_rss_bytes" else in_words(name)
        if not isinstance(value, int | float):
            words[shown] = str(value)
        elif "bytes" in name:
            words[shown.replace("bytes ", "").replace(" bytes", "")] = _bytes(value)
        elif name == "seconds":
            words["Time"] = _duration(value)
        else:
            words[shown] = f"{value:,.4g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"
    return words


def _facts(values: Mapping[str, Any]) -> dict[str, str]:
    return {in_words(name.replace(".", ": ")): "–" if value == "null" else value for name, value in _settings(values).items()}


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings flat, as `section.key`. Of a path only the file's name is told."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        where = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(_settings(value, f"{where}."))
        elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            for number, part in enumerate(value, start=1):
                flat.update(_settings(part, f"{where} {number}." if len(value) > 1 else f"{where}."))
        elif isinstance(value, str):
            is_path = value.startswith(("/", "~", "\\")) or value[1:3] in (":\\", ":/")
            flat[where] = value.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if is_path else value
        else:
            flat[where] = f"{value:.6g}" if isinstance(value, float) else json.dumps(value, default=str)
    return flat


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def _bytes(value: float) -> str:
    """Powers of 1000, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.3g} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
