"""Runs that nothing went wrong with, made once, and small disks."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import SETTINGS, Job, fedssl, make_job


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A folder that every user of the machine may enter."""
    folder = Path(tempfile.mkdtemp(prefix="fedssl-faults-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def job(place: Path) -> Job:
    found = make_job(place, "short", 4)
    assert found.learned.keys() == {
        *(f"round-000004/{name}.safetensors" for name in ("counts", "optimizer", "popularity", "training", "weights")),
        "node-000/user-vector.f32",
        "node-001/user-vector.f32",
    }
    assert all(any(raw) for raw in found.learned.values()) and len(found.curve) == 6
    return found


@pytest.fixture(scope="session")
def stored(place: Path, job: Job) -> Job:
    """A run of some seconds on a memory-mapped store."""
    outcome = fedssl("data", "convert", job.data, place / "store", "--min-events", 1)
    assert outcome.code == 0, outcome.error
    return make_job(place, "long", 40, place / "store")


@pytest.fixture(scope="session")
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
