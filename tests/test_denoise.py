"""Denoising against numerical integration, and against tables whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad

from fedssl.config import CountsConfig
from fedssl.denoise import _exponential, denoise, denoise_popularity, empirical_bayes, project, returns


@settings(max_examples=60, deadline=None)
@given(value=st.floats(-6.0, 20.0), mean=st.floats(0.05, 10.0), noise=st.floats(0.3, 3.0))
def test_the_posterior_of_an_exponential_number_is_that_of_an_integral(value: float, mean: float, noise: float):
    def density(truth: float, power: int) -> float:
        return float(truth**power * np.exp(-truth / mean - 0.5 * ((value - truth) / noise) ** 2) / (mean * noise * np.sqrt(2 * np.pi)))

    middle = max(value - noise**2 / mean, 0.0)
    ends = (max(middle - 12 * noise, 0.0), middle + 12 * noise)
    points = [middle] if ends[0] < middle else None
    mass, first = (quad(density, *ends, args=(power,), epsabs=0.0, epsrel=1e-9, limit=200, points=points)[0] for power in (0, 1))
    likely, expected = (float(found[0]) for found in _exponential(torch.tensor([value]).double(), torch.tensor([mean]).double(), noise))
    assert likely == pytest.approx(np.log(mass), abs=2e-3)
    assert expected == pytest.approx(first / mass, rel=5e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e3])
def test_no_cell_is_nan_or_negative_however_small_its_prior_and_however_far_its_value(scale: float):
    values = torch.linspace(-50, 200, 101)
    for kind in (torch.float32, torch.float64):
        likely, expected = _exponential(values.to(kind), torch.full_like(values, scale).to(kind), 1.0)
        assert bool(likely.isfinite().all()) and bool(expected.isfinite().all()) and float(expected.min()) >= 0
        assert bool((expected.diff() > -1e-4 * expected[1:].clamp(min=1e-6)).all()), "a larger value means a larger cell"


def world(items: int = 80, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float32]]:
    """True counts, shares and features: items of one of two kinds follow their own kind four times as often."""
    chance = np.random.default_rng(seed)
    share = chance.pareto(1.5, items) + 0.2
    share /= share.sum()
    kind = chance.integers(0, 2, items)
    lift = np.where(kind[:, None] == kind[None], 1.6, 0.4)
    return (20_000 * share[:, None] * share * lift).astype(np.float32), share, np.stack([np.ones(items), kind == 1], 1).astype(np.float32)


def noised(truth: NDArray[np.float32], noise: float, seed: int = 1) -> NDArray[np.float32]:
    return (truth + noise * np.random.default_rng(seed).standard_normal(truth.shape)).astype(np.float32)


def test_empirical_bayes_comes_closer_than_the_noisy_cells_and_than_their_prior():
    truth, share, _ = world()
    prior = (20_000 * np.outer(share, share)).astype(np.float32)
    noisy = noised(truth, 3.0)
    found = empirical_bayes(noisy, prior, 3.0)
    error = {name: float(((table - truth) ** 2).sum()) for name, table in {"noisy": noisy, "prior": prior, "found": found}.items()}
    assert error["found"] < 0.7 * error["noisy"] and error["found"] < 0.7 * error["prior"]


def test_without_much_noise_the_cells_are_what_they_were():
    truth, share, _ = world()
    found = empirical_bayes(noised(truth, 1e-3), np.full_like(truth, truth.mean()), 1e-3)
    assert np.abs(found - truth).max() < 0.02


def test_a_projection_keeps_what_features_can_say_and_little_of_the_noise():
    truth, share, features = world()
    clean = project(truth, share, features)
    assert np.abs(clean - truth).max() < 1e-2
    noisy = project(noised(truth, 3.0), share, features)
    # 2^2 of 80^2 directions of the noise are left.
    assert np.sqrt(((noisy - truth) ** 2).sum()) < 3.0 * np.sqrt(4) * 2.5


def test_features_come_closer_to_the_true_lifts_than_independence_does():
    truth, share, features = world()
    config, rows, popularity = CountsConfig(scale=5.0), np.arange(1, 81), np.pad(share * 3000, (1, 0)).astype(np.float32)
    true_lift = np.log(truth / truth.sum() / np.outer(share, share))
    error = []
    for known in (features, np.ones((80, 1), dtype=np.float32)):
        table = denoise(noised(truth, 8.0), popularity, rows, known, config, noise=8.0, popularity_noise=1.0)
        error.append(float((((table.lift - true_lift) ** 2) * np.outer(share, share))[~np.eye(80, dtype=bool)].sum()))
    assert error[0] < 0.75 * error[1]


def test_the_table_is_finite_and_its_shares_add_up_even_where_all_is_noise():
    chance = np.random.default_rng(3)
    counts, popularity = (100 * chance.standard_normal(shape).astype(np.float32) for shape in ((6, 6), (10,)))
    table = denoise(counts, popularity, np.array([1, 2, 4, 5, 7, 9]), np.ones((9, 1), dtype=np.float32), CountsConfig(), noise=100.0, popularity_noise=100.0)
    assert all(np.isfinite(array).all() for array in vars(table).values())
    assert np.exp(table.log_popularity[1:].astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)
    assert table.lift.shape == (6, 6) and (np.diag(table.lift) == 0).all()


def test_popular_items_stay_and_unpopular_ones_are_drawn_to_the_average():
    truth = np.array([200.0, 100.0, *[1.0] * 200])
    found = denoise_popularity(noised(truth.astype(np.float32), 5.0), 5.0) * truth.sum()
    assert found[0] == pytest.approx(200, rel=0.25) and found[0] / found[1] == pytest.approx(2.0, rel=0.15)
    assert found[2:].max() < 12 and found.min() > 0


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0.0, 0.1), (1.0, 0.9, 1.1), (3.0, 2.8, 3.2)])
def test_how_often_people_come_back_is_read_off_the_diagonal(rate: float, low: float, high: float):
    _, share, _ = world()
    independent: Any = (20_000 * np.outer(share, share)).astype(np.float32)
    counts = noised(independent + np.diag(np.diag(independent) * (rate - 1)), 3.0)
    assert low <= returns(counts, independent, 3.0) <= high


def test_where_noise_hides_the_diagonal_a_return_is_as_likely_as_anything():
    independent = np.full((5, 5), 1e-4, dtype=np.float32)
    assert returns(noised(independent, 3.0), independent, 3.0) == pytest.approx(1.0, abs=0.01)
