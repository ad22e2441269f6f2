"""The commands of a server: `fedssl server ...`. Each loads what it needs when it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

server = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="A server: its keys, who may join, and its runs over Flower's SuperLink.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder")]


@server.command()
def init(
    folder: Folder,
    name: Annotated[list[str] | None, typer.Option(help="A host name or address by which nodes reach the server; may be repeated")] = None,
    node: Annotated[list[str] | None, typer.Option(help="A node to make a key for; may be repeated")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on")] = 8000,
) -> None:
    """Make a server's folder, with keys for a trial. An authority's, the server's, and those of nodes.

    Example: fedssl server init server --name fl.example.org --node anna --node ben
    """
    from fedssl_server.server_folder import make_server_folder

    make_server_folder(folder, names=name or [], nodes=node or [], host=host, port=port)
    typer.echo(f"{folder / 'server.toml'}: read it. A node needs ca.crt and its own key from {folder / 'nodes'}; ca.key stays here, or better nowhere")


@server.command()
def start(folder: Folder) -> None:
    """Keep the SuperLink up until it is stopped (SIGTERM, Ctrl-C).

    Example: fedssl server start server
    """
    from fedssl_server.link import Link
    from fedssl_server.operate import keep_up, say_with_time

    keep_up(Link(folder), say_with_time)


@server.command()
def run(
    folder: Folder,
    settings: Annotated[Path | None, typer.Argument(metavar="RUN.toml", help="Whole settings, such as the run.toml of a simulation")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The new run's folder")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with the run of this folder")] = None,
    catalogue: Annotated[Path | None, typer.Option(metavar="FILE", help="The public catalogue, such as a checkpoint's catalogue.jsonl")] = None,
) -> None:
    """Bring a run to its end, over crashes. What a node trains, what the server adds, checkpoints.

    Example: fedssl server run server RUN.toml --catalogue catalogue.jsonl --out runs/first
    """
    from fedssl_server.link import Link
    from fedssl_server.operate import begin_run, run_to_end, say_with_time

    if (resume is None) == (settings is None or out is None or catalogue is None):
        raise typer.BadParameter("give RUN.toml, --catalogue FILE and --out DIR, or --resume DIR")
    link = Link(folder)
    if settings is not None and out is not None and catalogue is not None:
        begin_run(settings, catalogue, out)
    at = resume or out
    assert at is not None
    how = run_to_end(link, at, say_with_time)
    typer.echo(f"{at}: {how}" + ("" if how == "done" else f"; go on with --resume {at}"))


@server.command()
def status(folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program")] = False) -> None:
    """How the server is. Whether the SuperLink is up, which nodes may join and are there, and where the run stands.

    Example: fedssl server status server
    """
    from fedssl_server.link import Link
    from fedssl_server.operate import status_of

    found = status_of(Link(folder))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for key, value in found.items():
        typer.echo(f"{key}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}")


@server.command()
def halt(
    folder: Folder,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the round at hand, which is lost")] = False,
    everything: Annotated[bool, typer.Option("--all", help="End the SuperLink at once, too")] = False,
) -> None:
    """Stop the run after the round at hand. It goes on with `fedssl server run DIR --resume RUN`.

    Example: fedssl server halt server
    """
    from fedssl_server.link import Link
    from fedssl_server.operate import halt_link, halt_run

    link = Link(folder)
    at = halt_run(link, now=now or everything)
    typer.echo("no run" if at is None else f"{at}: " + ("ended" if now or everything else "stops after this round"))
    if everything:
        typer.echo("the SuperLink ends" if halt_link(link) else "the SuperLink was not up")
