"""Secret chance: a ChaCha20 key stream of 64-bit words, found by an address. For cohorts and noise under a plan.

Whoever lacks the key cannot tell the words from chance; whoever has it finds the same words at the same address, on any
machine. There is no state to save. Sources: RFC 8439 (ChaCha20), RFC 2104 (HMAC).
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def open_stream(key: bytes, *address: str | int | float) -> Callable[[int], NDArray[np.uint64]]:
    """A function that draws the next ``count`` words, each uniform over 0 .. 2^64 - 1.

    Guarantees:
      - same key and address, same words, however the draws are split;
      - another address (by value, type or order of its parts) is another, independent stream.
    """
    # Only who draws pays for it: a device that is idle has 7 MB less.
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    text = json.dumps(address, separators=(",", ":")).encode()
    # Every address has a ChaCha20 key of its own, so no nonce can repeat under one key: zero is as good as any.
    own_key = hmac.new(key, b"fedssl stream\0" + text, hashlib.sha256).digest()
    cipher = Cipher(ChaCha20(own_key, bytes(16)), mode=None).encryptor()

    def draw(count: int) -> NDArray[np.uint64]:
        return np.frombuffer(cipher.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)

    return draw
