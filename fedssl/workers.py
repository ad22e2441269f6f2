"""Worker processes that stay: tasks dealt to whoever is free, arrays shared through mapped files.

Processes are started as plain children (never forked), so threads, notebooks and unguarded scripts are no obstacle. They end
with their parent, however it ends: their only line to the world is a socket that the parent holds.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedssl.disk import writing
from fedssl.errors import FedSSLError

Task = TypeVar("Task")
Result = TypeVar("Result")
Total = TypeVar("Total")
Begin = Callable[[Any], tuple[Callable[[Task], Result], Callable[[], Total]]]

ALIGNMENT = 64
"""Bytes. Matrix products may round differently over memory of another alignment than torch's own, which is this."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""For glibc: what a chunk freed serves the next one. Given back, its pages are cleared anew for every chunk, a tenth of the time."""


class MappedArray(NamedTuple):
    """Where an array lies in a file."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def open(self) -> NDArray[Any]:
        """The array, mapped: pages are shared, and what is written to it stays private to who wrote it."""
        if 0 in self.shape:
            return np.zeros(self.shape, dtype=self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="c", offset=self.offset, shape=self.shape)


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    line: Connection


@dataclass
class _Open:
    """What must be closed, apart from the pool itself: a finaliser may not hold the object that it ends."""

    children: list[_Child]
    folder: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        for child in self.children:
            child.line.close()
        for child in self.children:
            child.process.wait()
        self.children.clear()
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


class Workers:
    """``number`` processes (0: one a core), started when first needed; of one there is none, and the caller does the work.

    A context manager; left open, it ends with the object.
    """

    def __init__(self, number: int = 1):
        self.number = number or os.cpu_count() or 1
        self._open = _Open([])
        self._arrays: dict[str, dict[str, MappedArray]] = {}
        self._lock = Lock()
        weakref.finalize(self, _Open.close, self._open)

    def close(self) -> None:
        """End the processes and remove what was shared. The next `run` starts anew."""
        self._open.close()
        self._arrays.clear()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def shared(self, name: str) -> dict[str, MappedArray] | None:
        """What was shared under this name since the processes last began."""
        return self._arrays.get(name)

    def share(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, MappedArray]:
        """Where these arrays can be mapped: in their own file where they are mapped already, else in one that is written here.

        Under the same name the same file is written again, so nobody may be reading it: call it between runs.
        """
        if self._open.folder is None:
            with writing(Path(tempfile.gettempdir())):
                self._open.folder = tempfile.TemporaryDirectory(prefix="fedssl-workers-")
        path = Path(self._open.folder.name) / name
        found, loose, end = {}, {}, 0
        for key, array in arrays.items():
            # A part of a mapping does not know where in the file it begins.
            if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and array.flags.c_contiguous:
                found[key] = MappedArray(str(array.filename), array.dtype.str, array.shape, array.offset)
            else:
                found[key] = MappedArray(str(path), array.dtype.str, array.shape, end)
                loose[key] = np.ascontiguousarray(array)
                end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        with writing(path), path.open("r+b" if path.exists() else "w+b") as file:
            for key, array in loose.items():
                file.seek(found[key].offset)
                file.write(array.data)
            file.truncate(max(end, 1))
        self._arrays[name] = found
        return found

    def run(self, begin: Begin[Task, Result, Total], common: Any, tasks: Iterable[Task]) -> tuple[list[Result], list[Total]]:
        """Each worker calls ``begin(common)``, which gives ``(handle, finish)``, then handles tasks one by one; last it finishes.

        Returns ``handle``'s results in the order of the tasks, and ``finish``'s of the workers. Which worker gets which task is
        chance (who is free), so results may not depend on it. ``begin`` must be a function of a module.

        Raises what a worker raised, after the others came to rest; FedSSLError where one ended by itself.
        """
        if self.number == 1:
            return run_here(begin, common, tasks)
        with self._lock:
            try:
                return self._run(begin, common, iter(tasks))
            except _Ended as ended:
                self.close()
                raise FedSSLError(
                    f"a worker process ended by itself ({ended}); was memory short? Nothing of this round was kept: go on with `--resume`, "
                    "with fewer [system] workers or users_per_chunk if it happens again"
                ) from None

    def _run(self, begin: Begin[Task, Result, Total], common: Any, tasks: Iterator[Task]) -> tuple[list[Result], list[Total]]:
        self._start()
        start = pickle.dumps((begin, common), protocol=5)
        results: dict[int, Result] = {}
        totals: list[Total] = []
        error: BaseException | None = None
        at_work: dict[Connection, tuple[_Child, int]] = {}
        numbered = enumerate(tasks)
        free = deque(self._open.children)
        started: list[_Child] = []
        while True:
            while free and error is None and (task := next(numbered, None)) is not None:
                child = free.popleft()
                if child not in started:
                    self._send(child, ("begin", start))
                    started.append(child)
                self._send(child, ("task", task[1]))
                at_work[child.line] = (child, task[0])
            if not at_work:
                break
            for line in wait(list(at_work)):
                assert isinstance(line, Connection)
                child, number = at_work.pop(line)
                kind, value = self._receive(child)
                if kind == "result":
                    results[number] = value
                else:
                    error = error or value
                free.append(child)
        for child in started:
            self._send(child, ("finish", None))
        for child in started:
            kind, value = self._receive(child)
            if kind == "result":
                totals.append(value)
            else:
                error = error or value
        if error is not None:
            raise error
        return [results[number] for number in range(len(results))], totals

    def _start(self) -> None:
        if self._open.children:
            return
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        environment |= ONE_THREAD | KEEP_MEMORY
        for _ in range(self.number):
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-c", f"from fedssl.workers import serve; serve({theirs.fileno()})"]
                # A group of its own: a Ctrl-C reaches only the parent, which ends its work in order.
                process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, process_group=0)
            self._open.children.append(_Child(process, Connection(ours.detach())))

    def _send(self, child: _Child, message: tuple[str, Any]) -> None:
        try:
            child.line.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise _Ended(_how(child)) from None

    def _receive(self, child: _Child) -> tuple[str, Any]:
        try:
            reply: tuple[str, Any] = child.line.recv()
        except (EOFError, ConnectionResetError):
            raise _Ended(_how(child)) from None
        return reply


def run_here(begin: Begin[Task, Result, Total], common: Any, tasks: Iterable[Task]) -> tuple[list[Result], list[Total]]:
    """What `Workers.run` does, in this process."""
    handle, finish = begin(common)
    return [handle(task) for task in tasks], [finish()]


class _Ended(Exception):
    """A worker process is gone."""


def _how(child: _Child) -> str:
    code = child.process.wait()
    return f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def serve(descriptor: int) -> None:
    """The life of a worker: answer the parent on this socket until it is closed."""
    line = Connection(descriptor)
    handle: Callable[[Any], Any] | None = None
    finish: Callable[[], Any] | None = None
    failed: BaseException | None = None
    while True:
        try:
            kind, value = line.recv()
        except (EOFError, ConnectionResetError):
            return
        reply: tuple[str, Any] = ("result", None)
        try:
            if kind == "begin":
                failed = None
                begin, common = pickle.loads(value)
                handle, finish = begin(common)
                continue
            if failed is not None:
                raise failed
            assert handle is not None and finish is not None
            reply = ("result", handle(value) if kind == "task" else finish())
            if kind == "finish":
                handle = finish = None
        except Exception as error:
            failed = error
            if kind == "begin":
                continue
            reply = ("error", _picklable(error))
        try:
            line.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            return


def _picklable(error: Exception) -> Exception:
    """The same error, or where it cannot travel one that says the same; the worker's trace goes along as a note."""
    trace = "in a worker process:\n" + traceback.format_exc()
    try:
        travelled = pickle.loads(pickle.dumps(error))
        assert type(travelled) is type(error)
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(trace)
    return error
