"""How far a mean over users might be off, had other users of the same kind come."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_DRAWS = 2000


def bootstrap_interval(values_n: NDArray[np.float64]) -> tuple[float, float]:
    """The percentile bootstrap's interval of 95 % for the mean of ``values_n``, which must not be empty.

    The same values give the same interval. Users with equal values are drawn together, by a multinomial, which is the same law as
    drawing users one by one. Source: Efron 1979, https://doi.org/10.1214/aos/1176344552, and the percentile method of Efron 1981.
    """
    assert len(values_n), "an interval for a mean over nobody"
    distinct, how_many = np.unique(values_n, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values_n), how_many / len(values_n), size=_DRAWS)
    low, high = np.quantile(drawn @ distinct / len(values_n), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
