import math
import time

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.gaussian_privacy import gaussian_delta, gaussian_epsilon, mixture_deltas, mixture_epsilon, sampled_gaussian_deltas

from fedssl.errors import ConfigError
from fedssl.privacy.accounting import GRID, _one_round, combined_noise, epsilon, event_epsilon, solve_noise, windows_epsilon


@pytest.mark.parametrize(
    ("q", "z", "rounds", "delta", "known"),
    [
        (512 / 6040, 1.15, 300, 1e-5, 8.01),
        (1.0, 6.0, 100, 1e-5, 8.00),
        (0.01, 1.0, 1000, 1e-5, 1.828),
        (0.02, 1.5, 500, 1e-5, 1.370),
        (1e-4, 0.7, 2000, 1e-6, 0.096),
        (0.5, 2.0, 200, 1e-3, 17.39),
        (0.001, 1.0, 100, 1e-5, 0.056),
        (1.0, 1.0, 100, 1e-5, 91.8),
    ],
)
def test_epsilon_is_that_of_published_settings(q: float, z: float, rounds: int, delta: float, known: float):
    assert epsilon([(q, z, rounds)], delta) == pytest.approx(known, abs=0.0051 if known < 50 else 0.051)


def test_one_cohort_with_two_noises_costs_twice_what_two_cohorts_cost():
    # Why coins are keyed by the attempt: twice the same cohort is one sampled Gaussian of z / sqrt(2).
    assert epsilon([(0.085, 1.15, 2)], 1e-5) == pytest.approx(1.25, abs=0.005)
    assert epsilon([(0.085, 1.15 / 2**0.5, 1)], 1e-5) == pytest.approx(2.44, abs=0.005)


@pytest.mark.parametrize(("z", "n", "delta"), [(0.6003, 1, 1e-5), (1.994, 1, 1e-5), (6.0, 100, 1e-5), (10.0, 100, 1e-5), (30.0, 7, 1e-6), (3.0, 20, 1e-9)])
def test_without_sampling_epsilon_is_the_closed_form_and_never_below_it(z: float, n: int, delta: float):
    exact = gaussian_epsilon(z, n, delta)
    assert -1e-9 < epsilon([(1.0, z, n)], delta) - exact < 1e-3


@pytest.mark.parametrize(("q", "z"), [(0.01, 0.7), (0.3, 2.0), (0.9, 1.0)])
def test_one_sampled_round_is_the_integral_of_the_mixture_in_both_directions(q: float, z: float):
    for at in (0.0, 0.05, 0.5, 1.5):
        removed, added = sampled_gaussian_deltas(at, q, z)
        for losses, exact in zip(_one_round(q, z), (removed, added), strict=True):
            assert losses.delta_at(round(at / GRID)) == pytest.approx(exact, rel=2e-4, abs=1e-9)
        if removed > 1e-12:
            assert epsilon([(q, z, 1)], removed) == pytest.approx(at, abs=2e-4)


@pytest.mark.parametrize(("q", "z", "n", "delta"), [(0.085, 1.15, 300, 1e-5), (0.02, 0.7, 37, 1e-6), (0.01, 4.0, 2000, 1e-8)])
def test_composition_here_is_composition_in_the_library(q: float, z: float, n: int, delta: float):
    made = privacy_loss_distribution.from_gaussian_mechanism(standard_deviation=z, sampling_prob=q, value_discretization_interval=GRID)
    assert epsilon([(q, z, n)], delta) == pytest.approx(made.self_compose(n).get_epsilon_for_delta(delta), abs=1e-6)


def test_phases_compose_as_in_the_library():
    counts = privacy_loss_distribution.from_gaussian_mechanism(standard_deviation=1.1, value_discretization_interval=GRID)
    rounds = privacy_loss_distribution.from_gaussian_mechanism(standard_deviation=2.0, sampling_prob=0.1, value_discretization_interval=GRID)
    both = counts.compose(rounds.self_compose(50))
    assert epsilon([(1.0, 1.1, 1), (0.1, 2.0, 50)], 1e-5) == pytest.approx(both.get_epsilon_for_delta(1e-5), abs=1e-6)


def test_phases_without_sampling_compose_to_one_gaussian():
    z = (1 / 3.0**2 + 4 / 5.0**2) ** -0.5
    assert epsilon([(1.0, 3.0, 1), (1.0, 5.0, 4)], 1e-5) == pytest.approx(gaussian_epsilon(z, 1, 1e-5), abs=1e-3)


def test_delta_below_the_lowest_loss_is_that_of_the_gaussian():
    losses, _ = _one_round(1.0, 4.0)
    for at in (-5.0, -2.5, 0.0, 1.0, 9.0):
        assert losses.delta_at(round(at / GRID)) == pytest.approx(gaussian_delta(at, 4.0, 1), abs=1e-6)


def test_sums_of_one_exchange_are_one_gaussian():
    assert combined_noise([3.0, 4.0]) == pytest.approx(2.4)
    assert combined_noise([1.5]) == pytest.approx(1.5)
    assert combined_noise([3.0, 0.0]) == 0.0


def test_nothing_released_costs_nothing_and_no_noise_costs_infinity():
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([(0.1, 1.0, 0), (0.1, 0.0, 0)], 1e-5) == 0.0
    assert epsilon([(0.1, 1.0, 3), (0.1, 0.0, 1)], 1e-5) == math.inf


def test_next_to_no_noise_is_accounted_at_once():
    began = time.perf_counter()
    assert epsilon([(1.0, 0.001, 1), (1.0, 2.0, 1)], 1e-5) == pytest.approx(gaussian_epsilon(combined_noise([0.001, 2.0]), 1, 1e-5), rel=1e-8)
    assert epsilon([(0.1, 0.001, 1000)], 1e-5) == pytest.approx(gaussian_epsilon(0.001, 1000, 1e-5), rel=1e-8)
    assert epsilon([(1.0, 0.5, 1000)], 1e-5) == pytest.approx(gaussian_epsilon(0.5, 1000, 1e-5), rel=1e-8)
    assert time.perf_counter() - began < 1


def test_the_same_event_said_in_two_parts_costs_the_same():
    assert epsilon([(0.1, 1.0, 3), (0.1, 1.0, 4)], 1e-5) == epsilon([(0.1, 1.0, 7)], 1e-5)


@pytest.mark.parametrize("event", [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.1, -1.0, 1), (0.1, 1.0, -1), (float("nan"), 1.0, 1), (0.1, float("nan"), 1)])
def test_an_impossible_event_is_refused(event: tuple[float, float, int]):
    with pytest.raises(ValueError, match="event"):
        epsilon([event], 1e-5)


@settings(max_examples=10, deadline=None)
@given(q=st.sampled_from([0.01, 0.2, 1.0]), z=st.sampled_from([0.8, 2.0, 5.0]), n=st.integers(0, 400), more=st.integers(1, 50))
def test_more_attempts_never_cost_less(q: float, z: float, n: int, more: int):
    assert epsilon([(q, z, n)], 1e-5) <= epsilon([(q, z, n + more)], 1e-5) + 1e-9


@settings(max_examples=4, deadline=None)
@given(q=st.floats(0.005, 1.0), z=st.floats(1.0, 4.0), factor=st.floats(1.01, 2.0), n=st.integers(1, 100))
def test_more_noise_never_costs_more(q: float, z: float, factor: float, n: int):
    assert epsilon([(q, z * factor, n)], 1e-5) <= epsilon([(q, z, n)], 1e-5) + 1e-9


@settings(max_examples=3, deadline=None)
@given(target=st.floats(0.2, 8.0), q=st.floats(0.05, 1.0), n=st.integers(10, 300), counts=st.booleans())
def test_solved_noise_never_overspends_and_a_thousandth_less_would(target: float, q: float, n: int, counts: bool):
    # Counts that take 85 % of the target beside it, as a plan would have them.
    others = ((1.0, solve_noise(target, 1e-5, 1.0, 1) / 0.85**0.5, 1),) if counts else ()
    z = solve_noise(target, 1e-5, q, n, others)
    assert epsilon([(q, z, n), *others], 1e-5) <= target
    assert epsilon([(q, z / 1.001, n), *others], 1e-5) > target


@pytest.mark.parametrize(("target", "exact"), [(8.0, 0.6003), (2.0, 1.994)])
def test_solved_noise_of_one_release_is_that_of_the_closed_form(target: float, exact: float):
    assert solve_noise(target, 1e-5, 1.0, 1) == pytest.approx(exact, rel=1e-3)


def test_a_target_that_others_have_spent_is_refused():
    with pytest.raises(ConfigError, match="already spent"):
        solve_noise(1.0, 1e-5, 0.1, 10, ((1.0, 1.0, 1),))


def test_asking_after_every_round_is_quick():
    epsilon([(0.0848, 1.15, 300)], 1e-5)
    start = time.process_time()
    for n in range(280, 300):
        epsilon([(0.0848, 1.15, n)], 1e-5)
    # 25 ms a query on a quiet core; the library's own composition takes 200.
    assert (time.process_time() - start) / 20 < 0.12


def test_windows_read_one_by_one_are_a_binomial_mixture():
    # Noise .5, rate .05, 5 windows, epsilon 1: delta is .081; were all five read together at that rate, .050.
    assert mixture_deltas(1.0, 0.05, 0.5, np.arange(6.0), np.zeros(6)) == pytest.approx(0.081, abs=5e-4)
    exact = mixture_deltas(1.0, 0.1, 1.5, np.arange(4.0), np.zeros(4))
    assert windows_epsilon(0.1, 1.5, 1, exact, windows=3) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("q", "z", "n", "windows"), [(0.1, 1.0, 20, 1), (0.3, 1.5, 10, 1), (0.2, 2.5, 8, 2), (1.0, 4.0, 3, 2)])
def test_a_replaced_event_is_bounded_by_the_numerical_truth_of_windows_that_point_the_other_way(q: float, z: float, n: int, windows: int):
    # The event's windows push one clip each one way, after the replacement the other way: a binomial mixture either side.
    move = np.arange(windows + 1.0)
    truth = mixture_epsilon(q, z, n, 1e-5, move, -move)
    bound = event_epsilon(q, z, n, 1e-5, windows=windows)
    assert truth - 2e-3 <= bound <= 1.3 * truth
    # Without replacement there is less to see.
    assert windows_epsilon(q, z, n, 1e-5, windows=windows) <= bound


@pytest.mark.parametrize(("q", "z", "n", "windows"), [(0.1, 2.0, 10, 3), (1.0, 5.0, 4, 3)])
def test_several_windows_cost_what_the_numerical_composition_of_their_mixture_costs(q: float, z: float, n: int, windows: int):
    move = np.arange(windows + 1.0)
    truth = max(mixture_epsilon(q, z, n, 1e-5, move, 0 * move), mixture_epsilon(q, z, n, 1e-5, 0 * move, move))
    assert windows_epsilon(q, z, n, 1e-5, windows=windows) == pytest.approx(truth, abs=5e-3)


def test_an_event_in_one_window_that_is_always_read_is_the_gaussian_of_twice_the_clip():
    assert event_epsilon(1.0, 6.0, 10, 1e-5, windows=1) == pytest.approx(gaussian_epsilon(3.0, 10, 1e-5), abs=1e-3)
    assert event_epsilon(0.3, 2.0, 0, 1e-5, windows=1) == 0.0
    # So much is spent that the other bound has no digits left.
    assert event_epsilon(0.25, 0.7, 50, 1e-5, windows=1) <= gaussian_epsilon(0.35, 50, 1e-5) + 1e-6


@pytest.mark.parametrize("asked", [(0.0, 1.0, 1, 1), (1.5, 1.0, 1, 1), (0.1, 1.0, -1, 1), (0.1, 1.0, 1, 0)])
def test_windows_that_cannot_be_are_refused(asked: tuple[float, float, int, int]):
    rate, noise, count, windows = asked
    for bound in (windows_epsilon, event_epsilon):
        with pytest.raises(ValueError, match="wanted at least one window"):
            bound(rate, noise, count, 1e-5, windows=windows)


@pytest.mark.filterwarnings("ignore:Optimal order:UserWarning", "ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(
    ("q", "z", "n", "delta", "rdp", "prv"),
    [(0.01, 1.0, 1000, 1e-5, 2.101, 1.838), (0.02, 1.5, 500, 1e-5, 1.514, 1.380), (1.0, 10.0, 100, 1e-5, 4.729, 4.387)],
)
def test_epsilon_lies_within_opacus_prv_bounds_and_below_its_rdp(q: float, z: float, n: int, delta: float, rdp: float, prv: float):
    dp_sgd = pytest.importorskip("fedssl.privacy.dp_sgd", exc_type=ConfigError, reason="needs opacus: pip install 'fedssl[window-dp]'")
    found = epsilon([(q, z, n)], delta)
    by_prv = dp_sgd.opacus_epsilon([(q, z, n)], delta, bound="prv")
    assert by_prv == pytest.approx(prv, abs=0.006)
    # Its upper bound lies at most .01 above its estimate, and the estimate at most .01 from the truth.
    assert by_prv - 0.03 < found < by_prv + 0.001
    assert dp_sgd.opacus_epsilon([(q, z, n)], delta, bound="rdp") == pytest.approx(rdp, abs=0.006)
    assert found < rdp
    assert dp_sgd.opacus_epsilon([], delta, bound="prv") == 0.0
