"""Training on a device: a child process that is spawned, watched at the gates, and ended when one closes or nobody waits any more."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedssl.errors import FedSSLError
from fedssl_client.gates import Platform, closed_gates
from fedssl_client.policy import GateSettings, OutsidePolicy

LOOK_EVERY = 0.5
"""Seconds between two looks at the gates: a training ends well within 2 s of one that closes."""


class NotNow(FedSSLError):
    """No training begins, or the one that ran was ended. Its words may leave the device, and say nothing of the person."""


class TrainingFailed(FedSSLError):
    """The child brought no Upload. Its words were chosen by the child and may leave the device."""


@dataclass
class Trainer:
    """At most one child at a time. ``command``: what is started, given the server's name."""

    folder: Path
    platform: Platform
    command: Callable[[str], list[str]]
    _one: threading.Lock = field(default_factory=threading.Lock)
    _child: subprocess.Popen[bytes] | None = None
    _is_ending: bool = False

    @property
    def is_training(self) -> bool:
        """Whether a child is at work."""
        return self._one.locked()

    def closed(self, settings: GateSettings, trainings: int | None) -> list[str]:
        """Which gates are closed now (`closed_gates`)."""
        child = self._child
        watched = None
        if child is not None:
            try:
                watched = psutil.Process(child.pid)
            except psutil.Error:
                watched = None
        return closed_gates(settings, self.platform(self.folder, watched), trainings=trainings)

    def run(
        self, download: bytes, server: str, settings: GateSettings, *, trainings: int, seconds: float, begin: Callable[[], None], is_wanted: Callable[[], bool]
    ) -> bytes:
        """The child's Upload. ``begin`` is called once gates are open, before the child is started; ``is_wanted``: whether somebody still waits.

        Raises NotNow where another training runs, a gate is closed or closes, time is up or nobody waits; OutsidePolicy; TrainingFailed.
        """
        if not self._one.acquire(blocking=False):
            raise NotNow("not now: this device is training already")
        try:
            if self.closed(settings, trainings):
                raise NotNow("not now: a gate of this device is closed")
            begin()
            return self._run(download, server, settings, time.monotonic() + seconds, is_wanted)
        finally:
            self._child = None
            self._one.release()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """End the training that runs, if one does; none begins before the block ends."""
        while True:
            self._is_ending, child = True, self._child
            if child is not None:
                child.kill()
            if self._one.acquire(timeout=0.2):
                break
        self._is_ending = False
        try:
            yield
        finally:
            self._one.release()

    def _run(self, download: bytes, server: str, settings: GateSettings, deadline: float, is_wanted: Callable[[], bool]) -> bytes:
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        child = subprocess.Popen(self.command(server), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._child = child
        answers: list[bytes] = []
        # One thread writes and reads, so that neither pipe fills up while this one looks at the gates.
        talk = threading.Thread(target=lambda: answers.append(child.communicate(download)[0]), daemon=True)
        talk.start()
        why = ""
        try:
            while talk.is_alive() and not why:
                talk.join(LOOK_EVERY)
                if not talk.is_alive():
                    break
                if self._is_ending:
                    why = "not now: the person ended it"
                elif not is_wanted():
                    why = "nobody waits for it any more"
                elif time.monotonic() > deadline:
                    why = "training was ended when the download expired"
                elif self.closed(settings, None):
                    why = "not now: a gate of this device closed"
        finally:
            if talk.is_alive():
                child.kill()
            talk.join()
        if why or self._is_ending:
            raise NotNow(why or "not now: the person ended it")
        reply = answers[0] if answers else b""
        if child.returncode in (1, 3) and reply:
            words = reply.decode(errors="replace")
            raise OutsidePolicy(words.removeprefix("OutsidePolicy: ")) if child.returncode == 3 else TrainingFailed(words)
        if child.returncode != 0:
            raise TrainingFailed(f"the training process ended with {child.returncode} (a negative number: by that signal); the device's own log may say more")
        return reply


def command_of(folder: Path) -> Callable[[str], list[str]]:
    """The child of the agent in ``folder``."""
    words = [sys.executable, "-m", "fedssl_client.device_trainer", "--folder", str(folder), "--agent", str(os.getpid())]
    return lambda server: [*words, "--server", server]
