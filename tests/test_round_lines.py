"""Lines of rounds: appended, read back whole, cut back."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedssl.errors import RunFolderError
from fedssl.round_lines import append_line, cut_back, read_lines


def line(phase: str, round: int) -> dict[str, object]:
    return {"phase": phase, "round": round}


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
