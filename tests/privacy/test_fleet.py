"""`fleet_users`: rate and epsilon of the settings, the noise on a mean that a larger fleet would have, and a label wherever the number stands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fedssl_client.trainer import train
from fedssl_server.serve import serve
from fedssl_simulations.cli import main
from fedssl_simulations.report import write_report
from fedssl_simulations.run import Run, simulate
from fedssl_simulations.run_files import write_run
from small import KEYS, PLAN, recipe_of, small_config, small_dataset

from fedssl.catalogue import write_catalogue
from fedssl.checking import check
from fedssl.client_round import write_shard
from fedssl.config import CountsConfig, PrivacyConfig, RunConfig, ServerConfig
from fedssl.data.interactions import Interactions
from fedssl.data.readers import write_lines
from fedssl.data.synthetic import synthesize
from fedssl.errors import ConfigError, WireError
from fedssl.privacy.plan import Plan, make_plan
from fedssl.records import Address, Download
from fedssl.round_lines import read_lines
from fedssl.wire import to_bytes

FLEET = {"privacy": {"fleet_users": 2_400_000}}


def make_interactions() -> Interactions:
    return synthesize(users=24, items=80, seed=3, mean_events=8.0)


SERVER = ServerConfig(rounds=20, cohort=50, sampling="poisson")


def plan_of(fleet_users: int, delta: float = 1e-7) -> Plan:
    privacy = PrivacyConfig(clip_norm=1.5, noise_multiplier=2.0, counts_noise_multiplier=3.0, delta=delta, fleet_users=fleet_users)
    plan = make_plan(privacy, SERVER, CountsConfig(clip_norm=1.0), 1000)
    assert plan is not None
    return plan


def test_rate_noise_multiplier_and_epsilon_are_kept():
    asked, plain = plan_of(1_000_000), plan_of(0)
    assert asked.phases == plain.phases
    assert asked.promised == plain.promised


@pytest.mark.parametrize(("phase", "name", "clip", "rate"), [("training", "update", 1.5, 0.05), ("counts", "counts", 1.0, 1.0)])
def test_the_noise_on_a_mean_is_that_of_the_fleets_mean(phase: str, name: str, clip: float, rate: float):
    plan = plan_of(1_000_000)
    on_the_mean = plan.noise_std_in_steps(phase, name) * plan.sum(phase, name).step / plan.expected_cohort(phase)
    assert on_the_mean == pytest.approx(plan.sum(phase, name).noise_multiplier * clip / (rate * 1_000_000), rel=1e-12)


def test_a_plan_without_a_fleet_keeps_its_fingerprint_and_one_with_another_has_another():
    assert len({plan_of(0).fingerprint, plan_of(2000).fingerprint, plan_of(3000).fingerprint}) == 3
    assert "fleet_users" not in plan_of(0).statement()


def test_delta_is_held_against_the_fleets_users():
    assert not any("1 / users" in warning for warning in plan_of(1_000_000).warnings())
    assert any("1 / users" in warning for warning in plan_of(20_000_000).warnings())


def test_a_fleet_smaller_than_the_users_at_hand_or_without_a_plan_is_refused():
    with pytest.raises(ConfigError, match="fewer than the 1000 users at hand"):
        plan_of(999)
    with pytest.raises(ConfigError, match="there is none; set epsilon"):
        check(RunConfig, {"privacy": {"clip_norm": 1.0, "fleet_users": 5000}}, where="run.toml")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = small_config(PLAN, FLEET)
    return simulate(config, out=tmp_path_factory.mktemp("fleet") / "run", dataset=small_dataset(), keys=KEYS)


def test_every_file_says_that_it_is_a_question(asked: Run):
    assert [line["fleet_users"] for line in read_lines(asked.folder / "metrics.jsonl")] == [2_400_000] * 2
    stated = json.loads((asked.folder / "report.json").read_text())["privacy"]
    assert stated["fleet_users"] == 2_400_000
    assert "A question, not a promise" in stated["warnings"][0] and "1e+05 times less noise" in stated["warnings"][0]


@pytest.mark.parametrize("public", [True, False])
def test_the_page_says_so_at_the_number_at_the_results_and_in_words(asked: Run, tmp_path: Path, public: bool):
    write_report([asked.folder], tmp_path / "page.html", public=public)
    page = (tmp_path / "page.html").read_text()
    assert "A question, not a promise" in page
    assert "of a fleet, none here: 2,400,000" in page
    assert ("Federated, noise of a fleet of 2,400,000" in page) != public
    assert "epsilon of a fleet of 2,400,000" in page


def test_side_by_side_the_run_is_labelled_too(asked: Run, tmp_path: Path):
    plain = simulate(small_config(PLAN), out=tmp_path / "plain", dataset=small_dataset(), keys=KEYS)
    write_report([asked.folder, plain.folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "run, noise of a fleet of 2,400,000" in page and "plain, noise of a fleet" not in page


def test_the_terminal_says_so_in_progress_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    write_lines(make_interactions(), tmp_path / "histories.txt")
    write_run(small_config(PLAN, FLEET, {"data": {"path": str(tmp_path / "histories.txt"), "min_events": 1}}), tmp_path / "run.toml")
    monkeypatch.setattr("sys.argv", ["fedssl", "simulate", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")])
    monkeypatch.setenv("COLUMNS", "200")
    main()
    said = capsys.readouterr()
    assert "training 2/2 epsilon " in said.err and "of a fleet of 2,400,000" in said.err
    assert "Federated, noise of a fleet of 2,400,000" in said.out
    assert "warning: A question, not a promise" in said.out and "unit: user; neighbours: add/remove one user; trust: central" in said.out


def test_the_users_at_hand_are_said_to_be_promised_nothing_in_the_statement():
    statement = plan_of(1_000_000).statement()
    assert statement["fleet_users"] == 1_000_000
    assert any("a fleet of 1,000,000 users" in warning and "are promised nothing" in warning for warning in statement["warnings"])


def test_a_server_of_real_users_does_not_ask(tmp_path: Path):
    write_run(small_config(PLAN, FLEET), tmp_path / "run.toml")
    write_catalogue(small_dataset().catalogue, tmp_path / "catalogue.jsonl")
    with pytest.raises(ConfigError, match="a question for a simulation"):
        serve(None, {1: np.arange(24)}, tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "ledger.jsonl").exists() and not (tmp_path / "secrets").exists()


def test_a_node_does_not_answer(tmp_path: Path):
    write_shard(tmp_path / "node", small_dataset().histories, np.arange(2))
    recipe = recipe_of(small_config(PLAN, FLEET), small_dataset())
    with pytest.raises(WireError, match="only a simulation may ask"):
        train(to_bytes(Download(Address("run", "training", 1), recipe, {})), str(tmp_path / "node"))
