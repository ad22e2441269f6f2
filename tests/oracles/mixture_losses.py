"""Epsilon of Poisson-sampled Gaussian rounds without the accountant: exact for one round, and many rounds by adding up losses.

One round releases N(0, z^2) without a user and (1 - q) N(0, z^2) + q N(1, z^2) with them. The ratio of both densities,
1 - q + q e^((2x - 1) / (2 z^2)), grows with x, so delta(epsilon) is a difference of normal probabilities beyond one x: exact.
For many rounds the loss is cut into bins by the normal distribution function, each bin's mass put on its middle, and bins are
convolved by squaring. The middle errs by less than its square, so this is an estimate, and no bound on either side.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.signal import fftconvolve
from scipy.stats import norm

TRIM = 1e-13
"""Mass dropped at either end of a convolution: far below any delta asked for here."""


def one_round_deltas(epsilon: float, q: float, z: float) -> tuple[float, float]:
    """delta when a user is removed, and when one is added; exact."""

    def crossing(ratio: float) -> float:
        """Where the density with the user is ``ratio`` times that without; -inf: everywhere above."""
        return 0.5 + z**2 * math.log((ratio - 1 + q) / q) if ratio > 1 - q else -math.inf

    above, below = crossing(math.exp(epsilon)), crossing(math.exp(-epsilon))
    without, with_user = norm.sf(above / z), norm.sf((above - 1) / z)
    removed = (1 - q) * without + q * with_user - math.exp(epsilon) * without
    without, with_user = norm.cdf(below / z), norm.cdf((below - 1) / z)
    added = without - math.exp(epsilon) * ((1 - q) * without + q * with_user)
    return float(max(removed, 0.0)), float(max(added, 0.0))


def one_round_epsilon(q: float, z: float, delta: float) -> float:
    """The larger of both directions; exact."""
    found = 0.0
    for direction in (0, 1):
        if one_round_deltas(0.0, q, z)[direction] > delta:
            top = 1.0
            while one_round_deltas(top, q, z)[direction] > delta:
                top *= 2
            found = max(found, float(brentq(lambda epsilon, way=direction: one_round_deltas(epsilon, q, z)[way] - delta, 0.0, top, xtol=1e-13)))
    return found


def many_rounds_epsilon(q: float, z: float, rounds: int, delta: float) -> float:
    """The larger of both directions. Bins are narrow beside a round's loss, which is of the size of q."""
    width = min(5e-4, max(q / 50, 1e-5))
    return max(_epsilon(*_power(*_bins(q, z, direction, width), rounds), width, delta) for direction in (0, 1))


def _bins(q: float, z: float, direction: int, width: float) -> tuple[int, NDArray[np.float64]]:
    """Losses of one round: the number of the first bin, and the masses. Bin k reaches from (k - 1/2) to (k + 1/2) widths."""

    def loss(x: float) -> float:
        value = float(np.logaddexp(math.log1p(-q) if q < 1 else -math.inf, math.log(q) + (2 * x - 1) / (2 * z**2)))
        return value if direction == 0 else -value

    ends = sorted((loss(-9.5 * z), loss(1 + 9.5 * z)))
    first, last = math.floor(ends[0] / width), math.ceil(ends[1] / width)
    edges = (np.arange(first, last + 2) - 0.5) * width
    ratio = np.exp(edges if direction == 0 else -edges)
    inside = (ratio - 1 + q) / q
    x = np.where(inside > 0, 0.5 + z**2 * np.log(np.maximum(inside, 1e-300)), -np.inf)
    if direction == 0:
        return first, np.diff((1 - q) * norm.cdf(x / z) + q * norm.cdf((x - 1) / z))
    return first, np.diff(norm.sf(x / z))


def _power(first: int, masses: NDArray[np.float64], rounds: int) -> tuple[int, NDArray[np.float64]]:
    result: tuple[int, NDArray[np.float64]] | None = None
    square = (first, masses)
    while rounds:
        if rounds & 1:
            result = square if result is None else _add(result, square)
        rounds >>= 1
        if rounds:
            square = _add(square, square)
    assert result is not None
    return result


def _add(one: tuple[int, NDArray[np.float64]], other: tuple[int, NDArray[np.float64]]) -> tuple[int, NDArray[np.float64]]:
    masses = np.maximum(fftconvolve(one[1], other[1]), 0.0)
    begin = int(np.searchsorted(np.cumsum(masses), TRIM))
    end = len(masses) - int(np.searchsorted(np.cumsum(masses[::-1]), TRIM))
    return one[0] + other[0] + begin, masses[begin:end]


def _epsilon(first: int, masses: NDArray[np.float64], width: float, delta: float) -> float:
    losses = (first + np.arange(len(masses))) * width

    def excess(epsilon: float) -> float:
        above = losses > epsilon
        return float((masses[above] * -np.expm1(epsilon - losses[above])).sum()) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, float(losses[-1]), xtol=1e-10))
