"""The clip of the next round, from how many users stayed within this one's: it walks to a quantile of the updates' norms.

Andrew et al. 2021, https://arxiv.org/abs/1905.03871, algorithm 1. Each user says with one bit whether their update's norm is at
most the clip. Bits are a declared sum of their own: +1/2 or -1/2, so that one user changes it by at most 1/2.
"""

from __future__ import annotations

import math

from fedssl.privacy.grid import grid_step

WITHIN = "within_clip"
"""The name of that sum."""
WITHIN_CLIP = 0.5
"""What one user adds to it, either way: its clip."""
WITHIN_STEP = grid_step(WITHIN_CLIP)
SMALLEST_CLIP, LARGEST_CLIP = 1e-12, 1e12
"""Where the clip stays, whatever the noise says: float32 has no squares much below."""


def next_clip(clip_norm: float, within_sum: float, users: float, *, quantile: float, rate: float) -> float:
    """The clip after a round: multiplied by exp(-rate (b - quantile)), where b is the share of users within it.

    ``within_sum``: the (noised) sum of bits; ``users``: what a mean of the round divides by. Under noise b may lie outside
    [0, 1]; it is used as it is, because cutting it would draw the clip away from its quantile.
    """
    share = 0.5 + within_sum / users
    factor = math.exp(min(max(-rate * (share - quantile), -50.0), 50.0))
    return min(max(clip_norm * factor, SMALLEST_CLIP), LARGEST_CLIP)
