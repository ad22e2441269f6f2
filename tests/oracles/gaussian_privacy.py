"""Epsilon without distributions on a grid: the Gaussian's closed form, and one sampled round by plain integration."""

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm


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
