"""What tests of faults share: real `fedssl` commands in children of this process, and a run with everything on that nothing may change.

Children have the imports behind them. Everything is on: counts and updates with noise, heads, dropout, Adam, an average of late rounds,
two nodes. Keys are known in the children, and only there.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from fedssl_simulations import baselines, cli, recommend, report, run, tables
from fedssl_simulations.pages import templates
from fedssl_simulations.run_files import read_run
from small import learned

from fedssl.data import convert
from fedssl.privacy import keys as keys_module
from fedssl.privacy.plan import make_plan
from fedssl.round_lines import read_lines

LAZY = (baselines, convert, recommend, report, run, tables)
"""What commands import when they are called: a child has it already, whatever it may still read."""
NOBODY = 65534
SETTINGS = """
seed = 5
[data]
path = "{path}"
min_events = 1
[encoder]
width = 8
blocks = 1
heads = 2
hidden = 8
window = 8
dropout = 0.1
[counts]
lags = 2
clip_norm = 1.0
[head]
name = "user-vector"
lr = 0.5
[local]
steps = 2
lr = 0.1
[server]
rounds = {rounds}
cohort = 8
sampling = "poisson"
optimizer = "adam"
average_from = 3
[privacy]
clip_norm = 0.5
noise_multiplier = 5.0
counts_noise_multiplier = 5.0
delta = 1e-3
[evaluation]
ks = [5]
[system]
shards = 2
workers = 1
users_per_chunk = 4
checkpoint_every = 2
keep_checkpoints = 2
"""


class Outcome(NamedTuple):
    code: int
    out: str
    error: str


class Child(NamedTuple):
    """A `fedssl` command on its way, and where its words arrive."""

    number: int
    out: int
    error: int

    def wait(self) -> Outcome:
        words = [b"", b""]
        for place, end in enumerate((self.out, self.error)):
            with os.fdopen(end, "rb") as file:
                words[place] = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        return Outcome(code, words[0].decode(), words[1].decode())


def start(*arguments: object, before: Callable[[], None] = lambda: None) -> Child:
    """Begin `fedssl ARGUMENTS` in a forked child, which first calls ``before``."""
    out, error = os.pipe(), os.pipe()
    number = os.fork()
    if number:
        os.close(out[1])
        os.close(error[1])
        return Child(number, out[0], error[0])
    code = 99
    try:
        os.dup2(out[1], 1)
        os.dup2(error[1], 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        torch.set_num_threads(1)
        # No power is lost here, and a disk that others use makes a process wait for seconds.
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
        keys_module.secrets = SimpleNamespace(token_bytes=lambda size: b"k" * size)  # type: ignore[assignment]
        # Where users add their own noise it depends on the run's name too.
        run.uuid4 = lambda: SimpleNamespace(hex="r" * 32)  # type: ignore[assignment]
        before()
        sys.argv = ["fedssl", *map(str, arguments)]
        cli.main()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fedssl(*arguments: object, before: Callable[[], None] = lambda: None) -> Outcome:
    return start(*arguments, before=before).wait()


def says(outcome: Outcome, *words: str) -> None:
    """One line on standard error, exit code 1, nothing of Python in it."""
    assert outcome.code == 1, outcome
    assert outcome.error.startswith("error: ") and outcome.error.count("\n") == 1, outcome.error
    for word in words:
        assert word in outcome.error, outcome.error


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def left_in(folder: Path) -> frozenset[tuple[str, bytes]]:
    """All that a resume can see: names, and contents but for what a round took."""
    return frozenset(
        (str(path.relative_to(folder)), re.sub(rb'"seconds": [0-9.e-]*', b"", path.read_bytes()) if path.is_file() else b"") for path in folder.rglob("*")
    )


def curve(folder: Path) -> list[dict[str, object]]:
    """The lines of a run, but for what a round took. Epsilon is of what was charged by then: where rounds are played again, that of later ones."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "seconds" and (name != "epsilon" or line is lines[-1])} for line in lines]


class Job(NamedTuple):
    """Settings of a run on real files, and what it left where nothing went wrong."""

    settings: Path
    data: Path
    folder: Path
    learned: dict[str, bytes]
    curve: list[dict[str, object]]

    def go_on(self, folder: Path) -> None:
        """Resume the run in ``folder``, or begin it where it never began; it ends as if nothing had happened."""
        begun = ["--resume", folder] if (folder / "run.toml").exists() else [self.settings, "--out", folder]
        outcome = fedssl("simulate", *begun, "-q")
        assert outcome.code == 0, outcome.error
        found = learned(folder)
        assert [name for name in {*found, *self.learned} if found.get(name) != self.learned.get(name)] == []
        assert curve(folder) == self.curve
        assert (folder / "report.html").exists() and "researcher_only" in json.loads((folder / "report.json").read_text())
        assert [path for path in folder.rglob("*") if path.name.startswith(".")] == []


def make_job(place: Path, name: str, rounds: int, data: Path | None = None, text: str = SETTINGS) -> Job:
    folder, histories = place / name, data or place / "histories.txt"
    folder.mkdir()
    config = read_run(tomllib.loads(text.format(path="", rounds=rounds)))
    plan = make_plan(config.privacy, config.server, config.counts, 40)
    assert plan is not None
    # The accountant remembers what it was asked, and a child inherits it: children are then quick.
    for count in range(rounds + 1):
        plan.epsilon({"popularity": 1, "counts": 1, "training": count} if config.counts is not None else {"training": count})
    # So does whoever renders pages.
    for name in templates().list_templates():
        templates().get_template(name)
    settings = folder / "run.toml"
    settings.write_text(text.format(path=histories, rounds=rounds))
    if not histories.exists():
        assert fedssl("data", "synthesize", histories, "--users", 40, "--items", 80, "--events", 8).code == 0
    outcome = fedssl("simulate", settings, "--out", folder / "run", "-q")
    assert outcome.code == 0, outcome.error
    return Job(settings, histories, folder / "run", learned(folder / "run"), curve(folder / "run"))


def no_file_beyond(size: int) -> Callable[[], None]:
    """A disk that has no room for more than ``size`` bytes in a file: works everywhere, for everybody."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def as_nobody() -> None:
    """Root may write whatever its mode says; so this process becomes somebody who may not."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def give_to_nobody(path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)


def wait_for_rounds(folder: Path, rounds: int) -> None:
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < rounds:
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.002)
