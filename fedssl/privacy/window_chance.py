"""Which training windows a device's step reads, with the noise on their sum: drawn from the device's own key."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedssl.privacy.noise import gaussian_steps
from fedssl.privacy.stream import open_stream
from fedssl.records import Address

FINE = 2.0**40
"""Whole steps of one deviation, where noise is added to sums that are not whole."""


@dataclass(frozen=True)
class WindowChance:
    """Whose key, and for which question (`uploads.question_of`). The server and the recipe's seed know nothing of it.

    A question names recipe and weights, so another seed is another question, with coins and noise of its own: equal noise
    under two seeds would subtract, and leave what dropout and negatives changed in the bare. ``is_apart``: each user's noise is
    drawn on its own, as on devices; otherwise that of all users of a shard at once, after its windows were added up.
    """

    key: bytes = field(repr=False)
    question: str
    address: Address
    is_apart: bool = True

    def chosen(self, user: int, step: int, count: int, rate: float) -> NDArray[np.int64]:
        """Numbers of the windows, of ``count``, that a local step reads: sorted.

        Guarantees: each is chosen independently, with a chance at most ``rate`` and short of it by less than 2^-64; whether
        one is chosen does not depend on how many there are; 1 chooses all.
        """
        if rate >= 1:
            return np.arange(count)
        words = open_stream(self._own(f"windows of {user}"), "windows", *self._where(), step)(count)
        return np.flatnonzero(words < np.uint64(int(rate * 2.0**64)))

    def noise(self, users: NDArray[np.int64], step: int, count: int, std_in_steps: float) -> NDArray[np.int64]:
        """One draw of Gaussian noise for all of ``users`` together, in whole steps. Shape: (count,).

        A device draws for its one user. A simulation draws for many with the deviation of their sum: the sum of independent
        Gaussians is one.
        """
        whose = hashlib.sha256(np.ascontiguousarray(users, dtype="<i8").data).hexdigest()
        phase, round, attempt, exchange = self._where()
        own = self._own(f"noise of {whose}")
        return gaussian_steps(
            own, phase=phase, round=round, attempt=attempt, exchange=exchange, name="update", block=step, count=count, std_in_steps=std_in_steps
        )

    def normal(self, user: int, step: int, count: int) -> NDArray[np.float64]:
        """The noise of one device before it is scaled: deviation 1, on a grid of 2^-40. Shape: (count,)."""
        return self.noise(np.array([user]), step, count, FINE) / FINE

    def _own(self, purpose: str) -> bytes:
        return hmac.new(self.key, f"fedssl {purpose} {self.question}".encode(), hashlib.sha256).digest()

    def _where(self) -> tuple[str, int, int, int]:
        return self.address.phase, self.address.round, self.address.attempt, self.address.exchange
