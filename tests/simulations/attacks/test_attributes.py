"""The probe finds what is linearly there, and nothing where nothing is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fedssl_simulations.attacks.attributes import attack_attributes, logistic_regression, probe, question_of
from fedssl_simulations.attacks.membership import area_under_curve
from fedssl_simulations.attacks.result import Figure
from fedssl_simulations.run import simulate
from scipy.optimize import minimize
from small import small_config, small_dataset

from fedssl.errors import CatalogueMismatch, DataError, RunFolderError


def test_the_regression_minimises_the_penalised_log_loss():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(200, 3)), np.ones((200, 1))], axis=1)
    answer = rng.random(200) < 1 / (1 + np.exp(-(features @ [1.0, -2.0, 0.0, 0.5])))

    def loss(weights: np.ndarray) -> float:
        odds = features @ weights
        return float(np.logaddexp(0, odds).sum() - odds[answer].sum() + 0.5 * (weights[:-1] ** 2).sum())

    best = minimize(loss, np.zeros(4), tol=1e-12).x
    assert logistic_regression(features, answer) == pytest.approx(best, abs=1e-4)


def test_what_can_be_told_apart_completely_still_has_an_answer():
    features = np.array([[-1.0, 1], [-2, 1], [1, 1], [2, 1]])
    weights = logistic_regression(features, np.array([False, False, True, True]))
    assert np.isfinite(weights).all()
    assert weights[0] > 0


def test_the_probe_finds_what_is_there_and_nothing_where_nothing_is():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1000, 5))
    answer = features[:, 2] + 0.1 * rng.normal(size=1000) > 0
    assert area_under_curve(probe(features, answer), answer) > 0.98
    chance = rng.random(1000) < 0.5
    assert area_under_curve(probe(features, chance), chance) == pytest.approx(0.5, abs=0.06)


def test_numbers_are_cut_at_their_median_and_words_at_the_most_frequent():
    dataset = small_dataset(users=5)
    names = list(dataset.histories.names)
    known = {names[0]: {"age": "20", "gender": "F"}, names[1]: {"age": "30", "gender": "F"}, names[2]: {"age": "40", "gender": "M"}}
    dataset = replace(dataset, user_attributes=known)
    age, gender = question_of(dataset, "age"), question_of(dataset, "gender")
    assert (age.name, age.answer_U.tolist()) == ("age above 30", [False, False, True, False, False])
    assert (gender.name, gender.answer_U.tolist()) == ("gender is F", [True, True, False, False, False])
    assert gender.is_known_U.tolist() == [True, True, True, False, False]
    with pytest.raises(DataError, match="no user has the attribute 'zip'; there is age, gender"):
        question_of(dataset, "zip")
    with pytest.raises(DataError, match="same answer"):
        question_of(replace(dataset, user_attributes={names[0]: {"gender": "F"}}), "gender")


def test_a_run_is_probed_beside_an_untrained_encoder(tmp_path: Path):
    dataset = small_dataset(users=60)
    rng = np.random.default_rng(0)
    dataset = replace(dataset, user_attributes={name: {"gender": "FM"[int(rng.random() < 0.5)]} for name in dataset.histories.names})
    simulate(small_config(), out=tmp_path / "open", dataset=dataset)
    found = attack_attributes([tmp_path / "open"], dataset, attributes=["gender"])
    assert [row["model"] for row in found.rows] == ["untrained encoder", "open"]
    for row in found.rows:
        assert isinstance(row["auc"], Figure)
        assert isinstance(row["majority"], float)
        assert row["users"] == 60
        assert row["majority"] >= 0.5
        assert row["auc"].low < row["auc"].value < row["auc"].high
    assert "no noise, so no epsilon is promised" in found.notes[-1]
    with pytest.raises(CatalogueMismatch):
        attack_attributes([tmp_path / "open"], replace(small_dataset(items=44), user_attributes=dataset.user_attributes), attributes=["gender"])
    with pytest.raises(RunFolderError, match="no finished run"):
        attack_attributes([tmp_path], dataset, attributes=["gender"])
