"""Gates: whether now is a time to train. What is read of the machine, and what the person's settings make of it."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import psutil

from fedssl.names import find
from fedssl_client.policy import GateSettings

MB = 1_000_000
SHORTEST, LONGEST = 0.2, 5.0
"""Seconds that a look at the processor spans: less is chance, more is the past."""
WHILE_TRAINING = 0.2
"""Share of ``least_memory_mb`` that must stay free while training, which then takes the rest."""


@dataclass(frozen=True)
class Readings:
    """What a machine says. ``busy``: share of all processors that others than the training use; disk and memory: free bytes."""

    on_power: bool
    unmetered: bool
    busy: float
    free_disk: int
    free_memory: int


_Times: TypeAlias = tuple[float, float, int | None, float]
"""Seconds of all processors, of which used; who trains, and what that has used."""
Platform: TypeAlias = Callable[[Path, "psutil.Process | None"], Readings]
"""Readings of the disk that a folder is on, and of the machine; the process that trains, where one does."""


def platform_of(settings: GateSettings) -> Platform:
    """The platform that the settings name, or psutil and Linux' sysfs."""
    if not settings.platform:
        return LinuxReadings()
    found: Platform = find({}, settings.platform, what="platform")()
    return found


class LinuxReadings:
    """psutil, and what Linux says of networks under /sys and /proc. How busy it is counts from the call before, or over a fifth of a second."""

    def __init__(self, system: Path = Path("/")):
        self._system, self._lock = system, threading.Lock()
        self._before, self._when, self._last = self._times(None), -math.inf, 0.0

    def __call__(self, folder: Path, training: psutil.Process | None) -> Readings:
        """What the machine says now."""
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        return Readings(
            on_power=battery is None or battery.power_plugged is not False,
            unmetered=self._is_unmetered(),
            busy=self._busy(training),
            free_disk=shutil.disk_usage(folder).free,
            free_memory=psutil.virtual_memory().available,
        )

    def _is_unmetered(self) -> bool:
        """Whether no way out is a mobile one: a wwan or ppp device that has a default route."""
        try:
            lines = (self._system / "proc/net/route").read_text().splitlines()[1:]
        except OSError:
            return True
        for name in {fields[0] for fields in map(str.split, lines) if len(fields) > 1 and fields[1] == "00000000"}:
            try:
                kind = (self._system / "sys/class/net" / name / "uevent").read_text()
            except OSError:
                kind = ""
            if "DEVTYPE=wwan" in kind or name.startswith(("wwan", "ppp", "rmnet")):
                return False
        return True

    def _times(self, training: psutil.Process | None) -> _Times:
        times, own = psutil.cpu_times(), 0.0
        idle = times.idle + getattr(times, "iowait", 0.0)
        if training is not None:
            try:
                used = training.cpu_times()
                own = used.user + used.system
            except psutil.Error:
                training = None
        # Guests are counted within user and nice already.
        whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return whole, whole - idle, training.pid if training is not None else None, own

    def _busy(self, training: psutil.Process | None) -> float:
        with self._lock:
            since = time.monotonic() - self._when
            if since < SHORTEST:
                return self._last
            if since > LONGEST:
                self._before = self._times(training)
                time.sleep(SHORTEST)
            self._last, self._when = self._busy_since(self._times(training)), time.monotonic()
            return self._last

    def _busy_since(self, now: _Times) -> float:
        whole, used, who, own = now
        before, used_before, who_before, own_before = self._before
        self._before = now
        if whole <= before:
            return 0.0
        of_training = own - own_before if who == who_before else own
        return min(max((used - used_before - of_training) / (whole - before), 0.0), 1.0)


def closed_gates(settings: GateSettings, readings: Readings, *, trainings: int | None) -> list[str]:
    """Which gates are closed, in words; none: training may run. ``trainings``: begun in the last day; None while one runs, which counts no more."""
    share = 1.0 if trainings is not None else WHILE_TRAINING
    found = []
    if settings.charging and not readings.on_power:
        found.append("on battery")
    if settings.unmetered and not readings.unmetered:
        found.append("on a mobile network")
    if readings.busy > settings.most_busy:
        found.append(f"busy: others use {readings.busy:.0%} of the processor")
    if readings.free_disk < settings.least_disk_mb * MB:
        found.append(f"{readings.free_disk // MB} MB of disk free")
    if readings.free_memory < settings.least_memory_mb * share * MB:
        found.append(f"{readings.free_memory // MB} MB of memory free")
    if trainings is not None and trainings >= settings.rounds_a_day:
        found.append(f"{trainings} trainings in 24 hours")
    return found
