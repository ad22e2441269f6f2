"""`fedssl attack ...`: what somebody who sees uploads, releases or models learns about people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedssl_simulations.commands.options import AsJson, Overrides, Quiet, Seed, Source
from fedssl_simulations.commands.terminal import fail, stop_after_this_round

if TYPE_CHECKING:
    from fedssl_simulations.attacks.result import Found

attack = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What somebody who sees uploads, releases or models learns about people.")

AttackOut = Annotated[Path, typer.Option(help="Folder for the JSON of what was found")]


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
    """Which items an upload tells. Raw, clipped, in sums, noised; from one upload and from ten.

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
    only: Annotated[list[str] | None, typer.Option(metavar="ROUNDS", help="Audit these alone, by their name in the table; may be repeated")] = None,
    mistakes: Annotated[bool, typer.Option("--mistakes", help="Audit planted mistakes instead: every one should be found")] = False,
    out: AttackOut = Path("attacks"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """A lower bound of epsilon beside the claim. By canaries through the shipped rounds.

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
        found = audit_all(out, canaries=canaries, repeats=repeats, only=only or (), delta=delta, seed=randbits(32), on_done=say)
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
    """Who was trained on, by the likelihood ratio. An attack on the final model, with shadow runs in OUT/shadows; goes on after a kill.

    Example: fedssl attack membership ml-100k --processes 2
    """
    from fedssl.data.dataset import load_dataset
    from fedssl_simulations.attacks.membership import attack_membership
    from fedssl_simulations.run_files import read_run

    config = read_run(source, overrides or (), seed=seed)

    def say(number: int) -> None:
        if not (quiet or as_json):
            typer.echo(f"shadow run {number} of {shadows} is there", err=True)

    with stop_after_this_round() as should_stop:
        found = attack_membership(
            config, load_dataset(config.data), out / "shadows", shadows=shadows, processes=processes, on_done=say, should_stop=should_stop
        )
    if found is None:
        fail("stopped; the same command goes on with the shadow runs that are there", 130)
    _finish_attack(found, out, as_json)


@attack.command()
def attributes(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders on one data set")],
    users: Annotated[str, typer.Option(help="A file with attributes of users; without it, that of the first run's settings")] = "",
    attribute: Annotated[list[str] | None, typer.Option(help="An attribute; may be repeated. Without it: gender, age")] = None,
    out: AttackOut = Path("attacks"),
    as_json: AsJson = False,
) -> None:
    """Whether a frozen encoder tells gender or age. By a linear probe on each run's model.

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
    console, table = Console(), found.as_table()
    # A terminal wraps what is wider; cells that are folded to three letters nobody can read.
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)
    for note in found.notes:
        typer.echo(note)
    typer.echo(str(path))
