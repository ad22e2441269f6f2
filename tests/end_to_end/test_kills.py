"""The script that kills private runs 500 times, here with a few kills: it finds nothing, and finds a ledger that forgets to write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "simulations" / "benchmarks" / "kills.py"


def run(*arguments: str) -> tuple[int, dict[str, int]]:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=280, check=False)
    return done.returncode, json.loads(done.stdout)


def test_nothing_is_given_out_that_a_resumed_ledger_does_not_know():
    code, found = run("--kills", "10", "--seed", "5")
    assert code == 0
    assert found["kills"] == 10 and found["given_out"] > 0
    assert found["unknown_to_the_ledger"] == found["two_under_one_attempt"] == found["other_than_never_killed"] == 0


def test_a_ledger_that_forgets_to_write_is_found():
    code, found = run("--kills", "10", "--planted")
    assert code == 1
    assert found["unknown_to_the_ledger"] > 0
