"""Noise that a user adds before anything leaves: drawn from the node's own key, for one user and one question."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedssl.privacy.manifest import DeclaredSum
from fedssl.privacy.noise import gaussian_steps
from fedssl.records import Address


@dataclass(frozen=True)
class LocalNoise:
    """Whose key, and for which question (`uploads.question_of`). The server and the recipe's seed know nothing of it."""

    key: bytes = field(repr=False)
    question: str
    address: Address

    def steps(self, user: int, one: DeclaredSum, count: int) -> NDArray[np.int64]:
        """What a user adds to a sum of ``count`` coordinates, in whole steps.

        Guarantees: the same noise for the same key, user and question; independent noise for any other.
        """
        own = hmac.new(self.key, f"fedssl user {user} {self.question}".encode(), hashlib.sha256).digest()
        phase, round, attempt, exchange = self.address.phase, self.address.round, self.address.attempt, self.address.exchange
        return gaussian_steps(own, phase=phase, round=round, attempt=attempt, exchange=exchange, name=one.name, count=count, std_in_steps=one.noise_std)
