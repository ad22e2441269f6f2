"""Bounds hold against scipy's exact test, the accountant and simulated attackers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fedssl_simulations.attacks.bounds import at_least, at_most, bootstrap, epsilon_at_least, gaussian_epsilon_at_least
from hypothesis import given
from hypothesis import strategies as st
from oracles.gaussian_privacy import gaussian_epsilon
from scipy.stats import binomtest, norm


@given(st.integers(0, 50), st.integers(0, 50))
def test_rates_are_bounded_as_the_exact_test_bounds_them(hits: int, misses: int):
    trials = hits + misses + 1
    interval = binomtest(hits, trials).proportion_ci(0.9, "exact")
    assert at_least(hits, trials, 0.95) == pytest.approx(interval.low, abs=1e-9)
    assert at_most(hits, trials, 0.95) == pytest.approx(interval.high, abs=1e-9)


def test_no_hit_and_only_hits_have_a_bound_by_hand():
    # (1 - p)^10 = 0.05, and p^10 = 0.05.
    assert at_most(0, 10, 0.95) == pytest.approx(1 - 0.05**0.1)
    assert at_least(10, 10, 0.95) == pytest.approx(0.05**0.1)
    assert at_least(0, 10, 0.95) == 0.0
    assert at_most(10, 10, 0.95) == 1.0


def test_the_gaussian_bound_is_epsilon_of_the_bounded_rates_distance():
    hit, alarm = at_least(700, 1000, 0.9995), at_most(300, 1000, 0.9995)
    z = 1 / (norm.ppf(hit) - norm.ppf(alarm))
    assert gaussian_epsilon_at_least(700, 1000, 300, 1000, delta=1e-5, confidence=0.999) == pytest.approx(gaussian_epsilon(z, 1, 1e-5), abs=1e-6)


def test_an_attacker_who_guesses_proves_nothing():
    assert gaussian_epsilon_at_least(500, 1000, 500, 1000, delta=1e-5, confidence=0.999) == 0.0
    assert epsilon_at_least(500, 1000, 500, 1000, delta=1e-5, confidence=0.999) == 0.0
    assert gaussian_epsilon_at_least(0, 10, 0, 10, delta=1e-5, confidence=0.999) == 0.0


def test_the_general_bound_is_the_ratio_of_the_bounded_rates():
    hit, alarm = at_least(900, 1000, 0.9995), at_most(10, 1000, 0.9995)
    assert epsilon_at_least(900, 1000, 10, 1000, delta=1e-3, confidence=0.999) == pytest.approx(math.log((hit - 1e-3) / alarm))


def test_bounds_of_gaussian_attacks_stay_below_the_truth_as_often_as_they_say():
    rng, truth = np.random.default_rng(0), gaussian_epsilon(1.0, 1, 1e-5)
    above = 0
    for _ in range(400):
        named_in, named_out = int((rng.normal(1, 1, 500) > 0.5).sum()), int((rng.normal(0, 1, 500) > 0.5).sum())
        above += gaussian_epsilon_at_least(named_in, 500, named_out, 500, delta=1e-5, confidence=0.9) > truth
        assert epsilon_at_least(named_in, 500, named_out, 500, delta=1e-5, confidence=0.999) < truth
    assert above <= 40


def test_a_bootstrapped_interval_is_as_wide_as_the_mean_is_uncertain():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
