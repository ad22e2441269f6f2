"""Membership: the ratio tells members where there is something to tell, and an interrupted attack goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fedssl_simulations.attacks import membership
from fedssl_simulations.attacks.membership import area_under_curve, attack_membership, confidences, draw_members, likelihood_ratios, true_positives
from fedssl_simulations.attacks.result import Figure
from small import PLAN, dataset_of, small_config, small_dataset

from fedssl.errors import ConfigError, RunFolderError


def test_every_user_is_in_half_of_the_runs_and_every_run_has_half_of_the_users():
    member_RU = draw_members(6, 50, seed=1)
    assert (member_RU.sum(0) == 3).all()
    assert (member_RU.sum(1) == 25).all()
    assert len({row.tobytes() for row in member_RU}) == 6


def test_area_and_true_positives_by_hand():
    score, is_member = np.array([4.0, 1.0, 2.0, 2.0, 0.0]), np.array([True, True, True, False, False])
    # Against the others 2 and 0: 4 beats both, 1 beats one, 2 beats one and ties one.
    assert area_under_curve(score, is_member) == pytest.approx((2 + 1 + 1.5) / 6)
    assert true_positives(score, is_member, false_alarms=0.0) == pytest.approx(1 / 3)
    assert true_positives(score, is_member, false_alarms=0.5) == pytest.approx(1.0)


def test_the_ratio_finds_members_that_confidence_alone_does_not():
    rng = np.random.default_rng(0)
    member_RU = draw_members(16, 300, seed=0)
    # Users differ far more from one another than by taking part.
    confidence_RU = rng.normal(0, 5, 300) + 1.0 * member_RU + rng.normal(0, 0.5, member_RU.shape)
    ratio_RU = likelihood_ratios(confidence_RU, member_RU)
    assert area_under_curve(confidence_RU.ravel(), member_RU.ravel()) < 0.6
    assert area_under_curve(ratio_RU.ravel(), member_RU.ravel()) == pytest.approx(math.erf(1.0) / 2 + 0.5, abs=0.03)


def test_where_taking_part_changes_nothing_the_ratio_is_a_guess():
    member_RU = draw_members(16, 3000, seed=0)
    ratio_RU = likelihood_ratios(np.random.default_rng(0).normal(size=member_RU.shape), member_RU)
    assert area_under_curve(ratio_RU.ravel(), member_RU.ravel()) == pytest.approx(0.5, abs=0.015)


def test_a_run_is_judged_by_the_others_alone():
    member_RU = draw_members(8, 20, seed=0)
    confidence_RU = np.random.default_rng(0).normal(size=(8, 20))
    other_labels = member_RU.copy()
    other_labels[0] = ~other_labels[0]
    assert (likelihood_ratios(confidence_RU, member_RU)[0] == likelihood_ratios(confidence_RU, other_labels)[0]).all()


def test_confidence_is_the_mean_of_log_odds_by_hand():
    histories = dataset_of([1, 2, 3, 1, 2], [3], num_items=3).histories
    score = torch.tensor([[0.0, 1.0, 2.0, 4.0]])

    def model(past: list[np.ndarray], users: np.ndarray) -> dict[str, torch.Tensor]:
        return {"score": score.expand(len(past), -1)}

    def odds(own: float, *others: float) -> float:
        return own - math.log(sum(map(math.exp, others)))

    # Training is 1 2 3: asked about 2 and 3.
    expected = (odds(2, 1, 4) + odds(4, 1, 2)) / 2
    assert confidences(model, histories) == pytest.approx([expected, 0.0])  # type: ignore[arg-type]


def test_an_attack_goes_on_with_the_runs_that_are_there(tmp_path: Path):
    config, dataset = small_config(), small_dataset()
    first = attack_membership(config, dataset, tmp_path / "a", shadows=4)
    (tmp_path / "a" / "shadow-02" / "confidence.npy").unlink()
    (tmp_path / "a" / "shadow-03" / "confidence.npy").unlink()
    (tmp_path / "a" / "shadow-03" / "report.json").unlink()
    kept = (tmp_path / "a" / "shadow-01" / "confidence.npy").stat().st_mtime_ns
    again = attack_membership(config, dataset, tmp_path / "a", shadows=4)
    assert first is not None
    assert again is not None
    assert again.as_json() == first.as_json()
    assert (tmp_path / "a" / "shadow-01" / "confidence.npy").stat().st_mtime_ns == kept
    for row in again.rows:
        assert isinstance(row["auc"], Figure)
        assert 0 <= row["auc"].low <= row["auc"].value <= row["auc"].high <= 1


@pytest.mark.parametrize("processes", [1, 2])
def test_an_attack_that_is_stopped_leaves_what_it_has(processes: int, tmp_path: Path):
    there: list[int] = []
    stopped = attack_membership(
        small_config(), small_dataset(), tmp_path / "a", shadows=6, processes=processes, on_done=there.append, should_stop=lambda: bool(there)
    )
    assert stopped is None
    assert 1 <= len(there) < 6
    assert {path.parent.name for path in (tmp_path / "a").glob("*/confidence.npy")} == {f"shadow-{number:02d}" for number in there}


def test_runs_of_other_settings_are_refused(tmp_path: Path):
    attack_membership(small_config(), small_dataset(), tmp_path / "a", shadows=4)
    with pytest.raises(RunFolderError, match="other settings or data"):
        attack_membership(small_config({"server": {"lr": 0.02}}), small_dataset(), tmp_path / "a", shadows=4)
    with pytest.raises(ConfigError, match="even number"):
        attack_membership(small_config(), small_dataset(), tmp_path / "b", shadows=5)


def test_under_a_plan_the_promise_stands_beside_the_attack(tmp_path: Path):
    found = attack_membership(small_config(PLAN, {"server": {"cohort": 6}}), small_dataset(), tmp_path / "a", shadows=4)
    assert found is not None
    report = json.loads((tmp_path / "a" / "shadow-00" / "report.json").read_text())
    assert found.about["privacy"] == report["privacy"]
    assert any("unit: user" in note and "Poisson" in note for note in found.notes)
    assert "at most" in found.notes[-1]
    assert membership.FALSE_ALARMS == 0.01
