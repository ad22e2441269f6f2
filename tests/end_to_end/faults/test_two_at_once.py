"""Two commands that want the same folder."""

from __future__ import annotations

from pathlib import Path

from faults import Job, bytes_of, curve, fedssl, says, start, wait_for_rounds
from small import learned


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
