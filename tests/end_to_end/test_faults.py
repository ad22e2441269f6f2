"""What may go wrong around a run: each ends in one line that says what to do, or does no harm; and a resume ends with the same bytes.

The commands are the real ones, in children of this process, which have the imports behind them. Everything is on: counts and
updates with noise, heads, dropout, Adam, an average of late rounds, two nodes. Keys are known in the children, and only there.
"""

from __future__ import annotations

import datetime
import itertools
import json
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fedssl_simulations import baselines, bus_error, cli, recommend, report, run, tables
from fedssl_simulations.run_files import read_run
from flwr.app.message import message as flower_message
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


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that every user of the machine may enter."""
    folder = Path(tempfile.mkdtemp(prefix="fedssl-faults-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def make_job(place: Path, name: str, rounds: int, data: Path | None = None, text: str = SETTINGS) -> Job:
    folder, histories = place / name, data or place / "histories.txt"
    folder.mkdir()
    config = read_run(tomllib.loads(text.format(path="", rounds=rounds)))
    plan = make_plan(config.privacy, config.server, config.counts, 40)
    assert plan is not None
    # The accountant remembers what it was asked, and a child inherits it: children are then quick.
    for count in range(rounds + 1):
        plan.epsilon({"popularity": 1, "counts": 1, "training": count} if config.counts is not None else {"training": count})
    settings = folder / "run.toml"
    settings.write_text(text.format(path=histories, rounds=rounds))
    if not histories.exists():
        assert fedssl("data", "synthesize", histories, "--users", 40, "--items", 80, "--events", 8).code == 0
    outcome = fedssl("simulate", settings, "--out", folder / "run", "-q")
    assert outcome.code == 0, outcome.error
    return Job(settings, histories, folder / "run", learned(folder / "run"), curve(folder / "run"))


@pytest.fixture(scope="module")
def job(place: Path) -> Job:
    found = make_job(place, "short", 4)
    assert found.learned.keys() == {
        *(f"round-000004/{name}.safetensors" for name in ("counts", "optimizer", "popularity", "training", "weights")),
        "node-000/user-vector.f32",
        "node-001/user-vector.f32",
    }
    assert all(any(raw) for raw in found.learned.values()) and len(found.curve) == 6
    return found


@pytest.fixture(scope="module")
def stored(place: Path, job: Job) -> Job:
    """A run of some seconds on a memory-mapped store."""
    outcome = fedssl("data", "convert", job.data, place / "store", "--min-events", 1)
    assert outcome.code == 0, outcome.error
    return make_job(place, "long", 40, place / "store")


@pytest.fixture(scope="module")
def own_noise(place: Path) -> Job:
    """A run in which users add their own noise: a ledger in SQLite on each node, no counts."""
    text = SETTINGS.replace("[counts]\nlags = 2\nclip_norm = 1.0\n", "").replace("counts_noise_multiplier = 5.0", 'mode = "local"')
    return make_job(place, "own-noise", 4, text=text.replace('sampling = "poisson"', 'sampling = "passes"'))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small disk of its own, made anew, or given other options where it is there."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        what = ["-o", f"remount,{options}"] if folder.is_mount() else ["-t", "tmpfs", "-o", options, "tmpfs"]
        if shutil.which("mount") is None:
            pytest.skip("no tmpfs can be mounted here (there is no command mount); run the tests as root on Linux")
        done = subprocess.run(["mount", *what, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here ({done.stderr.splitlines()[0]}); run the tests as root, where mounting is allowed")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def no_file_beyond(size: int) -> Callable[[], None]:
    """A disk that has no room for more than ``size`` bytes in a file: works everywhere, for everybody."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ---- no room ----


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_run_that_finds_no_room_at_any_write_says_where_and_a_resume_ends_with_the_same_bytes(
    what: str, job: Job, disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    named = set()
    for step in itertools.count(1):
        room = f"size={4 * step}k,nr_inodes=1000" if what == "bytes" else f"size=4m,nr_inodes={step + 1}"
        folder = disk(room) / "run"
        outcome = fedssl("simulate", job.settings, "--out", folder, "-q")
        if outcome.code == 0:
            break
        says(outcome, str(folder), "No space left on device")
        named.add(outcome.error.split(": ")[1].removeprefix(str(folder)))
        # Nothing half may look whole: what is there is a run that can be resumed, or none.
        disk("size=8m,nr_inodes=1000")
        job.go_on(folder)
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f" {step - 1} disks that were too small ", end="")
    assert step > 20
    assert named >= {"/secrets", "/ledger.jsonl", "/metrics.jsonl", "/checkpoints", "/heads/node-000/journal.bin", "/heads/node-001/journal.bin"}, named


def test_worker_processes_that_find_no_room_to_share_say_so(job: Job, disk: Callable[[str], Path], tmp_path: Path):
    shared = disk("size=4k")

    def share_there() -> None:
        tempfile.tempdir = str(shared)

    outcome = fedssl("simulate", job.settings, "--set", "system.workers=2", "--out", tmp_path / "run", "-q", before=share_there)
    says(outcome, f"{shared}/fedssl-workers-", "cannot be written (No space left on device)")
    assert list(shared.iterdir()) == []
    assert fedssl("simulate", "--resume", tmp_path / "run", "-q").code == 0
    assert learned(tmp_path / "run") == job.learned


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_run_with_ledgers_on_its_nodes_that_finds_no_room_says_where_and_a_resume_ends_with_the_same_bytes(
    what: str, own_noise: Job, disk: Callable[[str], Path]
):
    named = set()
    for step in itertools.count(2 if what == "files" else 40, 3 if what == "files" else 44):
        folder = disk(f"size={step}k,nr_inodes=1000" if what == "bytes" else f"size=4m,nr_inodes={step}") / "run"
        outcome = fedssl("simulate", own_noise.settings, "--out", folder, "-q")
        if outcome.code == 0:
            break
        says(outcome, str(folder))
        named.add(outcome.error.split(": ")[1].removeprefix(str(folder)))
        disk("size=8m,nr_inodes=1000")
        own_noise.go_on(folder)
        shutil.rmtree(folder)
    assert any(name.endswith("uploads.sqlite") for name in named) and "/checkpoints" in named, named


def test_a_run_whose_files_find_no_room_says_where_and_a_resume_ends_with_the_same_bytes(job: Job, tmp_path: Path):
    named = set()
    # None at all, and one byte too few for each other of its files.
    sizes = sorted({path.stat().st_size - 1 for path in job.folder.rglob("*") if path.is_file() and path.stat().st_size})
    for size in (0, *sizes[1:-1:2], sizes[-1]):
        folder = tmp_path / f"{size}"
        outcome = fedssl("simulate", job.settings, "--out", folder, "-q", before=no_file_beyond(size))
        says(outcome, str(folder), "File too large")
        named.add(outcome.error.split(": ")[1].removeprefix(str(folder)))
        job.go_on(folder)
        shutil.rmtree(folder)
    assert named >= {"/run.toml", "/checkpoints"}, named


def test_a_resume_whose_files_find_no_room_says_where_and_the_next_one_ends_with_the_same_bytes(stored: Job, tmp_path: Path):
    killed = tmp_path / "killed"
    child = start("simulate", stored.settings, "--out", killed, "-q")
    wait_for_rounds(killed, 4)
    os.kill(child.number, signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    # The lines that stay, and later ones.
    for size in (100, (killed / "metrics.jsonl").stat().st_size + 1000):
        folder = tmp_path / f"{size}"
        shutil.copytree(killed, folder)
        outcome = fedssl("simulate", "--resume", folder, "-q", before=no_file_beyond(size))
        says(outcome, str(folder), "File too large")
        stored.go_on(folder)


@pytest.mark.parametrize("size", [0, 100, 700, 1400])
def test_a_conversion_that_finds_no_room_leaves_nothing_and_the_next_one_is_whole(size: int, stored: Job, tmp_path: Path):
    outcome = fedssl("data", "convert", stored.data.parent / "histories.txt", tmp_path / "store", "--min-events", 1, before=no_file_beyond(size))
    says(outcome, f"{tmp_path / 'store'}: cannot be written", "is there room")
    assert list(tmp_path.iterdir()) == []
    assert fedssl("data", "convert", stored.data.parent / "histories.txt", tmp_path / "store", "--min-events", 1).code == 0
    assert bytes_of(tmp_path / "store") == bytes_of(stored.data)


def test_a_conversion_on_disks_too_small_for_it_leaves_nothing(stored: Job, disk: Callable[[str], Path]):
    for size in itertools.count(8, 40):
        folder = disk(f"size={size}k")
        outcome = fedssl("data", "convert", stored.data.parent / "histories.txt", folder / "store", "--min-events", 1)
        if outcome.code == 0:
            break
        says(outcome, f"{folder / 'store'}: cannot be written")
        assert list(folder.iterdir()) == []
    assert size > 80
    assert bytes_of(folder / "store") == bytes_of(stored.data)


@pytest.mark.parametrize("name", ["histories.txt", "histories.inter"])
def test_synthesised_histories_that_find_no_room_leave_nothing_and_the_next_ones_are_whole(name: str, tmp_path: Path):
    ask = ("data", "synthesize", tmp_path / name, "--users", 40, "--items", 80, "--events", 8)
    says(fedssl(*ask, before=no_file_beyond(1000)), f"{tmp_path / name}: cannot be written (File too large)")
    assert list(tmp_path.iterdir()) == []
    assert fedssl(*ask).code == 0
    assert len((tmp_path / name).read_text().splitlines()) >= 40
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_report_that_finds_no_room_leaves_the_page_that_was_there(job: Job, tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text("the page that was there")
    says(fedssl("report", job.folder, "--out", page, before=no_file_beyond(5000)), f"{page}: cannot be written (File too large)")
    assert page.read_text() == "the page that was there" and len(list(tmp_path.iterdir())) == 1
    assert fedssl("report", job.folder, "--out", page).code == 0
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("size", "name"), [(10, "study.asked.json"), (2000, "study.db")])
def test_a_study_that_finds_no_room_says_where(size: int, name: str, tmp_path: Path):
    pytest.importorskip("optuna", reason="a study keeps its trials with Optuna: pip install 'fedssl[study]'")
    (tmp_path / "study.toml").write_text('title = "t"\nepsilon = [8.0]\nseeds = [1]\n[[method]]\nname = "m"\nrun = "demo"\n')
    outcome = fedssl("study", tmp_path / "study.toml", "--out", tmp_path / "out", "--budget", 0.0001, "-q", before=no_file_beyond(size))
    says(outcome, f"{tmp_path / 'out' / name}: cannot be written")


def test_words_that_find_no_room_say_so(job: Job):
    def full() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    says(fedssl("data", "describe", job.data, "--min-events", 1, before=full), "standard output: cannot be written (No space left on device)")


# ---- no right ----


def as_nobody() -> None:
    """Root may write whatever its mode says; so this process becomes somebody who may not."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def give_to_nobody(path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)


def test_a_folder_that_may_only_be_read_is_refused_and_left_as_it_was(job: Job, place: Path):
    closed, whole = place / "closed", place / "closed" / "run"
    shutil.copytree(job.folder, whole)
    for path in (closed, *closed.rglob("*")):
        # Keys must be nobody else's, so they are his who reads them.
        path.chmod(0o500 if path.is_dir() else 0o400)
        give_to_nobody(path)
    before = {path: path.stat() for path in whole.rglob("*")}

    try:
        for words, arguments in {
            f"{closed / 'new'}: cannot be written (Permission denied); make it writable": ("simulate", job.settings, "--out", closed / "new", "-q"),
            f"{whole}: cannot be written (Permission denied); make it writable": ("simulate", "--resume", whole, "-q"),
            f"{closed / 'store'}: cannot be written": ("data", "convert", job.data, closed / "store", "--min-events", 1),
            f"{closed / 'more.txt'}: cannot be written (Permission denied)": ("data", "synthesize", closed / "more.txt", "--users", 40),
            f"{closed / 'page.html'}: cannot be written (Permission denied)": ("report", whole, "--out", closed / "page.html"),
        }.items():
            says(fedssl(*arguments, before=as_nobody), words)
        # What only reads works there.
        checkpoint = whole / "checkpoints" / "round-000004"
        assert fedssl("recommend", checkpoint, "--item", next(iter(item_tokens(checkpoint))), before=as_nobody).code == 0
        assert fedssl("evaluate", checkpoint, job.settings, before=as_nobody).code == 0
        assert {path: path.stat() for path in whole.rglob("*")}.keys() == before.keys()
        assert bytes_of(whole) == bytes_of(job.folder)
    finally:
        for path in (closed, *closed.rglob("*")):
            path.chmod(0o700)


def item_tokens(checkpoint: Path) -> list[str]:
    return [json.loads(line)["token"] for line in (checkpoint / "catalogue.jsonl").read_text().splitlines()[1:]]


def test_a_folder_that_turns_read_only_under_a_run_stops_it_and_a_resume_ends_with_the_same_bytes(stored: Job, place: Path):
    mine = place / "mine"
    mine.mkdir()
    give_to_nobody(mine)
    child = start("simulate", stored.settings, "--out", mine / "run", "-q", before=as_nobody)
    wait_for_rounds(mine / "run", 4)
    for path in mine.rglob("*"):
        with suppress(FileNotFoundError):  # It goes on meanwhile: an old checkpoint may be gone.
            path.chmod(0o500 if path.is_dir() else 0o400)
    says(child.wait(), str(mine / "run"), "Permission denied")
    says(fedssl("simulate", "--resume", mine / "run", "-q", before=as_nobody), "cannot be written (Permission denied); make it writable")
    for path in mine.rglob("*"):
        path.chmod(0o700)
    for path in (mine / "run" / "secrets").iterdir():
        path.chmod(0o600)
    stored.go_on(mine / "run")


# ---- a store that changes ----


def wait_for_rounds(folder: Path, rounds: int) -> None:
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < rounds:
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.002)


@pytest.mark.parametrize("change", ["other items", "cut short", "replaced", "removed"])
def test_a_store_that_changes_under_a_run_stops_it_and_a_resume_ends_with_the_same_bytes(change: str, stored: Job, tmp_path: Path):
    column, folder = stored.data / "items.npy", tmp_path / "run"
    raw = column.read_bytes()
    child = start("simulate", stored.settings, "--out", folder, "-q")
    try:
        wait_for_rounds(folder, 4)
        match change:
            case "other items":
                with column.open("r+b") as file:
                    file.seek(128)
                    file.write(raw[128:][::-1])
            case "cut short":
                os.truncate(column, 128)
            case "replaced":
                (tmp_path / "items.npy").write_bytes(raw[:128] + raw[128:][::-1])
                os.replace(tmp_path / "items.npy", column)
            case _:
                column.unlink()
        outcome = child.wait()
    finally:
        column.write_bytes(raw)
    # Read before it was looked at, a page that is gone ends the process: then too with a line.
    if "SIGBUS" in outcome.error:
        assert change == "cut short"
        says(outcome, "put the store back as it was")
    else:
        says(outcome, f"{column}: changed, replaced or removed while it was used", "Put the store back as it was")
    stored.go_on(folder)


def test_worker_processes_stop_with_the_store_too(stored: Job, tmp_path: Path):
    column, folder = stored.data / "items.npy", tmp_path / "run"
    raw = column.read_bytes()
    child = start("simulate", stored.settings, "--set", "system.workers=2", "--out", folder, "-q")
    try:
        wait_for_rounds(folder, 4)
        os.truncate(column, 128)
        outcome = child.wait()
    finally:
        column.write_bytes(raw)
    assert "put the store back as it was" in outcome.error.lower()
    says(outcome, "error")


def test_a_mapped_file_that_is_cut_short_ends_the_process_with_a_line(tmp_path: Path):
    (tmp_path / "column").write_bytes(bytes(8192))

    def read_what_is_gone() -> None:
        bus_error.say_bus_errors()
        with (tmp_path / "column").open("r+b") as file:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 8192), dtype=np.uint8)
            file.truncate(0)
            mapped.sum()

    says(fedssl("presets", before=read_what_is_gone), "cut short", "SIGBUS")


def test_a_store_that_was_made_anew_from_other_histories_is_refused_by_a_resume(stored: Job, place: Path, tmp_path: Path):
    store, other = tmp_path / "store", place / "others.txt"
    shutil.copytree(stored.data, store)
    child = start("simulate", stored.settings, "--set", f"data.path={store}", "--out", tmp_path / "run", "-q")
    wait_for_rounds(tmp_path / "run", 4)
    os.kill(child.number, signal.SIGKILL)
    child.wait()
    shutil.rmtree(store)
    lines = (place / "histories.txt").read_text().splitlines()
    words = lines[0].split()
    other.write_text("\n".join([" ".join([words[0], *words[:0:-1]]), *lines[1:]]) + "\n")
    assert fedssl("data", "convert", other, store, "--min-events", 1).code == 0
    says(fedssl("simulate", "--resume", tmp_path / "run", "-q"), "resume with the data set it began with")
    shutil.rmtree(store)
    shutil.copytree(stored.data, store)
    stored.go_on(tmp_path / "run")


# ---- a checkpoint cut short ----


def test_a_checkpoint_cut_short_is_named_and_without_it_the_run_goes_on_from_the_older_one_to_the_same_bytes(job: Job, tmp_path: Path):
    newest = job.folder / "checkpoints" / "round-000004"
    assert len(list(newest.iterdir())) == 8
    for number, path in enumerate(sorted(newest.iterdir())):
        for left in (path.stat().st_size // 2, path.stat().st_size - 1):
            folder = tmp_path / f"{number}-{left}"
            shutil.copytree(job.folder, folder)
            damaged = folder / "checkpoints" / newest.name
            os.truncate(damaged / path.name, left)
            outcome = fedssl("simulate", "--resume", folder, "-q")
            if outcome.code == 0:
                # Whole but for the line end behind the last line.
                assert path.name == "catalogue.jsonl" and left == path.stat().st_size - 1
                continue
            says(outcome, str(damaged), "the run goes on from round-000002 where round-000004 is taken away")
            shutil.rmtree(damaged)
            job.go_on(folder)
            shutil.rmtree(folder)


def test_where_the_only_checkpoint_is_cut_short_there_is_nothing_to_go_on_from(stored: Job, tmp_path: Path):
    shutil.copytree(stored.folder, tmp_path / "run")
    older, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(older)
    os.truncate(newest / "weights.safetensors", 100)
    says(fedssl("simulate", "--resume", tmp_path / "run", "-q"), "there is no other here, start a new run")
    # Taken away all the same: heads cannot go back so far, and say so.
    shutil.rmtree(newest)
    says(fedssl("simulate", "--resume", tmp_path / "run", "-q"), "heads can go back to the end of round", "and round 1 was to begin", "remove this folder")


# ---- two at once ----


def test_a_second_run_in_a_folder_is_refused_and_the_first_ends_undisturbed(stored: Job, tmp_path: Path):
    folder = tmp_path / "run"
    child = start("simulate", stored.settings, "--out", folder, "-q")
    wait_for_rounds(folder, 2)
    says(fedssl("simulate", "--resume", folder, "-q"), f"{folder}: another process is running in it; wait for it")
    says(fedssl("simulate", stored.settings, "--out", folder, "-q"), f"{folder}: not empty")
    outcome = child.wait()
    assert outcome.code == 0, outcome.error
    assert learned(folder) == stored.learned and curve(folder) == stored.curve


def test_of_two_conversions_into_one_folder_one_is_refused_and_the_other_whole(stored: Job, tmp_path: Path):
    children = [start("data", "convert", stored.data.parent / "histories.txt", tmp_path / "store", "--min-events", 1) for _ in range(2)]
    done, refused = sorted(child.wait() for child in children)
    assert done.code == 0, done
    says(refused, str(tmp_path / "store"))
    assert bytes_of(tmp_path / "store") == bytes_of(stored.data)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# ---- a clock that jumps ----

JUMPS = (0.0, 30 * 3600.0, -30 * 3600.0, 400 * 24 * 3600.0)
"""Seconds by which the clock on the wall is off, at one look after the other."""


def on_jumping_clocks() -> None:
    """Whatever a Python program asks for the time of day, Flower included."""
    off, real = itertools.cycle(JUMPS), time.time

    def now() -> datetime.datetime:
        return datetime.datetime.now(tz=datetime.UTC) + datetime.timedelta(seconds=next(off))

    time.time = lambda: real() + next(off)  # type: ignore[assignment]
    flower_message.now = now  # type: ignore[assignment]


def test_a_clock_that_jumps_by_days_changes_nothing_and_nobody_takes_it_for_time_spent(job: Job, tmp_path: Path):
    began = time.monotonic()
    outcome = fedssl("simulate", job.settings, "--set", "system.checkpoint_seconds=3600", "--out", tmp_path / "run", "-q", before=on_jumping_clocks)
    spent = time.monotonic() - began
    assert outcome.code == 0, outcome.error
    job.go_on(tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(line["seconds"] > 0 for line in lines) and sum(line["seconds"] for line in lines) < spent
    assert 0 < json.loads((tmp_path / "run" / "report.json").read_text())["cost"]["seconds"] < spent


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <sys/time.h>
static long off(void) {{ static long jumps[] = {{{jumps}}}; static unsigned at; return jumps[at++ % (sizeof jumps / sizeof *jumps)]; }}
int clock_gettime(clockid_t which, struct timespec *now) {{
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(which, now);
  if (which == CLOCK_REALTIME) now->tv_sec += off();
  return failed;
}}
"""


def test_a_process_whose_system_clock_jumps_by_days_ends_with_the_same_bytes(job: Job, tmp_path: Path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to put another clock under a process; install one (on Debian: apt install gcc)")
    (tmp_path / "clock.c").write_text(SHIM.format(jumps=", ".join(f"{int(seconds)}L" for seconds in JUMPS)))
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", tmp_path / "clock.so", tmp_path / "clock.c", "-ldl"], check=True)
    child = [sys.executable, "-c", CHILD, "simulate", str(job.settings), "--out", str(tmp_path / "run"), "-q"]
    done = subprocess.run(child, env={**os.environ, "LD_PRELOAD": str(tmp_path / "clock.so")}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    job.go_on(tmp_path / "run")


CHILD = """
import time
from types import SimpleNamespace
from fedssl.privacy import keys
from fedssl_simulations.cli import main
keys.secrets = SimpleNamespace(token_bytes=lambda size: b"k" * size)
assert len({time.time() // 3600 for _ in range(8)}) > 1, "the clock does not jump"
main()
"""
