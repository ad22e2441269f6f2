"""Memory that was freed and that the C library keeps, given back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Give it back, where the C library can (glibc); elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
