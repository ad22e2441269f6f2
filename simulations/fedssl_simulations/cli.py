"""The `fedssl` command: read, call one function, print, leave. Sub-commands load what they need when they are called.

Exit codes: 0 done, 1 the user must act (one line on stderr), 2 wrong usage, 130 interrupted and resumable.
"""

from __future__ import annotations

import errno
import os
import sys

import typer
import typer.core
from fedssl_client.cli import device
from fedssl_server.cli import server

from fedssl.errors import FedSSLError
from fedssl_simulations.bus_error import say_bus_errors
from fedssl_simulations.commands import models, runs
from fedssl_simulations.commands.attacks import attack
from fedssl_simulations.commands.data import data
from fedssl_simulations.commands.terminal import fail

# Else Typer escapes brackets for rich, which prints none of our help, and the backslash shows.
typer.core.HAS_RICH = False

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
for command in (runs.simulate, runs.study, runs.baselines, models.evaluate, models.recommend, models.export, models.report, models.presets):
    cli.command()(command)
for name, group, words in (
    ("data", data, "Look at a data set; make one of any size."),
    ("attack", attack, "What somebody who sees uploads, releases or models learns."),
    ("device", device, "A person's device: its policy, its history, its agent."),
    ("server", server, "A server: its keys, who may join, its runs over Flower."),
):
    cli.add_typer(group, name=name, short_help=words)

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)


def main() -> None:
    """The door: errors that a person must act on become one line and exit code 1."""
    say_bus_errors()
    try:
        code = cli(standalone_mode=False)
        sys.stdout.flush()
        # Typer makes a Ctrl-C an exit code, which is returned here.
        if code == 130:
            raise KeyboardInterrupt
    except FedSSLError as error:
        fail(f"error: {error}", 1)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        if error.filename is not None:
            fail(f"error: {error.filename}: {error.strerror}; make room, or get the right to use it, and do the same again", 1)
        # All files that are kept say where they could not be written: what has no name is the standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # What is left of it would fail again at the end.
        fail(f"error: standard output: cannot be written ({error.strerror}); send it elsewhere. What the command itself wrote is whole", 1)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 130)
    except Exception as error:
        # Click's own usage errors know how to show themselves; anything else is a bug and keeps its traceback.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
