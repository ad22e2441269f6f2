"""Gaussian noise in whole steps of the grid, from the run's secret key: the same address draws the same noise.

Never numpy's or torch's generator, whose outputs give away their state. The noise is rounded and added in integers:
total + round(noise) = round(total + noise), which is post-processing of the noised sum, so no low-order bits of a float
carry the total out (Mironov 2012, https://doi.org/10.1145/2382196.2382264). Numbers come from Box and Muller (1958).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedssl.privacy.stream import open_stream

_PAIRS_AT_ONCE = 1 << 15  # A block of 512 KB of words: temporaries stay in the cache.


def gaussian_steps(
    key: bytes, *, phase: str, round: int, attempt: int, name: str, block: int = 0, count: int, std_in_steps: float, exchange: int = 0
) -> NDArray[np.int64]:
    """``count`` independent normal numbers of that standard deviation, each rounded to the nearest whole step.

    Guarantees:
      - same key and address, same noise; any other phase, round, attempt, exchange, name, block or deviation is
        independent noise (the deviation too: one noise at two scales over one total would give the total away);
      - the first numbers do not depend on ``count``;
      - the radius of a pair comes from 64 bits and its angle from 53: no number lies beyond 9.42 deviations, where the
        true chance is 2^-64 a pair, so a run of 10^9 numbers adds less than 10^-10 to delta.

    The logarithm and the circle are the machine's: another kind of processor may differ in the last bit before
    rounding, so in about one number of a billion by one step.

    Shape: (count,). Units: steps. Raises ValueError for a deviation that is not positive and below 2^58 steps.
    """
    if not 0 < std_in_steps < 2.0**58:
        raise ValueError(f"noise deviation {std_in_steps} steps; it must be positive and below 2^58")
    draw = open_stream(key, "noise", phase, round, attempt, exchange, name, block, float(std_in_steps))
    noise = np.empty(count + count % 2, dtype=np.int64)
    for first in range(0, len(noise), 2 * _PAIRS_AT_ONCE):
        words = draw(min(2 * _PAIRS_AT_ONCE, len(noise) - first))
        # (word + 1) / 2^64 lies in (0, 1]; a float keeps the small ones to 53 bits of their own, and with them the tail.
        radius = np.sqrt(-2.0 * np.log((words[0::2].astype(np.float64) + 1.0) * 2.0**-64)) * std_in_steps
        angle = (words[1::2] >> np.uint64(11)).astype(np.float64) * (math.tau * 2.0**-53)
        noise[first : first + len(words) : 2] = np.rint(radius * np.cos(angle))
        noise[first + 1 : first + len(words) : 2] = np.rint(radius * np.sin(angle))
    return noise[:count]
