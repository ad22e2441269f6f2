"""The audit comes close to honest claims, never exceeds them, and refutes each planted mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fedssl_simulations.attacks import audit as audits
from fedssl_simulations.attacks.audit import EVERYBODY, FALLS_BACK, SAMPLED, Scenario, audit, found_of
from fedssl_simulations.attacks.canaries import WINDOW, canary_histories
from fedssl_simulations.attacks.mistakes import MISTAKES, Mistake, planted

from fedssl.client_round import Shard, client_round
from fedssl.config import PrivacyConfig
from fedssl.parts import initial_weights
from fedssl.privacy.keys import Keys
from fedssl.privacy.ledger import Ledger
from fedssl.recipe import make_recipe
from fedssl.records import Address, Download
from fedssl.weights import to_numpy

FEW = 20_000


def keys(number: int) -> Keys:
    return Keys(cohort=bytes([number]) * 32, noise=bytes([number + 100]) * 32)


def test_a_canary_moves_its_own_coordinate_alone_as_far_as_the_clip_lets_it():
    config = audits._config(EVERYBODY, 10, 1e-5)
    canaries = np.array([2, 7])
    for clip_norm, length in ((None, WINDOW), (1.0, 1.0)):
        recipe = make_recipe(config.model_copy(update={"privacy": PrivacyConfig(clip_norm=clip_norm)}), num_items=10, catalogue="canaries")
        shard = Shard(canary_histories(canaries), canaries)
        upload = client_round(Download(Address("a", "training", 1), recipe, to_numpy(initial_weights(recipe))), shard)
        update_P = np.asarray(upload.sums["update"])
        assert np.flatnonzero(update_P).tolist() == [1 + 3, 1 + 8]  # one unused weight, row 0, then canary c in row c + 1
        step = recipe.local.grid_step if clip_norm is None else 2.0**-24
        assert update_P[[4, 9]] * step == pytest.approx([length, length], rel=1e-4)


def test_where_all_take_part_the_bound_reaches_most_of_the_claim_and_stays_below_it(tmp_path: Path):
    found = audit(EVERYBODY, tmp_path / "a", keys=keys(1))
    assert 0.85 * found.claimed <= found.at_least <= found.claimed
    assert found.seconds < 60
    assert found.claimed == pytest.approx(4.0, abs=0.01)


@pytest.mark.parametrize(("scenario", "runs"), [(EVERYBODY, 20), (SAMPLED, 2), (FALLS_BACK, 2)], ids=lambda value: getattr(value, "name", ""))
def test_honest_runs_are_never_refuted(scenario: Scenario, runs: int, tmp_path: Path):
    found = [audit(scenario, tmp_path / str(number), canaries=FEW // 2, seed=number, keys=keys(number)) for number in range(runs)]
    assert not any(one.is_refuted for one in found)
    assert len({one.named_in for one in found}) > 1


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_is_found(mistake: Mistake, tmp_path: Path):
    with planted(mistake):
        found = audit(mistake.scenario, tmp_path / "a", canaries=2 * FEW, keys=keys(7))
    assert found.at_least > found.claimed


def test_a_mistake_is_taken_out_again():
    from fedssl.privacy.plan import Plan

    shipped = Plan.noise_std_in_steps
    half = next(mistake for mistake in MISTAKES if mistake.name == "half the noise")
    with planted(half):
        assert Plan.noise_std_in_steps is half.wrong
    assert Plan.noise_std_in_steps is shipped


def test_a_round_that_is_released_again_is_charged_again(tmp_path: Path):
    found = audit(FALLS_BACK, tmp_path / "a", canaries=4000, keys=keys(3))
    assert Ledger(tmp_path / "a" / "ledger.jsonl").charged() == {"training": FALLS_BACK.releases}
    assert found.claimed == pytest.approx(FALLS_BACK.epsilon, abs=0.01)


def test_the_table_has_a_row_a_kind_and_states_each_claim(tmp_path: Path):
    done = [audit(SAMPLED, tmp_path / str(number), canaries=2000, seed=number) for number in range(2)]
    found = found_of([("two", done)])
    assert [row["refuted"] for row in found.rows] == ["0 of 2"]
    for word in ("unit: user", "add/remove one user", "trust: central", "rate 0.05", "PLD", "delta 1e-05"):
        assert word in found.notes[-1]
