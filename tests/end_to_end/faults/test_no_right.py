"""Folders that may only be read, from the start or from some round on."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

from faults import Job, as_nobody, bytes_of, fedssl, give_to_nobody, says, start, wait_for_rounds


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
