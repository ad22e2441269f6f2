"""A ServerApp that died is known at once: its lock is gone and its file is there."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from fedssl_server import at_work as module
from fedssl_server.at_work import FILE, at_work, forget_the_dead, has_died

from fedssl.errors import RunFolderError


def test_who_is_at_work_or_has_ended_is_not_dead(tmp_path: Path):
    assert not has_died(tmp_path)
    with at_work(tmp_path):
        assert not has_died(tmp_path)
    assert not has_died(tmp_path)
    with pytest.raises(ValueError, match="its own"), at_work(tmp_path):
        raise ValueError("its own error is an end too")
    assert not has_died(tmp_path) and not (tmp_path / FILE).exists()


def test_who_was_killed_is_dead_until_somebody_begins_again(tmp_path: Path):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with at_work(tmp_path):
            os.write(writing, b"!")
            signal.pause()
    os.read(reading, 1)
    assert not has_died(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert has_died(tmp_path)
    forget_the_dead(tmp_path)
    assert not has_died(tmp_path)
    with at_work(tmp_path):
        forget_the_dead(tmp_path)
        assert (tmp_path / FILE).exists()


def test_two_are_not_at_work_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TRIES", 2)
    with at_work(tmp_path):
        with pytest.raises(RunFolderError, match="another ServerApp is at work"), at_work(tmp_path):
            pass
        assert not has_died(tmp_path)


def test_who_looks_does_not_keep_anybody_from_beginning(tmp_path: Path):
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            has_died(tmp_path)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(50):
            with at_work(tmp_path):
                pass
    finally:
        ended.set()
        looking.join()
