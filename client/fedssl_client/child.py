"""One question to a child process: bytes on its standard input, an answer on its standard output, and what may be told of a failure."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from fedssl.errors import FedSSLError, WireError
from fedssl_client.policy import OutsidePolicy


def answer_standard_input(answer: Callable[[bytes], bytes]) -> int:
    """The child's part. Exit 0: the answer on standard output; 1: there, what the server may know of a failure; 3: the same, and it was the policy.

    Standard error is the owner's log and stays here.
    """
    # Whatever the training prints goes to the log: a line on standard output would spoil the answer.
    reply = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with reply:
        try:
            reply.write(answer(sys.stdin.buffer.read()))
        except Exception as error:
            if isinstance(error, FedSSLError):
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            reply.write(public_reason(error).encode())
            return 3 if isinstance(error, OutsidePolicy) else 1
    return 0


def public_reason(error: Exception) -> str:
    """What of a failure may leave the node: the words of these two are about the server's own bytes and the policy, others may quote a history."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, WireError | OutsidePolicy) else f"{name} on the node; its own log says more"
