"""What is written: whole or as it was, and where it cannot be, an error that says so."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from fedssl.disk import whole_file, write_whole, writing
from fedssl.errors import DiskError


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.json"
    write_whole(path, json.dumps({"round": 1}))

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            write_whole(path, "half")
    assert json.loads(path.read_text()) == {"round": 1}
    write_whole(path, "whole")
    assert path.read_text() == "whole"


def test_a_file_that_finds_no_room_stays_as_it_was_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "report.json"
    write_whole(path, "as it was")
    child = os.fork()
    if child == 0:
        # No file of this process may be longer: a disk that is full after 100 bytes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            write_whole(path, "x" * 101)
        except DiskError as error:
            os._exit(7 if str(error).startswith(f"{path}: cannot be written (File too large); make room") else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "as it was"


def test_a_folder_where_a_file_is_wanted_is_named_as_one_and_stays(tmp_path: Path):
    (tmp_path / "page").mkdir()
    with pytest.raises(DiskError, match=r"page: a folder is there; wanted the name of a file"):
        write_whole(tmp_path / "page", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page"]


def test_an_error_in_the_block_that_is_not_the_disks_passes_as_it_is(tmp_path: Path):
    def half(beside: Path) -> None:
        beside.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "page.html") as beside:
        half(beside)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_and_a_missing_right_name_the_file(tmp_path: Path):
    with pytest.raises(DiskError, match=r"none/page.html: cannot be written \(No such file or directory\)"):
        write_whole(tmp_path / "none" / "page.html", "")
    with pytest.raises(DiskError, match=r"ledger: cannot be written \(5 requested and 0 written\)"), writing(tmp_path / "ledger"):
        raise OSError("5 requested and 0 written")
