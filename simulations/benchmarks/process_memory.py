"""Memory of each kind of process in a deployment, watched from outside: while devices wait, and while they train."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

KINDS = {
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "ServerApp",
    "flower-supernode": "SuperNode",
    "flwr-clientapp": "ClientApp",
    "fedssl_client.device_trainer": "training process",
    "device run": "agent",
    "flower-superexec": "SuperExec",
}
TRAINER = "training process"
SECONDS = 0.5

Watched = dict[str, dict[str, float]]


def kind_of(command: str) -> str | None:
    """Which of the deployment's processes has this command line."""
    return next((kind for words, kind in KINDS.items() if words in command), None)


@contextmanager
def watched() -> Iterator[Watched]:
    """Fills what it gives, when the block ends, with resident megabytes of this process's descendants by kind.

    ``idle``: the median of the largest of its kind while nothing trains; ``most``: the largest at any time.
    """
    idle: dict[str, list[float]] = {}
    most: dict[str, float] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS):
            now: dict[str, float] = {}
            for process in psutil.Process().children(recursive=True):
                try:
                    kind = kind_of(" ".join(process.cmdline()))
                    if kind is not None:
                        now[kind] = max(now.get(kind, 0.0), process.memory_info().rss / 1e6)
                except psutil.Error:
                    continue  # It ended meanwhile.
            for kind, megabytes in now.items():
                most[kind] = max(most.get(kind, 0.0), megabytes)
                if TRAINER not in now:
                    idle.setdefault(kind, []).append(megabytes)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    found: Watched = {}
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
        for kind in KINDS.values():
            if kind in most:
                found[kind] = {"most": round(most[kind], 1)} | ({"idle": round(statistics.median(idle[kind]), 1)} if kind in idle else {})
