"""Checkpoints of which a file was cut short."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from faults import Job, fedssl, says


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
