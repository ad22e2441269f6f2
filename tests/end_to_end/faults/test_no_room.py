"""A disk that is full: each write that finds no room says where, and a resume ends with the same bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import Job, bytes_of, fedssl, left_in, no_file_beyond, says, start, wait_for_rounds
from small import learned


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_run_that_finds_no_room_at_any_write_says_where_and_a_resume_ends_with_the_same_bytes(
    what: str, job: Job, disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    named, resumed = set(), set()
    for step in itertools.count(1):
        room = f"size={4 * step}k,nr_inodes=1000" if what == "bytes" else f"size=4m,nr_inodes={step + 1}"
        folder = disk(room) / "run"
        outcome = fedssl("simulate", job.settings, "--out", folder, "-q")
        if outcome.code == 0:
            break
        says(outcome, str(folder), "No space left on device")
        named.add(outcome.error.split(": ")[1].removeprefix(str(folder)))
        # Nothing half may look whole: what is there is a run that can be resumed, or none. What is left there often equals what an earlier disk left.
        disk("size=8m,nr_inodes=1000")
        if (left := left_in(folder)) not in resumed:
            resumed.add(left)
            job.go_on(folder)
        shutil.rmtree(folder, ignore_errors=True)
    with capsys.disabled():
        print(f" {step - 1} disks that were too small, {len(resumed)} ways to leave a run ", end="")
    assert step > 20 and len(resumed) > 5
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
    named, resumed = set(), set()
    for step in itertools.count(2 if what == "files" else 40, 3 if what == "files" else 44):
        folder = disk(f"size={step}k,nr_inodes=1000" if what == "bytes" else f"size=4m,nr_inodes={step}") / "run"
        outcome = fedssl("simulate", own_noise.settings, "--out", folder, "-q")
        if outcome.code == 0:
            break
        says(outcome, str(folder))
        named.add(outcome.error.split(": ")[1].removeprefix(str(folder)))
        disk("size=8m,nr_inodes=1000")
        if (left := left_in(folder)) not in resumed:
            resumed.add(left)
            own_noise.go_on(folder)
        shutil.rmtree(folder, ignore_errors=True)
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
