"""What a noisy release of transition counts most likely says: a prior from features, then empirical Bayes cell by cell.

Everything here reads what was released and public features, so it costs no privacy (post-processing).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.config import CountsConfig
from fedssl.lift import LiftTable

MULTIPLES = (0.03, 0.15, 0.5, 1.5, 5.0, 15.0)
"""Exponential priors of a cell have these multiples of its prior mean as their means; how often each holds is learned."""
QUANTILES = (0.5, 0.8, 0.95, 0.99)
"""Cells are grouped at these quantiles of their prior means, and each group learns its own mixture."""
CELLS_TO_LEARN_FROM, CELLS_AT_ONCE, STEPS = 60_000, 500_000, 25
LEAST_SHARE = 0.1
"""The prior mean of a cell is at least this share of what independence would give."""
_HALF_LOG_TAU = 0.9189385332046727


def denoise(
    counts: NDArray[np.float32],
    popularity: NDArray[np.float32],
    rows: NDArray[np.int64],
    features: NDArray[np.float32],
    config: CountsConfig,
    *,
    noise: float,
    popularity_noise: float,
) -> LiftTable:
    """The lift table that a release most likely comes from.

    Shapes: ``popularity`` (I + 1,) and ``counts`` (N, N) between the items ``rows`` (N,): noised sums in any one unit; ``noise`` and
    ``popularity_noise``: deviations of their noise; ``features`` (I, F) of items 1 to I, the first column 1. Nothing else is
    read: totals too are those of the noised cells.
    """
    share_I = denoise_popularity(popularity[1:], popularity_noise)
    share = share_I[rows - 1] / share_I[rows - 1].sum()
    total = max(float(counts.sum(dtype=np.float64)), noise * len(counts))
    independent = (total * np.outer(share, share)).astype(np.float32)
    prior = np.maximum(project(counts, share, features[rows - 1]), LEAST_SHARE * independent).astype(np.float32)
    mean = empirical_bayes(counts, np.maximum(prior, np.float32(1e-6 * noise)), noise)
    pseudo = config.scale
    lift = np.log((mean + pseudo * share) / ((total * share + pseudo)[:, None] * share)).astype(np.float32)
    np.fill_diagonal(lift, 0.0)
    return LiftTable(
        rows=rows,
        lift=lift,
        log_popularity=np.pad(np.log(share_I), (1, 0)).astype(np.float32),
        log_repeat=np.array([np.log(returns(counts, independent, noise))], dtype=np.float32),
    )


def denoise_popularity(popularity: NDArray[np.float32], noise: float) -> NDArray[np.float64]:
    """Shares of the items, positive and adding up to 1, from their noised histogram. Shape: (I,)."""
    average = max(float(popularity.mean()), noise / len(popularity))
    likely = empirical_bayes(popularity, np.full_like(popularity, average), noise).astype(np.float64)
    shares: NDArray[np.float64] = likely / likely.sum()
    return shares


def project(counts: NDArray[np.float32], share: NDArray[np.floating], features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest matrix whose lifts are bilinear in the features, each cell weighed by how much is expected in it. Shape: (I, I).

    Least squares of ``counts ~ w w^T * (F A F^T)`` with ``w`` = popularity: noise is left in F^2 directions of I^2.
    """
    basis, _ = np.linalg.qr((share / share.max())[:, None] * features)
    result: NDArray[np.float32] = basis @ (basis.T @ counts @ basis) @ basis.T
    return result


def returns(counts: NDArray[np.float32], independent: NDArray[np.float32], noise: float) -> float:
    """How often people come back to an item, over what its popularity says: the posterior mean of one number from the diagonal."""
    expected = np.diag(independent).astype(np.float64)
    weight = float(expected @ expected)
    if weight == 0.0:
        return 1.0
    found, deviation = float(expected @ np.diag(counts)) / weight, noise / weight**0.5
    _, mean = _exponential(torch.tensor([found], dtype=torch.float64), torch.ones(1, dtype=torch.float64), deviation)
    return max(float(mean[0]), 1e-6)


def empirical_bayes(noisy: NDArray[np.float32], prior_mean: NDArray[np.float32], noise: float) -> NDArray[np.float32]:
    """The posterior mean of every cell, given its noisy value and its prior mean. Shapes: all alike; every result is positive.

    A cell is drawn from a mixture of exponential distributions whose means are multiples of its prior mean; the mixture is
    learned from the noisy cells of like prior means, by expectation maximisation (Efron 2010, Large-Scale Inference, chapter 1, is the idea).
    """
    value_C, mean_C = torch.from_numpy(np.ascontiguousarray(noisy).reshape(-1)), torch.from_numpy(np.ascontiguousarray(prior_mean).reshape(-1))
    cuts = torch.quantile(mean_C[:: max(len(mean_C) // 200_000, 1)], torch.tensor(QUANTILES))
    group_C = torch.bucketize(mean_C, cuts)
    log_mixture = torch.stack([_learn_mixture(value_C[group_C == group], mean_C[group_C == group], noise) for group in range(len(QUANTILES) + 1)])
    result = torch.empty_like(value_C)
    for first in range(0, len(value_C), CELLS_AT_ONCE):
        here = slice(first, first + CELLS_AT_ONCE)
        likely, mean = zip(*(_exponential(value_C[here], mean_C[here] * multiple, noise) for multiple in MULTIPLES))
        share = torch.softmax(torch.stack(likely) + log_mixture[group_C[here]].T, 0)
        result[here] = (share * torch.stack(mean)).sum(0)
    return result.clamp(min=1e-30).numpy().reshape(noisy.shape)


def _learn_mixture(value_C: Tensor, mean_C: Tensor, noise: float) -> Tensor:
    """Logs of how often each multiple holds. Shape: (multiples,)."""
    every = max(len(value_C) // CELLS_TO_LEARN_FROM, 1)
    value_C, mean_C = value_C[::every].double(), mean_C[::every].double()
    mixture = torch.full((len(MULTIPLES),), 1 / len(MULTIPLES), dtype=torch.float64)
    if len(value_C):
        likely = torch.stack([_exponential(value_C, mean_C * multiple, noise)[0] for multiple in MULTIPLES])
        for _ in range(STEPS):
            mixture = torch.softmax(likely + mixture.log()[:, None], 0).mean(1) + 1e-6
            mixture /= mixture.sum()
    return mixture.log().float()


def _exponential(value: Tensor, mean: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Log density of ``value`` = an exponential number of that mean + normal noise, and the posterior mean of the number.

    Far below its mean the normal tail is expanded, where the closed form would cancel.
    """
    place = value / noise - noise / mean
    is_far = place < -6.0
    near, far = place.clamp(min=-6.0), (-place).clamp(min=6.0)
    log_tail = torch.special.log_ndtr(near)
    log_density = torch.where(
        is_far,
        -0.5 * (value / noise) ** 2 - far.log() - _HALF_LOG_TAU + torch.log1p(-1 / far**2 + 3 / far**4),
        0.5 * (noise / mean) ** 2 - value / mean + log_tail,
    )
    expected = torch.where(is_far, 1 / far - 2 / far**3 + 10 / far**5, near + torch.exp(-0.5 * near**2 - _HALF_LOG_TAU - log_tail))
    return log_density - mean.log(), (noise * expected).clamp(min=0.0)
