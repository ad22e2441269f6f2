"""The integer grid: how long one step of a clipped sum is, and how large a coordinate may get.

A user's clipped update is rounded toward zero to whole steps, so sums add exactly, in any order and on any number of
workers. The step is a power of two: dividing by it and multiplying with it lose nothing in floating point.
"""

from __future__ import annotations

import math

CLIP_MARGIN = 2.0**-16
"""Updates are clipped to C(1 - 2^-16): the margin covers the float32 error of norm and scaling, so the norm holds exactly in integers."""

LARGEST_COORDINATE = 2**24
"""Steps that one user's coordinate may have, either way."""

USERS_IN_INT32 = 127
"""Users whose sum still fits an int32 block: 127 * 2^24 < 2^31."""


def grid_step(clip_norm: float) -> float:
    """The step for updates clipped to ``clip_norm``, in the clip's units.

    Guarantees:
      - it is a power of two, from clip_norm * 2^-24 up to (not including) twice that;
      - so no coordinate of a clipped update has more than 2^24 steps, and 127 users fit an int32.

    Raises ValueError when ``clip_norm`` is not positive, or too small (2^-990) or not finite for a float.
    """
    if not (2.0**-990 <= clip_norm < math.inf):
        raise ValueError(f"clip_norm {clip_norm} has no grid; it must be positive and finite")
    mantissa, exponent = math.frexp(clip_norm * 2.0**-24)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
