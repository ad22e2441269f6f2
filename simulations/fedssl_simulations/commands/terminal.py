"""What commands say on a terminal: progress, results, how they end, and what a Ctrl-C does."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from fedssl_simulations.run import Progress


def fail(message: str, code: int) -> NoReturn:
    """End the command with a line on stderr."""
    typer.echo(message, err=True)
    sys.exit(code)


def print_results(found: dict[str, Any], as_json: bool) -> None:
    """The table of results of a report, or all of it as JSON."""
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    from fedssl_simulations.tables import results_table

    Console().print(results_table(found))


@contextmanager
def stop_after_this_round() -> Iterator[Any]:
    """The first Ctrl-C asks the run to stop after the round at hand; the second one interrupts at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        typer.echo("stopping after this round; press Ctrl-C again to stop at once (the last checkpoint stays)", err=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_shown(quiet: bool) -> Iterator[Any]:
    """A progress bar on a terminal, plain lines in a pipe, nothing where quiet."""
    if quiet:
        yield lambda progress: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True)) as bar:
            tasks: dict[str, Any] = {}

            def show(progress: Progress) -> None:
                name = progress.facts.phase
                if name not in tasks:
                    tasks[name] = bar.add_task(name, total=progress.rounds, said="")
                bar.update(tasks[name], completed=progress.facts.round, said=_said(progress))
                if progress.validation is not None:
                    bar.console.print(f"round {progress.facts.round}: {_quality(progress)}")

            yield show
    else:

        def line(progress: Progress) -> None:
            number, every = progress.facts.round, max(progress.rounds // 20, 1)
            if number % every == 0 or number == progress.rounds or progress.validation is not None:
                quality = f" {_quality(progress)}" if progress.validation is not None else ""
                typer.echo(f"{progress.facts.phase} {number}/{progress.rounds} {_said(progress)}{quality}", err=True)

        yield line


def _said(progress: Progress) -> str:
    loss = "" if progress.facts.loss is None else f"loss {progress.facts.loss:.3f}"
    fleet = f" of a fleet of {progress.fleet_users:,}" if progress.fleet_users else ""
    return loss if progress.epsilon is None else f"epsilon {progress.epsilon:.3f}{fleet}"


def _quality(progress: Progress) -> str:
    found = progress.validation or {}
    return f"validation NDCG@10 all {found['all']['ndcg@10']:.4f}, unseen {found['unseen']['ndcg@10']:.4f}"
