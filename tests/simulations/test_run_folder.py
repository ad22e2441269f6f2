"""The run folder: held by one process, lines whole, cut back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fedssl_simulations.run_folder import append_line, claim, cut_back, read_lines, write_whole

from fedssl.errors import RunFolderError


def line(phase: str, round: int) -> dict[str, object]:
    return {"phase": phase, "round": round}


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
        (tmp_path / "run.toml.new").write_text("half")
    with claim(tmp_path, resume=False):
        pass


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


def test_lines_are_read_in_order_and_a_torn_last_one_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    append_line(path, line("counts", 1))
    append_line(path, {"phase": "training", "round": 1, "title": "a\u2028b\nc"})
    assert read_lines(path) == [line("counts", 1), {"phase": "training", "round": 1, "title": "a\u2028b\nc"}]
    with path.open("a") as file:
        file.write('{"phase": "trai')
    assert len(read_lines(path)) == 2


def test_a_line_within_that_is_not_json_says_what_to_do(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\nrubbish\n{"round": 3}\n')
    with pytest.raises(RunFolderError, match="the file was changed, remove it"):
        read_lines(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("phase", "round", "kept"),
    [("", 0, []), ("counts", 1, [("counts", 1)]), ("training", 2, [("counts", 1), ("training", 1), ("training", 2)]), ("training", 9, "all")],
)
def test_rounds_after_the_checkpoint_are_cut(phase: str, round: int, kept: object, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    written = [("counts", 1), *(("training", number) for number in range(1, 5))]
    for one in written:
        append_line(path, line(*one))
    with path.open("a") as file:
        file.write('{"phase": "training", "rou')
    cut_back(path, phase=phase, round=round, phases=["counts", "training"])
    assert [(one["phase"], one["round"]) for one in read_lines(path)] == (written if kept == "all" else kept)
    assert path.read_text().endswith("\n") or not kept


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
