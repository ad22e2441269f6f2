"""`fedssl simulate`, `study`, `baselines`: training, and what it is compared with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedssl.disk import writing
from fedssl_simulations.commands.options import AsJson, Overrides, Quiet, Seed, Source
from fedssl_simulations.commands.terminal import fail, print_results, progress_shown, stop_after_this_round

if TYPE_CHECKING:
    from fedssl_simulations.run import Run


def simulate(
    source: Annotated[str | None, typer.Argument(metavar="RUN.toml", help="A run's settings, or a preset's name; not with --resume")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all that the run leaves; made anew")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder")] = None,
    seed: Seed = None,
    start: Annotated[str, typer.Option("--from", metavar="CHECKPOINT", help="Begin from this checkpoint, of the same catalogue or another one")] = "",
    baselines: Annotated[bool, typer.Option("--baselines", help="Also run the baselines and put them into the report")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train with every user on this machine. Writes checkpoints and a report.

    Example: fedssl simulate ml-1m --set data.path=ml-1m.inter.gz --out runs/first
    """
    from fedssl_simulations.run import simulate as run_simulation
    from fedssl_simulations.run_files import read_run

    if (source is None) == (resume is None):
        raise typer.BadParameter("give a RUN.toml (or a preset's name), or --resume DIR, not both")
    if start and source is None:
        raise typer.BadParameter("--from is for a run that begins; --resume goes on from the run's own checkpoints")
    if resume is not None and (overrides or out is not None or seed is not None):
        raise typer.BadParameter(f"--set, --out and --seed are for a run that begins; --resume goes on with the settings in {resume / 'run.toml'}")
    begin = [f"start={json.dumps(str(Path(start).resolve()))}"] if start else []
    config = read_run(source, [*(overrides or ()), *begin], seed=seed) if source is not None else None
    with stop_after_this_round() as should_stop, progress_shown(quiet or as_json) as on_progress:
        run = run_simulation(config, out=out, resume=resume, on_progress=on_progress, should_stop=should_stop)
    if not run.is_finished:
        fail(f"stopped after {run.state.phase} round {run.state.round}; go on with: fedssl simulate --resume {run.folder}", 130)
    if baselines:
        _add_baselines(run, quiet or as_json)
    _finish(run, as_json)


def study(
    source: Annotated[str, typer.Argument(metavar="STUDY.toml", help="A study, or the name of one that ships")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; go on with it by naming it again")] = None,
    budget: Annotated[float, typer.Option(min=0, metavar="MINUTES", help="Begin nothing that would not end in time; 0: as long as it takes")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Runs at once; 0: one a core")] = 0,
    quiet: Quiet = False,
) -> None:
    """Many runs, resumable, and one page: what privacy costs. And what an attacker still learns.

    Example: fedssl study privacy --budget 60 --out studies/privacy
    """
    import math
    import os

    from fedssl.disk import write_whole
    from fedssl_simulations.study import run_study
    from fedssl_simulations.study_file import Point, read_study
    from fedssl_simulations.study_page import as_markdown, cells_of, render_study

    asked = read_study(source)
    folder = out or Path("studies") / Path(source).stem

    def say(point: Point, news: str) -> None:
        if not quiet:
            typer.echo(f"{point.folder}: {news}", err=True)

    with stop_after_this_round() as should_stop:
        outcome = run_study(
            asked,
            folder,
            overrides=overrides or (),
            budget_minutes=budget or math.inf,
            processes=processes or os.cpu_count() or 1,
            on_point=say,
            should_stop=should_stop,
        )
    write_whole(folder / "study.html", render_study(asked, outcome))
    typer.echo(as_markdown(asked, cells_of(asked, outcome)))
    typer.echo(f"\n{len(outcome.done)} done, {len(outcome.left)} left, {len(outcome.failed)} failed; the page: {folder / 'study.html'}")
    for point, words in outcome.failed:
        typer.echo(f"{point.folder} failed: {words}", err=True)
    if outcome.failed:
        sys.exit(1)


def baselines(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for baselines.json")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this baseline alone; may be repeated")] = None,
    seed: Seed = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """What a run is compared with: same data, same protocol. Popularity, Markov, counts alone, each user alone, central training.

    Example: fedssl baselines ml-1m --only popularity --only markov
    """
    from fedssl.data.dataset import load_dataset
    from fedssl.disk import write_whole
    from fedssl_simulations.baselines import NAMES, run_baselines
    from fedssl_simulations.run_files import read_run

    unknown = set(only or ()) - set(NAMES)
    if unknown:
        raise typer.BadParameter(f"there is no baseline '{unknown.pop()}'; there is {', '.join(NAMES)}")
    config = read_run(source, overrides or (), seed=seed)
    rows = run_baselines(config, load_dataset(config.data), names=tuple(only or NAMES), on_done=_say_baseline(quiet or as_json))
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "baselines.json", json.dumps(rows, indent=1))
    print_results({"baselines": rows}, as_json)


def _finish(run: Run, as_json: bool) -> None:
    from fedssl.round_lines import read_lines
    from fedssl_simulations.report import write_report

    page = run.folder / "report.html"
    write_report([run.folder], page)
    print_results(run.report, as_json)
    if as_json:
        return
    contrast = (run.report.get("researcher_only") or run.report).get("contrast")
    if contrast is not None:
        ratio = "none" if contrast["gradient_ratio"] is None else f"{contrast['gradient_ratio']:.4f}"
        typer.echo(
            f"contrast: {contrast['form']}; negatives: {contrast['negatives']}; weight {contrast['weight']:g}\n"
            f"  users with a non-zero contrastive gradient: {contrast['nonzero_share']:.1%} of {contrast['users']}; "
            f"norm over the next item's: {ratio}; effective rank {contrast['effective_rank']:.1f} of {contrast['width']}"
        )
    lines = [line.get("researcher_only", line) | {"round": line["round"]} for line in read_lines(run.folder / "metrics.jsonl")]
    collapsed = [line for line in lines if "encodings" in line and line["encodings"]["is_collapsed"]]
    if collapsed:
        now = collapsed[-1]["encodings"]
        typer.echo(
            f"warning: encodings have collapsed: after round {collapsed[-1]['round']} they fill {now['effective_rank']:.1f} of {now['width']} directions, "
            "so all histories read alike; try a smaller server.lr, or a smaller weight of tasks beside next-item"
        )
    broken = sum(line.get("broken_users", 0) for line in lines)
    if broken:
        typer.echo(f"warning: {broken} updates were broken (nan, inf, beyond the grid) and counted as zero; try a larger local.grid_step or a smaller local.lr")
    if run.report["privacy"] is not None:
        from fedssl_simulations.promise import promise

        kept_promise = promise(run.report["privacy"], {})
        terms = [f"{name.lower()}: {value}" for name, value in kept_promise.facts if name in ("Unit", "Neighbours", "Trust", "Sampling", "Accountant", "Delta")]
        typer.echo("; ".join([kept_promise.title, *terms]))
        for words in run.report["privacy"]["warnings"]:
            typer.echo(f"warning: {words}")
    cost, kept = run.report["cost"], run.report["model"]
    if run.config.evaluation.patience:
        stopped = f"stopped early after round {cost['rounds']} of {run.config.server.rounds}; " if kept["stopped_early"] else ""
        typer.echo(f"{stopped}the model is that of round {kept['round']}, the best on validation")
    rounds, speed = (f"{cost['rounds']} rounds in ", f", {cost['users_per_second']:.0f} users a second") if cost["rounds"] else ("no round of training; ", "")
    typer.echo(
        f"{rounds}{cost['seconds']:.0f} s{speed}, peak {cost['peak_rss_bytes'] / 1e6:.0f} MB\n"
        f"checkpoint: {run.folder / 'checkpoints' / kept['checkpoint']}\nreport: {page}"
    )


def _add_baselines(run: Run, quiet: bool) -> None:
    from fedssl.disk import write_whole
    from fedssl_simulations.baselines import run_baselines

    rows = run_baselines(run.config, run.dataset, on_done=_say_baseline(quiet))
    place = run.report.get("researcher_only", run.report)
    place["baselines"] = rows
    write_whole(run.folder / "report.json", json.dumps(run.report, indent=1))


def _say_baseline(quiet: bool) -> Any:
    def say(name: str, row: dict[str, Any]) -> None:
        if not quiet:
            typer.echo(f"{name}: {row['seconds']:.1f} s", err=True)

    return say
