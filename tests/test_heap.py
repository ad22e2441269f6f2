"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest


@pytest.mark.skipif(getattr(ctypes.CDLL(None), "malloc_trim", None) is None, reason="this C library has no malloc_trim (glibc has)")
def test_freed_memory_is_given_back_to_the_system():
    program = """
import numpy as np, psutil
from fedssl import heap
resident = lambda: psutil.Process().memory_info().rss
before = resident()
pieces = [np.ones(10_000, dtype=np.int8) for _ in range(20_000)]
kept = pieces[::1000]  # so that the end of the heap is held
del pieces
held = resident() - before
heap.give_back()
print(held, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    held, left = map(int, done.stdout.split())
    assert left < 0.2 * held, done.stdout
    assert held > 100_000_000, "the C library gave it back by itself: this test tells nothing"
