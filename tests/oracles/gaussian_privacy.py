"""Epsilon without distributions on a grid: the Gaussian's closed form, and one sampled round by plain integration."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, norm


def gaussian_delta(epsilon: float, z: float, n: int) -> float:
    """Balle and Wang 2018, https://arxiv.org/abs/1805.06530, theorem 8, for n releases: one Gaussian of mu = sqrt(n) / z."""
    mu = math.sqrt(n) / z
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)))


def gaussian_epsilon(z: float, n: int, delta: float) -> float:
    if gaussian_delta(0.0, z, n) <= delta:
        return 0.0
    top = 1.0
    while gaussian_delta(top, z, n) > delta:
        top *= 2
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, z, n) - delta, 0.0, top, xtol=1e-12))


def sampled_gaussian_deltas(epsilon: float, q: float, z: float) -> tuple[float, float]:
    """delta of one Poisson-sampled round when a user is removed, and when added: integrals of [P - e^epsilon Q] where positive."""
    x = np.linspace(-14 * z, 1 + 14 * z, 400_001)
    without = norm.pdf(x, 0, z)
    with_user = (1 - q) * without + q * norm.pdf(x, 1, z)
    removed = np.trapezoid(np.maximum(with_user - math.exp(epsilon) * without, 0), x)
    added = np.trapezoid(np.maximum(without - math.exp(epsilon) * with_user, 0), x)
    return float(removed), float(added)


def mixture_deltas(epsilon: float, q: float, z: float, left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """delta(epsilon) of one step: mixtures of normals at ``left`` against ``right``, with the chances of a binomial of rate q."""
    p, r = _mixtures(q, z, left, right)
    return float(np.maximum(p - math.exp(epsilon) * r, 0).sum())


def mixture_epsilon(q: float, z: float, n: int, delta: float, left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Epsilon of n such steps: losses on a grid of 1e-3, rounded to the nearest, composed by a transform."""
    p, r = _mixtures(q, z, left, right)
    place = np.rint(np.log(p / r) / 1e-3).astype(int)
    low = int(place.min())
    one = np.bincount(place - low, p)
    size = 1 << math.ceil(math.log2(len(one) * n))
    losses = (low * n + np.arange(size)) * 1e-3
    probs = np.fft.irfft(np.fft.rfft(one, size) ** n, size)

    def excess(epsilon: float) -> float:
        return float((probs * np.maximum(-np.expm1(np.minimum(epsilon - losses, 0)), 0)).sum()) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, float(losses[-1]), xtol=1e-6))


def _mixtures(q: float, z: float, left: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    reach = 12 * z + max(np.abs(left).max(), np.abs(right).max())
    x, step = np.linspace(-reach, reach, 200_001, retstep=True)
    chances = binom.pmf(np.arange(len(left)), len(left) - 1, q)
    p, r = (sum(chance * norm.pdf(x, move, z) for chance, move in zip(chances, moves, strict=True)) * step for moves in (left, right))
    return p, r
