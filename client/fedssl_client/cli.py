"""The commands of a device: `fedssl device ...`. Each loads what it needs when it is called."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

device = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="A person's device: its policy, its history, and the agent that recommends and trains.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The device's folder")]
Server = Annotated[str, typer.Argument(metavar="SERVER", help="A server's name, as in [allow] servers")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a program")]


@device.command()
def init(folder: Folder, user: Annotated[int, typer.Option(min=0, help="The number under which the server knows this device")] = 0) -> None:
    """Make a device's folder. The policy in it allows nothing yet.

    Example: fedssl device init ~/.fedssl --user 17
    """
    from fedssl_client.device_folder import make_device_folder

    make_device_folder(folder, user=user)
    typer.echo(f"{folder / 'device.toml'}: nothing is allowed yet; read it, and change what you want")


@device.command(name="import")
def import_(
    folder: Folder,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="A model that `fedssl export` wrote; replaces the one at hand")] = None,
    history: Annotated[Path | None, typer.Option(metavar="FILE", help="Events of one person, in a format of `fedssl data describe`")] = None,
    user: Annotated[str | None, typer.Option(metavar="TOKEN", help="Whose events, where the file has several people's")] = None,
    format: Annotated[str, typer.Option(help="The history's format; auto: found by looking")] = "auto",
    columns: Annotated[str, typer.Option(metavar="USER,ITEM[,TIME]", help="Names of these columns, where they are not the usual ones")] = "",
) -> None:
    """Bring a model or a history to a device. An agent that runs goes on.

    Example: fedssl device import ~/.fedssl --model model
    """
    from fedssl_client.importing import import_history, import_model

    if (model is None) == (history is None):
        raise typer.BadParameter("give --model DIR or --history FILE")
    if model is not None:
        found = import_model(folder, model)
        typer.echo(f"a model of {found.catalogue.num_items} items, round {found.round} of run {found.run}")
    if history is not None:
        names = tuple(columns.split(",")) if columns else ()
        typer.echo(f"{import_history(folder, history, format=format, columns=names, user=user)} events in the history now")


@device.command(name="would-join")
def would_join(
    folder: Folder,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe.json, or a model or checkpoint folder that has one")],
    server: Annotated[str, typer.Option(help="The name of the server that would ask")],
) -> None:
    """Say whether a device would follow a recipe. Each reason where it would not, with exit code 1; charges nothing.

    Example: fedssl device would-join ~/.fedssl model --server home
    """
    from contextlib import closing

    from fedssl.errors import ConfigError
    from fedssl.recipe import read_recipe
    from fedssl_client.device_folder import HISTORY, opened_ledger
    from fedssl_client.history import HistoryStore
    from fedssl_client.policy import promised_epsilon, read_policy, refusals

    path = recipe / "recipe.json" if recipe.is_dir() else recipe
    policy = read_policy(folder)
    try:
        asked = read_recipe(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe ({error})") from None
    with closing(HistoryStore(folder / HISTORY)) as history, opened_ledger(folder, history) as own:
        found = refusals(policy, asked, server, spent=sum(own.ledger.joined().values()))
    for reason in found:
        typer.echo(f"no: {reason}")
    if found:
        sys.exit(1)
    typer.echo(f"yes; epsilon of the whole run: {promised_epsilon(asked):.3g}")


@device.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """How the device is. What it holds, what it joined and spent, and why it would not train now; its agent is asked.

    Example: fedssl device status ~/.fedssl
    """
    from google.protobuf.json_format import MessageToDict

    from fedssl_client.device_pb2 import StatusReply

    reply = _ask(folder, "Status", {})
    found = MessageToDict(reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for field in StatusReply.DESCRIPTOR.fields:
        value = found[field.name]
        typer.echo(f"{field.name.replace('_', ' ')}: {', '.join(value) if isinstance(value, list) else value}")


@device.command()
def run(folder: Folder) -> None:
    """Run the agent until it is stopped (SIGTERM, Ctrl-C).

    Example: fedssl device run ~/.fedssl
    """
    from fedssl_client.service import run_agent

    run_agent(folder)


@device.command()
def join(folder: Folder, server: Server) -> None:
    """Take part in a server's trainings. As far as device.toml allows; its agent is asked.

    Example: fedssl device join ~/.fedssl home
    """
    _ask(folder, "Join", {"server": server})
    typer.echo(f"joined {server}")


@device.command()
def leave(folder: Folder, server: Server) -> None:
    """Take part no longer. What was spent stays spent; its agent is asked.

    Example: fedssl device leave ~/.fedssl home
    """
    typer.echo(f"left {server}" if _ask(folder, "Leave", {"server": server}).had_joined else f"had not joined {server}")


@device.command()
def forget(
    folder: Folder,
    item: Annotated[str | None, typer.Option(help="One item's events")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that is the person's")] = False,
) -> None:
    """Remove events, and what was learned from them. Its agent is asked.

    Example: fedssl device forget ~/.fedssl --item i42
    """
    if (item is None) == (not everything):
        raise typer.BadParameter("give --item TOKEN or --all")
    typer.echo(f"{_ask(folder, 'Forget', {'all': True} if everything else {'item': item}).events} events forgotten")


@device.command()
def export(folder: Folder) -> None:
    """All that is kept about the person, as JSON. On standard output; its agent is asked.

    Example: fedssl device export ~/.fedssl > mine.json
    """
    typer.echo(_ask(folder, "Export", {}).json)


def _ask(folder: Path, method: str, fields: dict[str, Any]) -> Any:
    """What the agent answers. Raises ConfigError where none runs."""
    from fedssl.errors import ConfigError
    from fedssl_client.connection import AgentError, StatusCode, connect
    from fedssl_client.device_folder import app_socket, check_private

    check_private(folder)
    try:
        with connect(f"unix:{app_socket(folder)}") as agent:
            return agent.ask(method, fields)
    except AgentError as error:
        if error.code == StatusCode.UNAVAILABLE:
            raise ConfigError(f"{folder}: no agent runs on it; start one with `fedssl device run {folder}`") from None
        raise
