"""`fedssl evaluate`, `recommend`, `export`, `report`, `presets`: what to do with a run that is there."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from fedssl_simulations.commands.options import AsJson, Overrides, Source
from fedssl_simulations.commands.terminal import print_results

Split = Annotated[str, typer.Option(help="test or validation")]


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A folder like RUN/checkpoints/round-000120")],
    source: Source,
    overrides: Overrides = None,
    split: Split = "test",
    as_json: AsJson = False,
) -> None:
    """What a checkpoint reaches on a run's data. Without personal heads.

    Example: fedssl evaluate runs/first/checkpoints/round-001510 ml-1m
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
    print_results({split: rank(model, dataset.histories, split, ks=config.evaluation.ks).summary()}, as_json)  # type: ignore[arg-type]


def recommend(
    checkpoint: Annotated[Path, typer.Argument(help="A folder like RUN/checkpoints/round-000120")],
    item: Annotated[list[str] | None, typer.Option(help="An item of the history, oldest first; may be repeated")] = None,
    history: Annotated[Path | None, typer.Option(help="A file with one item a line, oldest first")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many items")] = 10,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Recommend items of the history too")] = False,
    as_json: AsJson = False,
) -> None:
    """What comes next after a history. Tokens in, tokens (and titles, where known) out.

    Example: fedssl recommend runs/first/checkpoints/round-001510 --item 1 --item 260 -k 5
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


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A folder like RUN/checkpoints/round-000120")],
    out: Annotated[Path, typer.Option(help="Folder of the model; one that is there is replaced")],
    format: Annotated[str, typer.Option(help="onnx, the only one")] = "onnx",
) -> None:
    """A model for a device, which `fedssl device import` takes. The encoder as ONNX, counts, recipe and catalogue.

    Example: fedssl export runs/first/checkpoints/round-001510 --out model
    """
    from fedssl.checkpoints import read_checkpoint
    from fedssl.device_model import ENCODER_FILE, write_device_model
    from fedssl.errors import ConfigError
    from fedssl.weights import to_numpy

    if format != "onnx":
        raise typer.BadParameter(f"--format {format}: only onnx is written")
    if out.exists() and not (out.is_dir() and ((out / ENCODER_FILE).exists() or not any(out.iterdir()))):
        raise ConfigError(f"{out}: there already, and no model that `fedssl export` wrote; it would be lost. Name another folder")
    found = read_checkpoint(checkpoint)
    state, recipe = found.state, found.recipe
    write_device_model(out, recipe, to_numpy(state.released(recipe)), found.catalogue, state.counts, run=found.run, round=state.round)
    typer.echo(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB")


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


def presets() -> None:
    """List the presets that ship. A preset's name works wherever RUN.toml does.

    Example: fedssl presets
    """
    from fedssl_simulations.run_files import presets as shipped

    columns = shutil.get_terminal_size().columns
    for name, about in shipped().items():
        typer.echo(textwrap.fill(about, columns, initial_indent=f"{name:16s} ", subsequent_indent=17 * " "))
