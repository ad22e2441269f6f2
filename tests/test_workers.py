"""Worker processes: every task once, results in order, arrays shared, errors and ends told apart."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedssl.errors import DataError, FedSSLError
from fedssl.workers import ALIGNMENT, Workers


def begin_squares(add: int) -> tuple[Callable[[int], tuple[int, int]], Callable[[], int]]:
    seen: list[int] = []

    def handle(task: int) -> tuple[int, int]:
        seen.append(task)
        return task * task + add, os.getpid()

    return handle, lambda: sum(seen)


def begin_sum_of_mapped(arrays: dict[str, Any]) -> tuple[Callable[[str], float], Callable[[], bool]]:
    opened = {name: array.open() for name, array in arrays.items()}
    return lambda name: float(opened[name].sum()), lambda: all(opened[name].ctypes.data % ALIGNMENT == 0 for name in ("odd", "next"))


def begin_failing(kind: str) -> tuple[Callable[[int], int], Callable[[], None]]:
    if kind == "at the start":
        raise DataError("no begin")

    def handle(task: int) -> int:
        if task == 3 and kind == "an error":
            raise DataError("task 3 is bad")
        if task == 3 and kind == "an error that cannot travel":
            raise type("Local", (Exception,), {})("task 3 is odd")
        if task == 3 and kind == "a kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    return handle, lambda: None


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_task_is_handled_once_with_results_in_order(number: int):
    with Workers(number) as workers:
        for add in (0, 5):
            results, totals = workers.run(begin_squares, add, range(20))
            assert [value for value, _ in results] == [n * n + add for n in range(20)]
            assert sum(totals) == sum(range(20))
        assert len({pid for _, pid in results} - {os.getpid()}) == (number if number > 1 else 0)


def test_processes_stay_from_run_to_run():
    with Workers(2) as workers:
        first, second = (workers.run(begin_squares, 0, range(8))[0] for _ in range(2))
    assert {pid for _, pid in first} == {pid for _, pid in second}


def test_no_task_is_no_result_and_starts_nobody_to_count():
    with Workers(2) as workers:
        assert workers.run(begin_squares, 0, []) == ([], [])


def test_shared_arrays_are_mapped_aligned_and_may_be_written_anew(tmp_path: Path):
    np.save(tmp_path / "whole.npy", np.arange(10.0))
    mapped = np.load(tmp_path / "whole.npy", mmap_mode="r")
    with Workers(2) as workers:
        for factor in (1, 3):
            arrays = {"odd": np.ones(7, np.float32) * factor, "next": np.ones((3, 2)) * factor, "none": np.zeros((0, 4)), "part": mapped[2:5]}
            shared = workers.share("weights", {**arrays, "whole": mapped})
            results, totals = workers.run(begin_sum_of_mapped, shared, shared)
            assert results == [7.0 * factor, 6.0 * factor, 0.0, 9.0, 45.0]
            assert all(totals)
        assert shared["whole"].path == str(tmp_path / "whole.npy")
        assert shared["part"].path != shared["whole"].path


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("kind", "error", "words"), [("an error", DataError, "task 3 is bad"), ("at the start", DataError, "no begin")])
def test_what_a_worker_raises_is_raised_and_the_next_run_works(number: int, kind: str, error: type[Exception], words: str):
    with Workers(number) as workers:
        with pytest.raises(error, match=words):
            workers.run(begin_failing, kind, range(9))
        assert sum(workers.run(begin_squares, 0, range(5))[1]) == 10


def test_an_error_that_cannot_travel_says_the_same_in_words():
    with Workers(2) as workers, pytest.raises(RuntimeError, match="Local: task 3 is odd") as caught:
        workers.run(begin_failing, "an error that cannot travel", range(9))
    assert "in handle" in "".join(caught.value.__notes__)


def test_a_worker_that_is_killed_is_named_and_the_next_run_starts_anew():
    with Workers(2) as workers:
        with pytest.raises(FedSSLError, match=r"SIGKILL.*--resume"):
            workers.run(begin_failing, "a kill", range(9))
        assert sum(workers.run(begin_squares, 0, range(5))[1]) == 10


def test_workers_end_with_a_parent_that_was_killed():
    script = (
        "import os, signal; from test_workers import begin_squares; from fedssl.workers import Workers\n"
        "results, _ = Workers(2).run(begin_squares, 0, range(8))\n"
        "print(*{pid for _, pid in results}, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_was_shared_is_removed_with_the_pool():
    workers = Workers(2)
    path = Path(workers.share("weights", {"a": np.ones(3)})["a"].path)
    assert path.exists()
    del workers
    assert not path.exists()
