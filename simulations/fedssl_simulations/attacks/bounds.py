"""Bounds that hold with a stated confidence: of a rate from counts, of epsilon from an attacker's rates."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, norm

from fedssl.privacy.accounting import gaussian_epsilon


def at_least(hits: int, trials: int, confidence: float) -> float:
    """A lower bound of the rate behind ``hits`` of ``trials``, one-sided, exact (Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404)."""
    return float(beta.ppf(1 - confidence, hits, trials - hits + 1)) if hits else 0.0


def at_most(hits: int, trials: int, confidence: float) -> float:
    """An upper bound of the rate behind ``hits`` of ``trials``, one-sided, exact."""
    return float(beta.ppf(confidence, hits + 1, trials - hits)) if hits < trials else 1.0


def gaussian_epsilon_at_least(named_in: int, members: int, named_out: int, others: int, *, delta: float, confidence: float) -> float:
    """A lower bound of epsilon, were the releases one Gaussian: no other Gaussian names so many members and so few others.

    ``named_in`` of ``members`` users who took part were named, and ``named_out`` of ``others`` who did not. Both rates are bounded, each
    with half of the doubt. Source: Nasr et al. 2023, https://arxiv.org/abs/2302.07956, section 4 (bounds by the trade-off of the Gaussian).
    """
    each = 1 - (1 - confidence) / 2
    hit, alarm = at_least(named_in, members, each), at_most(named_out, others, each)
    return gaussian_epsilon(float(1 / (norm.ppf(hit) - norm.ppf(alarm))), 1, delta) if hit > alarm else 0.0


def epsilon_at_least(named_in: int, members: int, named_out: int, others: int, *, delta: float, confidence: float) -> float:
    """A lower bound of epsilon for releases of any kind: under (epsilon, delta) an attacker's hits are at most e^epsilon alarms + delta.

    Arguments as above. Source: Kairouz et al. 2015, https://arxiv.org/abs/1311.0776, theorem 2.1.
    """
    each = 1 - (1 - confidence) / 2
    hit, alarm = at_least(named_in, members, each), at_most(named_out, others, each)
    return max(math.log((hit - delta) / alarm), 0.0) if hit > delta else 0.0


def bootstrap(values_N: NDArray[np.float64], *, confidence: float = 0.95, seed: int = 0, repeats: int = 2000) -> tuple[float, float]:
    """An interval of the mean of ``values_N``, by drawing them again with replacement (Efron 1979). Percentiles of ``repeats`` means."""
    rng = np.random.default_rng(seed)
    means = np.array([values_N[rng.integers(0, len(values_N), len(values_N))].mean() for _ in range(repeats)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
