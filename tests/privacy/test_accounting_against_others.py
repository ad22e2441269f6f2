"""The accountant held against a numerical integration of its own kind, exact single rounds, and Opacus' PRV bounds."""

from __future__ import annotations

import warnings

import pytest
from oracles.gaussian_privacy import gaussian_epsilon, sampled_gaussian_deltas
from oracles.mixture_losses import many_rounds_epsilon, one_round_deltas, one_round_epsilon

from fedssl.privacy.accounting import epsilon

SETTINGS = [
    (1e-4, 0.7, 2000, 1e-6),
    (1e-3, 0.6, 1000, 1e-7),
    (1e-3, 1.0, 100, 1e-5),
    (5e-3, 0.8, 400, 1e-6),
    (0.01, 0.5, 50, 1e-6),
    (0.01, 1.0, 1000, 1e-5),
    (0.01, 4.0, 2000, 1e-8),
    (0.02, 0.7, 37, 1e-6),
    (0.02, 1.5, 500, 1e-5),
    (0.04, 1.0, 150, 1e-3),
    (0.05, 0.6, 10, 1e-5),
    (0.05, 2.0, 1000, 1e-6),
    (512 / 6040, 1.15, 300, 1e-5),
    (512 / 6040, 3.0, 300, 1e-5),
    (0.1, 0.8, 40, 1e-6),
    (0.1, 6.0, 3000, 1e-7),
    (0.25, 1.5, 60, 1e-5),
    (0.25, 3.0, 60, 1e-5),
    (0.25, 12.0, 900, 1e-4),
    (0.3, 20.0, 500, 1e-8),
    (0.4, 2.0, 7, 1e-6),
    (0.5, 2.0, 200, 1e-3),
    (0.5, 4.0, 100, 1e-6),
    (0.5, 1.0, 2, 1e-5),
    (0.75, 5.0, 90, 1e-5),
    (0.9, 5.0, 50, 1e-5),
    (0.9, 1.0, 2, 1e-4),
    (1.0, 6.0, 100, 1e-5),
    (1.0, 10.0, 100, 1e-5),
    (1.0, 2.0, 3, 1e-6),
]


def test_there_are_thirty_settings():
    assert len(set(SETTINGS)) == 30


@pytest.mark.parametrize(("q", "z", "rounds", "delta"), SETTINGS)
def test_many_rounds_are_within_a_hundredth_of_the_independent_integration(q: float, z: float, rounds: int, delta: float):
    ours = epsilon([(q, z, rounds)], delta)
    assert ours == pytest.approx(many_rounds_epsilon(q, z, rounds, delta), abs=1e-2)
    if q == 1:
        assert -1e-9 < ours - gaussian_epsilon(z, rounds, delta) < 1e-2


@pytest.mark.parametrize(("q", "z", "delta"), [(q, z, delta) for q, z, _, delta in SETTINGS])
def test_one_round_is_exact_and_never_below(q: float, z: float, delta: float):
    exact = one_round_epsilon(q, z, delta)
    assert -1e-9 < epsilon([(q, z, 1)], delta) - exact < 1e-3


@pytest.mark.parametrize(("q", "z"), [(0.01, 0.7), (0.3, 2.0), (0.9, 1.0)])
def test_the_exact_round_is_the_plain_integral_in_both_directions(q: float, z: float):
    for at in (0.0, 0.05, 0.5, 1.5):
        assert one_round_deltas(at, q, z) == pytest.approx(sampled_gaussian_deltas(at, q, z), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    ("q", "z", "rounds", "delta"),
    [(0.01, 1.0, 1000, 1e-5), (0.02, 1.5, 500, 1e-5), (0.085, 1.15, 300, 1e-5), (0.25, 1.5, 60, 1e-5), (0.5, 4.0, 100, 1e-6)],
)
def test_it_lies_between_opacus_prv_bounds(q: float, z: float, rounds: int, delta: float):
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(z, q, rounds)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = accountant._get_dprv(eps_error=2e-3, delta_error=delta * 1e-3)
        below, _, above = losses.compute_epsilon(delta, delta * 1e-3, 2e-3)
    assert above - below < 0.01
    assert below <= epsilon([(q, z, rounds)], delta) <= above
