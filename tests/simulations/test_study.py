"""A study: which points in which order, resumed after a kill, never more than the budget, and one page."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fedssl_simulations.study import Done, Outcome, run_study
from fedssl_simulations.study_file import Point, StudyConfig, points_of, read_study
from fedssl_simulations.study_page import as_markdown, cells_of, render_study

from fedssl.checking import check
from fedssl.data.readers import write_lines
from fedssl.data.synthetic import synthesize
from fedssl.errors import ConfigError, RunFolderError

RUN = """
[data]
path = "PATH"
min_events = 1
[encoder]
width = 8
blocks = 1
heads = 1
hidden = 8
window = 8
[[task]]
name = "next-item"
negatives = 8
[server]
rounds = 2
cohort = 20
sampling = "poisson"
[privacy]
clip_norm = 0.5
delta = 1e-3
"""
STUDY: dict[str, Any] = {
    "title": "Small <study>",
    "epsilon": [math.inf, 8.0, 2.0],
    "seeds": [1, 2],
    "method": [{"name": "an encoder", "run": "run.toml"}],
}


def study_of(**changes: Any) -> StudyConfig:
    return check(StudyConfig, {**STUDY, **changes}, where="test")


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    write_lines(synthesize(40, 80, 1, mean_events=7), tmp_path / "histories.txt")
    (tmp_path / "run.toml").write_text(RUN.replace("PATH", str(tmp_path / "histories.txt")))
    return study_of(method=[{"name": "an encoder", "run": str(tmp_path / "run.toml")}])


def test_a_short_budget_sees_every_epsilon_before_a_second_seed():
    attack = {"name": "membership", "run": "ml-100k", "epsilon": [math.inf, 2.0], "open": ["privacy.clip_norm=none"], "options": ["--shadows", "16"]}
    points = points_of(study_of(attack=[attack]), ("data.path=x",))
    assert [(point.what, point.epsilon, point.seed) for point in points] == [
        *(("run", epsilon, 1) for epsilon in (math.inf, 8.0, 2.0)),
        ("membership", math.inf, 1),
        ("membership", 2.0, 1),
        *(("run", epsilon, 2) for epsilon in (math.inf, 8.0, 2.0)),
    ]
    assert points[1].overrides == ("privacy.epsilon=8", "data.path=x")
    assert points[3].overrides == ("privacy.clip_norm=none", "data.path=x") and points[3].options == ("--shadows", "16")
    assert len({point.folder for point in points}) == len(points)


def test_attributes_are_probed_on_the_runs_of_a_method_and_parts_need_no_runs():
    methods = [{"name": "whole", "run": "a.toml"}, {"name": "a part", "of": "whole", "part": "counts"}]
    points = points_of(study_of(method=methods, attack=[{"name": "attributes", "of": "whole", "epsilon": [8.0], "options": ["--attribute", "age"]}]))
    assert [point.method for point in points if point.what == "run"] == ["whole"] * 6
    (probe,) = [point for point in points if point.what == "attributes"]
    assert (probe.source, probe.folder) == ("runs/whole-epsilon-8-seed-1", "attacks/attributes-epsilon-8-seed-1")
    assert probe.options == ("--attribute", "age")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": [0.0]}, r"epsilon = 0; wanted above 0, or inf"),
        ({"method": [{"name": "a", "run": "x"}, {"name": "a", "run": "y"}]}, r"methods share a name"),
        ({"attack": [{"name": "membership"}]}, r"name a run"),
        ({"attack": [{"name": "attributes", "run": "x"}]}, r"name their method as `of`"),
        ({"attack": [{"name": "attributes", "of": "nobody"}]}, r"of 'nobody', which has no runs; there is an encoder"),
        ({"attack": [{"name": "attributes", "of": "an encoder", "epsilon": [3.0]}]}, r"epsilon \[3.0\], where the study makes no runs"),
        ({"attack": [{"name": "membership", "run": "x"}, {"name": "membership", "run": "y"}]}, r"give each a label"),
        ({"method": [{"name": "a"}]}, r"wanted either a run, or in `of` the method"),
        ({"method": [{"name": "a", "run": "x"}, {"name": "b", "of": "a", "set": ["y=1"]}]}, r"no settings of its own"),
        ({"epsilons": [1.0]}, r"epsilons"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        study_of(**changes)


def test_an_unknown_study_is_told_those_that_ship():
    with pytest.raises(ConfigError, match=r"privaci: no study of this name \(.*privacy.*\)"):
        read_study("privaci")


def test_every_study_that_ships_is_well_formed():
    assert points_of(read_study("privacy"))


def test_a_study_that_was_killed_goes_on_where_it_was(study: StudyConfig, tmp_path: Path):
    out = tmp_path / "study"
    (tmp_path / "study.toml").write_text(f'title = "t"\nepsilon = [inf, 8.0]\nseeds = [1]\n[[method]]\nname = "an encoder"\nrun = "{study.method[0].run}"\n')
    command = [sys.executable, "-c", "from fedssl_simulations.cli import main; main()", "study", str(tmp_path / "study.toml"), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([*command, "--processes", "1"], env=environment, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if line.endswith(": done\n"):
            break
    first.kill()
    first.wait()
    made = out / "runs" / "an-encoder-epsilon-inf-seed-1" / "report.json"
    before = made.stat().st_mtime_ns
    deadline = time.monotonic() + 60
    while True:  # The command that was running when the study was killed may still hold its folder.
        again = subprocess.run([*command, "--processes", "1"], env=environment, capture_output=True, text=True, check=False)
        if again.returncode == 0:
            break
        assert time.monotonic() < deadline, again.stderr
    assert made.stat().st_mtime_ns == before
    assert "2 done, 0 left, 0 failed" in again.stdout
    assert json.loads((out / "study.json").read_text())["left"] == []
    assert "∞" in (out / "study.html").read_text()


def test_nothing_begins_when_the_budget_is_used_up(study: StudyConfig, tmp_path: Path):
    outcome = run_study(study, tmp_path / "study", budget_minutes=0.0)
    assert (outcome.done, len(outcome.left)) == ([], 6)
    assert not (tmp_path / "study" / "runs").exists()


def test_an_attack_on_a_run_begins_when_the_run_is_there_and_its_storage_is_read_once(study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import optuna

    reads: list[int] = []
    get_trials = optuna.study.Study.get_trials
    monkeypatch.setattr(optuna.study.Study, "get_trials", lambda self, *args, **named: reads.append(1) or get_trials(self, *args, **named))
    names = [line.split()[0] for line in (tmp_path / "histories.txt").read_text().splitlines()]
    (tmp_path / "users.csv").write_text("user_id,gender\n" + "".join(f"{name},{'FM'[number % 2]}\n" for number, name in enumerate(names)))
    probe = {"name": "attributes", "of": "an encoder", "options": ["--attribute", "gender", "--users", str(tmp_path / "users.csv")]}
    both = study_of(epsilon=[8.0], seeds=[1], method=[study.method[0].model_dump()], attack=[probe])
    news: list[str] = []
    outcome = run_study(both, tmp_path / "study", processes=2, on_point=lambda point, what: news.append(f"{point.what} {what}"))
    assert news == ["run begins", "run done", "attributes begins", "attributes done"]
    assert [one.point.what for one in outcome.done] == ["run", "attributes"] and len(reads) == 1
    assert "AUC: gender is F" in render_study(both, outcome) or "AUC: gender is M" in render_study(both, outcome)


def test_a_run_that_fails_says_why_and_the_others_go_on(study: StudyConfig, tmp_path: Path):
    broken = {"name": "broken", "run": study.method[0].run, "set": ["encoder.name=nosuch"]}
    both = study_of(epsilon=[8.0], seeds=[1], method=[broken, study.method[0].model_dump()])
    outcome = run_study(both, tmp_path / "study")
    assert [one.point.method for one in outcome.done] == ["an encoder"]
    assert [point.method for point, _ in outcome.failed] == ["broken"] and "nosuch" in outcome.failed[0][1]
    assert outcome.done[0].found["privacy"]["epsilon"] <= 8.0


def test_a_folder_of_another_study_is_refused(study: StudyConfig, tmp_path: Path):
    run_study(study, tmp_path / "study", budget_minutes=0.0)
    with pytest.raises(RunFolderError, match="holds another study"):
        run_study(study_of(seeds=[7]), tmp_path / "study", budget_minutes=0.0)


def report(unseen: float, everything: float, epsilon: float | None) -> dict[str, Any]:
    test: dict[str, Any] = {"unseen": {"ndcg@10": unseen}, "all": {"ndcg@10": everything}}
    test["parts"] = {"counts": {"unseen": {"ndcg@10": unseen / 4}, "all": {"ndcg@10": everything / 4}}}
    found: dict[str, Any] = {"cost": {"upload_bytes_per_user": 1000, "rounds": 5}, "privacy": None}
    if epsilon is None:
        return {**found, "test": test}
    return {**found, "researcher_only": {"test": test}, "privacy": {"epsilon": epsilon, "delta": 1e-5, "unit": "user", "noise_multiplier": 1.0}}


def made_up() -> tuple[StudyConfig, Outcome]:
    attack = {"name": "membership", "run": "ml-100k", "epsilon": [math.inf]}
    config = study_of(attack=[attack], method=[*STUDY["method"], {"name": "counts alone", "of": "an encoder", "part": "counts"}])
    rate = {"value": 0.7, "low": 0.6, "high": 0.8}
    rows = [{"attack": name, "true positives at 1 % false": {"value": 0.2, "low": 0.1, "high": 0.3}, "auc": rate} for name in ("alone", "likelihood ratio")]
    found = {"title": "Membership", "notes": ["16 shadows"], "rows": rows}
    done = [
        Done(Point("run", "an encoder", epsilon, seed, "", ()), report(unseen, unseen / 2, None if math.isinf(epsilon) else epsilon), 10.0)
        for epsilon, seed, unseen in ((math.inf, 1, 0.2), (math.inf, 2, 0.1), (8.0, 1, 0.12), (2.0, 1, 0.03))
    ]
    done.append(Done(Point("membership", "membership", math.inf, 1, "", ()), found, 5.0))
    return config, Outcome(done, [Point("run", "an encoder", 8.0, 2, "", ())], [])


def test_the_table_says_means_spread_and_what_is_kept_of_no_privacy():
    config, outcome = made_up()
    lines = as_markdown(config, cells_of(config, outcome)).splitlines()[2:]
    assert lines == [
        "| an encoder | ∞ | 2 | 0.1500 (0.1000 to 0.2000) | 0.0750 | 100% | 10 |",
        "| an encoder | 8 | 1 | 0.1200 (0.1200 to 0.1200) | 0.0600 | 80% | 10 |",
        "| an encoder | 2 | 1 | 0.0300 (0.0300 to 0.0300) | 0.0150 | 20% | 10 |",
        "| counts alone | ∞ | 2 | 0.0375 (0.0250 to 0.0500) | 0.0188 | 100% | 10 |",
        "| counts alone | 8 | 1 | 0.0300 (0.0300 to 0.0300) | 0.0150 | 80% | 10 |",
        "| counts alone | 2 | 1 | 0.0075 (0.0075 to 0.0075) | 0.0037 | 20% | 10 |",
    ]


def test_the_page_shows_utility_attacks_promises_and_what_is_left_and_fetches_nothing():
    config, outcome = made_up()
    page = render_study(config, outcome)
    assert "Small &lt;study&gt;" in page and "<study>" not in page
    for words in ("What privacy costs", "Who was trained on?", "0.700 (0.600 to 0.800)", "ε = 8", "No differential privacy", "1 point to go", "16 shadows"):
        assert words in page
    # What is promised stands once, with a sentence for each epsilon; what an attack finds everywhere alike would too.
    assert page.count("by at most a factor of e^8") == page.count("by at most a factor of e^2") == page.count("The unit is one user") == 1
    # Of the two ways to attack the better one is drawn, with chance beside it.
    assert page.count("AUC, epsilon ∞: 0.700") == 1 and "chance, of AUC" in page
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_a_study_is_asked_to_stop_by_a_signal_and_leaves_runs_to_resume(study: StudyConfig, tmp_path: Path):
    begun: list[str] = []
    outcome = run_study(study, tmp_path / "study", on_point=lambda point, news: begun.append(news), should_stop=lambda: bool(begun))
    assert begun[:1] == ["begins"] and begun[1] in ("stopped", "done") and len(begun) == 2
    assert len(outcome.left) >= 5
