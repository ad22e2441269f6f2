"""A store that changes, shrinks or goes away under the run that maps it."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from faults import Job, fedssl, says, start, wait_for_rounds
from fedssl_simulations import bus_error


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
