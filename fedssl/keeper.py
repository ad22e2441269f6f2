"""The checkpoints of a run that goes on: when one is due, and how far back from it nodes must be able to go."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from fedssl.checkpoints import Checkpoint, oldest_round, write_checkpoint
from fedssl.config import SystemConfig
from fedssl.disk import sync, writing
from fedssl.server_round import State


class Keeper:
    """Writes the checkpoints of the run in ``folder``, which goes on from ``begin``.

    ``settled``: the training round of the oldest checkpoint that is kept. Nobody goes back beyond it, so nodes may forget their way there.
    """

    def __init__(self, folder: Path, begin: Checkpoint, system: SystemConfig):
        self._folder, self._begin, self._system = folder, begin, system
        self.settled = oldest_round(folder / "checkpoints")
        self._since = time.monotonic()

    def is_due(self, state: State) -> bool:
        """Whether the settings ask for a checkpoint of ``state``: by its round, or by the time since the last one."""
        seconds = self._system.checkpoint_seconds
        is_late = bool(seconds) and time.monotonic() - self._since >= seconds
        return state.phase != "training" or is_late or state.round % self._system.checkpoint_every == 0

    def keep(self, state: State, *, best: int = 0) -> None:
        """Write a checkpoint of ``state``, unless nothing has happened yet. ``best``: a round whose checkpoint stays. Raises DiskError."""
        if not state.phase:
            return
        lines = self._folder / "metrics.jsonl"
        with writing(lines):
            # A checkpoint that outlived the lines of its rounds would leave a curve with a hole.
            sync(lines)
        write_checkpoint(self._folder / "checkpoints", replace(self._begin, state=state), keep=self._system.keep_checkpoints, best=best)
        self.settled = oldest_round(self._folder / "checkpoints")
        self._since = time.monotonic()
