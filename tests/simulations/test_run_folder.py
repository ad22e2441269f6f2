"""The run folder: taken by one process at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fedssl_simulations.run_folder import claim

from fedssl.errors import RunFolderError


def test_a_new_run_takes_an_absent_or_empty_folder(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "deep" / "absent", tmp_path / "empty"):
        with claim(folder, resume=False) as held:
            assert held == folder and folder.is_dir()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("do not lose")
    with pytest.raises(RunFolderError, match=r"not empty; resume that run with --resume .*, or choose another --out"), claim(tmp_path, resume=False):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunFolderError, match="not empty"), claim(tmp_path / "thesis.txt", resume=False):
        pass


def test_what_a_process_left_that_never_began_a_run_is_no_obstacle(tmp_path: Path):
    with claim(tmp_path, resume=False):
        (tmp_path / ".run.toml.77.partial").write_text("half")
    with claim(tmp_path, resume=False):
        assert [entry.name for entry in tmp_path.iterdir()] == ["run.lock"]


def test_a_resume_of_nothing_says_how_to_start(tmp_path: Path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(RunFolderError, match=r"no run.toml, so there is no run to resume here; start one with --out"), claim(folder, resume=True):
            pass
    assert not (tmp_path / "absent").exists()


def test_two_processes_in_one_folder_are_refused_and_the_first_to_leave_frees_it(tmp_path: Path):
    (tmp_path / "run.toml").write_text("")
    with claim(tmp_path, resume=True):
        with pytest.raises(RunFolderError, match="another process is running in it"), claim(tmp_path, resume=True):
            pass
        child = os.fork()
        if child == 0:
            try:
                with claim(tmp_path, resume=True):
                    os._exit(0)
            except RunFolderError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with claim(tmp_path, resume=True):
        pass


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"), claim(tmp_path / "file" / "run", resume=False):
        pass
