"""A clock that jumps by days: whoever asks for the time of day, in Python or in C."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import Job, fedssl
from flwr.app.message import message as flower_message

from fedssl.round_lines import read_lines

JUMPS = (0.0, 30 * 3600.0, -30 * 3600.0, 400 * 24 * 3600.0)
"""Seconds by which the clock on the wall is off, at one look after the other."""


def on_jumping_clocks() -> None:
    """Whatever a Python program asks for the time of day, Flower included."""
    off, real = itertools.cycle(JUMPS), time.time

    def now() -> datetime.datetime:
        return datetime.datetime.now(tz=datetime.UTC) + datetime.timedelta(seconds=next(off))

    time.time = lambda: real() + next(off)  # type: ignore[assignment]
    flower_message.now = now  # type: ignore[assignment]


def test_a_clock_that_jumps_by_days_changes_nothing_and_nobody_takes_it_for_time_spent(job: Job, tmp_path: Path):
    began = time.monotonic()
    outcome = fedssl("simulate", job.settings, "--set", "system.checkpoint_seconds=3600", "--out", tmp_path / "run", "-q", before=on_jumping_clocks)
    spent = time.monotonic() - began
    assert outcome.code == 0, outcome.error
    job.go_on(tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(line["seconds"] > 0 for line in lines) and sum(line["seconds"] for line in lines) < spent
    assert 0 < json.loads((tmp_path / "run" / "report.json").read_text())["cost"]["seconds"] < spent


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <sys/time.h>
static long off(void) {{ static long jumps[] = {{{jumps}}}; static unsigned at; return jumps[at++ % (sizeof jumps / sizeof *jumps)]; }}
int clock_gettime(clockid_t which, struct timespec *now) {{
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(which, now);
  if (which == CLOCK_REALTIME) now->tv_sec += off();
  return failed;
}}
"""


def test_a_process_whose_system_clock_jumps_by_days_ends_with_the_same_bytes(job: Job, tmp_path: Path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to put another clock under a process; install one (on Debian: apt install gcc)")
    (tmp_path / "clock.c").write_text(SHIM.format(jumps=", ".join(f"{int(seconds)}L" for seconds in JUMPS)))
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", tmp_path / "clock.so", tmp_path / "clock.c", "-ldl"], check=True)
    child = [sys.executable, "-c", CHILD, "simulate", str(job.settings), "--out", str(tmp_path / "run"), "-q"]
    done = subprocess.run(child, env={**os.environ, "LD_PRELOAD": str(tmp_path / "clock.so")}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    job.go_on(tmp_path / "run")


CHILD = """
import time
from types import SimpleNamespace
from fedssl.privacy import keys
from fedssl_simulations.cli import main
keys.secrets = SimpleNamespace(token_bytes=lambda size: b"k" * size)
assert len({time.time() // 3600 for _ in range(8)}) > 1, "the clock does not jump"
main()
"""
