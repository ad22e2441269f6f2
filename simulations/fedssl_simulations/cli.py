"""The `fedssl` command: read, call one function, print, leave. Sub-commands load what they need when they are called.

Exit codes: 0 done, 1 the user must act (one line on stderr), 2 wrong usage, 130 interrupted and resumable.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from fedssl_client.cli import device

from fedssl.disk import writing
from fedssl.errors import FedSSLError
from fedssl_simulations.bus_error import say_bus_errors

if TYPE_CHECKING:
    from fedssl.config import DataConfig
    from fedssl_simulations.attacks.result import Found
    from fedssl_simulations.run import Progress, Run

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at a data set; make one of any size.")
cli.add_typer(data, name="data")
attack = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What somebody who sees uploads, releases or models learns about people.")
cli.add_typer(attack, name="attack")
cli.add_typer(device, name="device")

Source = Annotated[str, typer.Argument(metavar="RUN.toml", help="A run's settings, or the name of a preset (`fedssl presets`)")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated")]
Seed = Annotated[int | None, typer.Option(help="Another seed than the run's own")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a program")]
Split = Annotated[str, typer.Option(help="test or validation")]
MinEvents = Annotated[int, typer.Option(min=1, help="Filter users and items with fewer events")]
FileFormat = Annotated[str, typer.Option("--format", help="auto, inter, lines, pairs, movielens, csv, tsv, jsonl, parquet, or package.module:name")]
Columns = Annotated[str, typer.Option(metavar="USER,ITEM[,TIME]", help="Names of these columns, where they are not the usual ones")]
AttackOut = Annotated[Path, typer.Option(help="Folder for the JSON of what was found")]
SkipBadLines = Annotated[bool, typer.Option("--skip-bad-lines", help="Count lines that cannot be read instead of stopping at the first")]

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)


def main() -> None:
    """The door: errors that a person must act on become one line and exit code 1."""
    say_bus_errors()
    try:
        cli(standalone_mode=False)
        sys.stdout.flush()
    except FedSSLError as error:
        _fail(f"error: {error}", 1)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        if error.filename is not None:
            _fail(f"error: {error.filename}: {error.strerror}; make room, or get the right to use it, and do the same again", 1)
        # All files that are kept say where they could not be written: what has no name is the standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # What is left of it would fail again at the end.
        _fail(f"error: standard output: cannot be written ({error.strerror}); send it elsewhere. What the command itself wrote is whole", 1)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        # Click's own usage errors know how to show themselves; anything else is a bug and keeps its traceback.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))


@cli.command()
def simulate(
    source: Annotated[str | None, typer.Argument(metavar="RUN.toml", help="A run's settings, or a preset's name; not with --resume")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all that the run leaves; made anew")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder")] = None,
    seed: Seed = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also run the baselines and put them into the report")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train with every user on this machine; write checkpoints and a report.

    Example: fedssl simulate ml-1m --set data.path=ml-1m.inter.gz --out runs/first
    """
    from fedssl_simulations.run import simulate as run_simulation
    from fedssl_simulations.run_files import read_run

    if (source is None) == (resume is None):
        raise typer.BadParameter("give a RUN.toml (or a preset's name), or --resume DIR, not both")
    config = read_run(source, overrides or (), seed=seed) if source is not None else None
    with _stop_after_this_round() as should_stop, _progress(quiet or as_json) as on_progress:
        run = run_simulation(config, out=out, resume=resume, on_progress=on_progress, should_stop=should_stop)
    if not run.is_finished:
        _fail(f"stopped after {run.state.phase} round {run.state.round}; go on with: fedssl simulate --resume {run.folder}", 130)
    if baselines:
        _add_baselines(run, quiet or as_json)
    _finish(run, as_json)


@cli.command()
def study(
    source: Annotated[str, typer.Argument(metavar="STUDY.toml", help="A study, or the name of one that ships")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; go on with it by naming it again")] = None,
    budget: Annotated[float, typer.Option(min=0, metavar="MINUTES", help="Begin nothing that would not end in time; 0: as long as it takes")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Runs at once; 0: one a core")] = 0,
    quiet: Quiet = False,
) -> None:
    """Many runs, resumable, and one page: what privacy costs, what an attacker still learns.

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

    with _stop_after_this_round() as should_stop:
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


@cli.command()
def baselines(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for baselines.json")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this baseline alone; may be repeated")] = None,
    seed: Seed = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Popularity, Markov, counts alone, each user alone, central training: same data, same protocol, same table.

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
    _print_results({"baselines": rows}, as_json)


@cli.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A folder like RUN/checkpoints/round-000120")],
    source: Source,
    overrides: Overrides = None,
    split: Split = "test",
    as_json: AsJson = False,
) -> None:
    """Metrics of a checkpoint on a run's data, without personal heads.

    Example: fedssl evaluate runs/first/checkpoints/round-001805 ml-1m
    """
    from fedssl.checkpoints import read_checkpoint
    from fedssl.data.dataset import load_dataset
    from fedssl.errors import CatalogueMismatch
    from fedssl.evaluation import evaluate as rank
    from fedssl.recommender import Recommender
    from fedssl_simulations.run_files import read_run

    if split not in ("test", "validation"):
        raise typer.BadParameter(f"--split {split}: wanted test or validation")
    found = read_checkpoint(checkpoint)
    config = read_run(source, overrides or ())
    dataset = load_dataset(config.data)
    if dataset.catalogue.hash != found.catalogue.hash:
        raise CatalogueMismatch(
            f"{checkpoint}: trained on a catalogue of {found.catalogue.num_items} items, {config.data.path} has another one of "
            f"{dataset.catalogue.num_items}; give the data set it was trained on, or its catalogue as data.catalogue"
        )
    model = Recommender(found.recipe, found.state.released(found.recipe), found.state.counts)
    _print_results({split: rank(model, dataset.histories, split, ks=config.evaluation.ks).summary()}, as_json)  # type: ignore[arg-type]


@cli.command()
def recommend(
    checkpoint: Annotated[Path, typer.Argument(help="A folder like RUN/checkpoints/round-000120")],
    item: Annotated[list[str] | None, typer.Option(help="An item of the history, oldest first; may be repeated")] = None,
    history: Annotated[Path | None, typer.Option(help="A file with one item a line, oldest first")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many items")] = 10,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Recommend items of the history too")] = False,
    as_json: AsJson = False,
) -> None:
    """What comes next after a history: tokens in, tokens (and titles, where known) out.

    Example: fedssl recommend runs/first/checkpoints/round-001805 --item "Toy Story (1995)" -k 5
    """
    from fedssl.checkpoints import read_checkpoint
    from fedssl_simulations.recommend import recommend as best_items

    tokens = list(item or ())
    if history is not None:
        try:
            tokens += [line for line in history.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"--history {history}: cannot be read ({error})") from None
    if not tokens:
        raise typer.BadParameter("give a history: --item TOKEN (repeated), or --history FILE")
    found = best_items(read_checkpoint(checkpoint), tokens, k=k, include_seen=include_seen)
    if as_json:
        typer.echo(json.dumps(found))
    for place, row in enumerate(() if as_json else found, start=1):
        typer.echo(f"{place:3d}. {row['title']}" + (f"  [{row['item']}]" if row["title"] != row["item"] else ""))


@cli.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A folder like RUN/checkpoints/round-000120")],
    out: Annotated[Path, typer.Option(help="Folder of the model; one that is there is replaced")],
    format: Annotated[str, typer.Option(help="onnx, the only one")] = "onnx",
) -> None:
    """A model for a device: the encoder as ONNX, counts, recipe and catalogue; `fedssl device import` takes it.

    Example: fedssl export runs/first/checkpoints/round-001805 --out model
    """
    from fedssl.checkpoints import read_checkpoint
    from fedssl.device_model import write_device_model
    from fedssl.weights import to_numpy

    if format != "onnx":
        raise typer.BadParameter(f"--format {format}: only onnx is written")
    found = read_checkpoint(checkpoint)
    state, recipe = found.state, found.recipe
    write_device_model(out, recipe, to_numpy(state.released(recipe)), found.catalogue, state.counts, run=found.run, round=state.round)
    typer.echo(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB")


@cli.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders")],
    out: Annotated[Path, typer.Option(help="The page")] = Path("page.html"),
    public: Annotated[bool, typer.Option("--public", help="Leave out what is for the researcher only")] = False,
) -> None:
    """One self-contained page from what one or many runs left behind.

    Example: fedssl report runs/first runs/second --out page.html
    """
    from fedssl_simulations.report import write_report

    write_report(runs, out, public=public)
    typer.echo(str(out))


@cli.command()
def presets() -> None:
    """List the presets that ship; a preset's name works wherever RUN.toml does.

    Example: fedssl presets
    """
    from fedssl_simulations.run_files import presets as shipped

    for name, about in shipped().items():
        typer.echo(f"{name:16s} {about}")


@data.command()
def describe(
    path: Annotated[str, typer.Argument(help="A file of histories, or a store; a bare name is also looked up in $FEDSSL_DATA")],
    min_events: MinEvents = 5,
    file_format: FileFormat = "auto",
    columns: Columns = "",
    skip_bad_lines: SkipBadLines = False,
    split: Annotated[str, typer.Option(help="leave-one-out or global-time")] = "leave-one-out",
    validation_from: Annotated[float, typer.Option(help="global-time: share of events before it, or, from 1 on, a time")] = 0.8,
    test_from: Annotated[float, typer.Option(help="global-time: as --validation-from, and later")] = 0.9,
    as_json: AsJson = False,
) -> None:
    """What a careful person wants to know first.

    Example: fedssl data describe ml-1m.inter.gz
    """
    from fedssl.data.describe import describe as facts_of
    from fedssl.data.describe import describe_text

    cuts = {"split": split, "validation_from": validation_from, "test_from": test_from}
    facts = facts_of(_data_config(path=path, min_events=min_events, format=file_format, columns=columns, skip_bad_lines=skip_bad_lines, **cuts))
    typer.echo(json.dumps(facts) if as_json else describe_text(facts))


@data.command()
def convert(
    path: Annotated[str, typer.Argument(help="A file of histories; a bare name is also looked up in $FEDSSL_DATA")],
    out: Annotated[Path, typer.Argument(help="Folder of the store; made anew")],
    min_events: MinEvents = 5,
    file_format: FileFormat = "auto",
    columns: Columns = "",
    skip_bad_lines: SkipBadLines = False,
    items: Annotated[str, typer.Option(help="A file with titles and attributes of items")] = "",
    users: Annotated[str, typer.Option(help="A file with attributes of users, for a probe alone")] = "",
) -> None:
    """Make the memory-mapped store of a data set, from a file of any size: it opens at once, and is shared by processes.

    Example: fedssl data convert ml-1m.inter.gz stores/ml-1m
    """
    from fedssl.data.convert import convert as make_store

    config = _data_config(path=path, min_events=min_events, format=file_format, columns=columns, skip_bad_lines=skip_bad_lines, items=items, users=users)
    dataset = make_store(config, out)
    histories = dataset.histories
    typer.echo(f"{out}: {histories.num_users:,} users, {dataset.catalogue.num_items:,} items, {histories.num_events:,} events")
    if dataset.bad_lines:
        typer.echo(f"passed over {dataset.bad_lines:,} lines that cannot be read; the first: {dataset.first_bad}", err=True)


@data.command()
def synthesize(
    out: Annotated[Path, typer.Argument(help="File to write, one line a user; a name ending in .inter gets RecBole's format")],
    users: Annotated[int, typer.Option(min=1)] = 2000,
    items: Annotated[int, typer.Option(min=2)] = 500,
    events: Annotated[float, typer.Option(min=5, help="Mean events a user, at most a quarter of the items")] = 40.0,
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """Make histories with structure worth learning: Zipf popularity, tastes that drift, item-to-item habits.

    Example: fedssl data synthesize demo/histories.txt --users 2000
    """
    from fedssl.data.readers import write_inter, write_lines
    from fedssl.data.synthetic import synthesize_blocks
    from fedssl.disk import whole_file

    if out.exists():
        raise typer.BadParameter(f"{out} exists; choose another name")
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with whole_file(out) as beside:
        for block in synthesize_blocks(users, items, seed, mean_events=events):
            (write_inter if ".inter" in out.suffixes else write_lines)(block, beside, append=written > 0)
            written += block.num_events
    typer.echo(f"{out}: {users:,} users, {items:,} items, {written:,} events")


@attack.command()
def items(
    source: Source,
    overrides: Overrides = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Attack users who train this model; without it, the run's first weights")] = None,
    users: Annotated[int, typer.Option(min=1, help="Users to attack, drawn at random")] = 100,
    noise: Annotated[list[float] | None, typer.Option(help="Noise multiplier z over one user's clipped upload; may be repeated")] = None,
    out: AttackOut = Path("attacks"),
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Which items an upload tells: raw, clipped, in sums, noised; from one upload and from ten.

    Example: fedssl attack items beauty --users 100
    """
    from secrets import token_bytes

    from fedssl.checkpoints import read_checkpoint
    from fedssl.data.dataset import load_dataset
    from fedssl_simulations.attacks.items import attack_items
    from fedssl_simulations.run_files import read_run

    config = read_run(source, overrides or (), seed=seed)
    found = read_checkpoint(checkpoint) if checkpoint is not None else None
    result = attack_items(config, load_dataset(config.data), checkpoint=found, users=users, noise=noise or (0.1, 0.5, 1.0), key=token_bytes(32))
    _finish_attack(result, out, as_json)


@attack.command()
def audit(
    canaries: Annotated[int, typer.Option(min=4000, help="Users whose update is known; half of them take part")] = 100_000,
    delta: Annotated[float, typer.Option(help="Delta of the claim")] = 1e-5,
    repeats: Annotated[int, typer.Option(min=1, help="Audits of each kind, with fresh keys")] = 1,
    mistakes: Annotated[bool, typer.Option("--mistakes", help="Audit planted mistakes instead: every one should be found")] = False,
    out: AttackOut = Path("attacks"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """A lower bound of epsilon beside the claim, by canaries through the shipped rounds.

    Example: fedssl attack audit
    """
    from secrets import randbits

    from fedssl_simulations.attacks.audit import Audit, audit_all
    from fedssl_simulations.attacks.mistakes import audit_mistakes

    def say(done: Audit) -> None:
        if not (quiet or as_json):
            typer.echo(f"{done.scenario.name}: claimed {done.claimed:.3f}, at least {done.at_least:.3f}, {done.seconds:.1f} s", err=True)

    out.mkdir(parents=True, exist_ok=True)
    if mistakes:
        found = audit_mistakes(out, canaries=canaries, delta=delta, seed=randbits(32), on_done=say)
    else:
        found = audit_all(out, canaries=canaries, repeats=repeats, delta=delta, seed=randbits(32), on_done=say)
    _finish_attack(found, out, as_json)


@attack.command()
def membership(
    source: Source,
    overrides: Overrides = None,
    shadows: Annotated[int, typer.Option(min=4, help="Shadow runs, an even number")] = 16,
    processes: Annotated[int, typer.Option(min=1, help="Runs at once")] = 1,
    out: AttackOut = Path("attacks"),
    seed: Seed = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Who was trained on? A likelihood-ratio attack on the final model, with shadow runs in OUT/shadows; goes on after a kill.

    Example: fedssl attack membership ml-100k --processes 2
    """
    from fedssl.data.dataset import load_dataset
    from fedssl_simulations.attacks.membership import attack_membership
    from fedssl_simulations.run_files import read_run

    config = read_run(source, overrides or (), seed=seed)

    def say(number: int) -> None:
        if not (quiet or as_json):
            typer.echo(f"shadow run {number} of {shadows} is there", err=True)

    with _stop_after_this_round() as should_stop:
        found = attack_membership(
            config, load_dataset(config.data), out / "shadows", shadows=shadows, processes=processes, on_done=say, should_stop=should_stop
        )
    if found is None:
        _fail("stopped; the same command goes on with the shadow runs that are there", 130)
    _finish_attack(found, out, as_json)


@attack.command()
def attributes(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders on one data set")],
    users: Annotated[str, typer.Option(help="A file with attributes of users; without it, that of the first run's settings")] = "",
    attribute: Annotated[list[str] | None, typer.Option(help="An attribute; may be repeated. Without it: gender, age")] = None,
    out: AttackOut = Path("attacks"),
    as_json: AsJson = False,
) -> None:
    """Does a frozen representation tell gender or age? A linear probe on each run's model.

    Example: fedssl attack attributes runs/open runs/private --users ml-1m.user.gz
    """
    from fedssl.data.dataset import load_dataset
    from fedssl_simulations.attacks.attributes import attack_attributes
    from fedssl_simulations.run_files import read_written_run

    config, _ = read_written_run(runs[0] / "run.toml")
    dataset = load_dataset(config.data.model_copy(update={"users": users or config.data.users}))
    _finish_attack(attack_attributes(runs, dataset, attributes=tuple(attribute or ("gender", "age"))), out, as_json)


def _finish_attack(found: Found, out: Path, as_json: bool) -> None:
    from rich.console import Console

    from fedssl_simulations.attacks.result import write_found

    path = write_found(found, out)
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    console = Console()
    # A terminal wraps what is wider; cells that are folded to three letters nobody can read.
    console.width = max(console.width, 160)
    console.print(found.as_table())
    for note in found.notes:
        typer.echo(note)
    typer.echo(str(path))


def _data_config(*, columns: str, **values: Any) -> DataConfig:
    from fedssl.config import DataConfig, check

    return check(DataConfig, {**values, "columns": columns.split(",") if columns else []}, where="command line")


# ---- printing ----


def _finish(run: Run, as_json: bool) -> None:
    from fedssl.round_lines import read_lines
    from fedssl_simulations.report import write_report

    page = run.folder / "report.html"
    write_report([run.folder], page)
    _print_results(run.report, as_json)
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
    broken = sum(line.get("researcher_only", line).get("broken_users", 0) for line in read_lines(run.folder / "metrics.jsonl"))
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
    typer.echo(
        f"{cost['rounds']} rounds in {cost['seconds']:.0f} s, {cost['users_per_second']:.0f} users a second, "
        f"peak {cost['peak_rss_bytes'] / 1e6:.0f} MB\ncheckpoint: {run.folder / 'checkpoints' / kept['checkpoint']}\nreport: {page}"
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


def _print_results(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    from fedssl_simulations.tables import results_table

    Console().print(results_table(found))


@contextmanager
def _stop_after_this_round() -> Iterator[Any]:
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
def _progress(quiet: bool) -> Iterator[Any]:
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


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
