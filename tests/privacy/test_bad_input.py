"""Impossible promises: each is one clear line and exit code 1, with nothing trained, nothing charged and no key made."""

from __future__ import annotations

from pathlib import Path

import pytest
from fedssl_simulations.cli import main
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import write_run
from small import KEYS, PLAN, small_config, small_dataset

from fedssl.data.readers import write_lines
from fedssl.data.synthetic import synthesize


@pytest.fixture(scope="module")
def run_toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-input")
    write_lines(synthesize(users=24, items=80, seed=3, mean_events=8.0), folder / "histories.txt")
    write_run(small_config(PLAN, {"data": {"path": str(folder / "histories.txt"), "min_events": 1}}), folder / "run.toml")
    return folder / "run.toml"


NOISE_GONE = "privacy.noise_multiplier=0"
IMPOSSIBLE: dict[str, tuple[list[str], str]] = {
    "epsilon 0": ([NOISE_GONE, "privacy.epsilon=0"], "epsilon = 0: input should be greater than 0"),
    "epsilon below 0": ([NOISE_GONE, "privacy.epsilon=-1"], "epsilon = -1: input should be greater than 0"),
    "an epsilon that is no number": ([NOISE_GONE, "privacy.epsilon=nan"], "epsilon = nan: input should be"),
    "an infinite epsilon": ([NOISE_GONE, "privacy.epsilon=inf"], "epsilon = inf: input should be"),
    "a target and noise": (["privacy.epsilon=2"], "epsilon and noise_multiplier are both given"),
    "delta 0": (["privacy.delta=0"], "delta = 0: input should be greater than 0"),
    "delta above a hundredth": (["privacy.delta=0.02"], "delta = 0.02: input should be less than or equal to 0.01"),
    "clip 0": (["privacy.clip_norm=0"], "clip_norm = 0: input should be greater than or equal to 0.000000000001"),
    "an infinite clip": (["privacy.clip_norm=inf"], "clip_norm = inf: input should be"),
    "noise without a clip": (["privacy.clip_norm=none"], "noise without a clip promises nothing; set clip_norm"),
    "a target without a clip": ([NOISE_GONE, "privacy.epsilon=2", "privacy.clip_norm=none"], "noise without a clip promises nothing; set clip_norm"),
    "an adaptive clip that begins nowhere": ([NOISE_GONE, "privacy.clip=adaptive", "privacy.clip_norm=none"], "needs a clip for the first round"),
    "counts in blocks": (["counts.clip_norm=1", "counts.blocks=4"], "[counts] blocks = 4 would ask everybody as often; under a plan counts are released once"),
    "counts without a clip": (["counts.lags=2", "privacy.counts_noise_multiplier=1"], "[counts] has no clip_norm; under a plan every sum needs one"),
    "counts without noise": (["counts.clip_norm=1"], "counts_noise_multiplier is 0 while [counts] is on"),
    "a cohort that everybody knows": (["server.sampling=passes"], "under a plan set sampling = 'poisson'"),
    "a goal count": (["server.goal=5"], "[server] has no key 'goal'"),
    "unequal weights": (["server.weighting=positions"], "under a plan set weighting = 'equal'"),
    "a cohort of more than there are": (["server.cohort=25"], "cohort = 25 is more than the 24 users there are"),
    "an early stop by private events": (["evaluation.patience=2", "evaluation.every=1"], "under a plan set patience = 0"),
    "a fleet of fewer than there are": (["privacy.fleet_users=23"], "fewer than the 24 users at hand"),
    "local noise and a cohort by coins": (["privacy.mode=local"], "under privacy.mode = 'local' set sampling = 'passes'"),
    "local noise on counts": (["privacy.mode=local", "server.sampling=passes", "counts.clip_norm=1"], "would be a whole matrix of noise from every user"),
    "local noise of a fleet": (["privacy.mode=local", "server.sampling=passes", "privacy.fleet_users=1000"], "every user adds their own"),
    "a fleet without an epsilon": ([NOISE_GONE, "privacy.fleet_users=1000"], "asks what an epsilon would cost a fleet, and there is none"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_it_is_one_clear_line_and_nothing_is_trained_or_charged(
    name: str, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    overrides, words = IMPOSSIBLE[name]
    monkeypatch.setattr("sys.argv", ["fedssl", "simulate", str(run_toml), "--out", str(tmp_path / "run"), *(f"--set={one}" for one in overrides)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert left.value.code == 1
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert words in said.err
    assert said.out == ""
    assert not list(tmp_path.rglob("ledger.jsonl")) and not list(tmp_path.rglob("*.key")) and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("delta", "is_warned"), [(0.005, True), (0.004, False)])
def test_delta_from_one_over_the_users_on_is_warned_about(delta: float, is_warned: bool, tmp_path: Path):
    config = small_config(PLAN, {"privacy": {"delta": delta}, "server": {"rounds": 1}})
    run = simulate(config, out=tmp_path / "run", dataset=small_dataset(users=200), keys=KEYS)
    found = run.report["privacy"]["warnings"]
    assert found == (["delta 0.005 is not below 1 / users (0.005): it allows a mechanism that gives one user away entirely."] if is_warned else [])
