"""Chance as data: numbers drawn for (seed, phase, round, user, purpose), the same wherever and with whom they are drawn.

A key is 64 bits hashed from names and numbers; the i-th draw under a key is one more hash of (key, i). So whole
shards draw at once in numpy, a user draws alike alone and in a crowd, and there is no state to save. The mixing
function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195). It is for
views, windows, negatives and dropout; never for noise or cohorts under a privacy plan (`privacy.noise`).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def key(*words: str | int) -> int:
    """64 bits from a sequence of names and numbers; order and types matter."""
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in words)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keys_of_users(base: int, users_U: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One key a user, from the key of (seed, phase, round, purpose) and the user's stable number. Shape: (U,)."""
    with np.errstate(over="ignore"):
        return _mix(_mix(users_U.astype(np.uint64) + _GOLDEN) ^ np.uint64(base))


def uniform(keys_U: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """``count`` numbers in [0, 1) a user, 53 bits each. Shape: (U, count). The first k do not depend on ``count``."""
    with np.errstate(over="ignore"):
        counter = (np.arange(1, count + 1, dtype=np.uint64)) * _GOLDEN
        bits = _mix(keys_U[:, None] + counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(keys_U: NDArray[np.uint64], count: int, high: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """``count`` whole numbers in [0, high) a user; ``high`` is one number or (U,). Shape: (U, count)."""
    bound = np.asarray(high, dtype=np.float64)
    drawn = uniform(keys_U, count) * (bound[:, None] if bound.ndim else bound)
    # 53-bit uniforms times a bound below 2^31 never round up to the bound itself.
    return drawn.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
