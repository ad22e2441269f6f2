"""What CONTRIBUTING.md shows is run as it stands: every file is written down, every command's settings start a run."""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run

from fedssl import parts
from fedssl.data.synthetic import synthesize

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"```sh\n(fedssl .*?)\n```", PAGE, re.DOTALL)
SMALL = [
    "encoder.width=8",
    "encoder.hidden=8",
    "encoder.blocks=1",
    "encoder.window=8",
    "server.rounds=2",
    "server.cohort=8",
    "evaluation.every=0",
    "data.min_events=2",
]


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files and a small ratings.dat, as the working folder and on the path of imports."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    made = synthesize(users=60, items=160, seed=3, mean_events=12.0)
    lines = [f"{user}::{item}::5::{place}\n" for place, (user, item) in enumerate(zip(made.users, made.items, strict=True))]
    (tmp_path / "ratings.dat").write_text("".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_page_shows_each_kind_of_part_with_a_command():
    assert set(FILES) == {"item_after_next.py", "decayed_mean.py", "lion.py", "ratings.py", "by_object.py"}
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("--set ")[-1])
def test_a_part_of_ones_own_runs_by_its_name(command: str, beside: Path):
    words = shlex.split(command)
    assert words[:3] == ["fedssl", "simulate", "demo"]
    overrides = [word for before, word in itertools.pairwise(words) if before == "--set"]
    reader = ["data.path=ratings.dat", "data.format=ratings:read_ratings"]
    # The command's own settings last, so that they are what is tried.
    run = simulate(read_run("demo", [*reader, *SMALL, *overrides]), out=beside / "run")
    assert run.is_finished
    assert run.report["data"]["users"] > 50
    assert 0 < run.report["test"]["unseen"]["ndcg@10"] < 1


def test_parts_by_object_run_together(beside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in ("TASKS", "ENCODERS", "SERVER_OPTIMIZERS"):
        monkeypatch.setattr(parts, name, dict(getattr(parts, name)))
    runpy.run_path(str(beside / "by_object.py"))
    assert 0 < float(capsys.readouterr().out.splitlines()[-1]) < 1
    assert (beside / "runs" / "by-object" / "report.json").exists()
