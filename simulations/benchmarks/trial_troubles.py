"""What may go wrong around a process, for a trial: a network that is slow, loses packets or is cut, a disk that is full, a clock that is wrong.

Networks need root and Linux' namespaces, disks need root, clocks a C compiler; where one is not to be had, `Unavailable` says why.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Unavailable(Exception):
    """This machine cannot make that trouble."""


def _do(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise Unavailable(f"there is no command {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"`{' '.join(command)}`: {done.stderr.strip()}")


class Network:
    """A namespace with a wire to this machine, in two pieces with a bridge between them. ``here``: this machine's address on it; ``prefix``: what runs a
    command in there.
    """

    def __init__(self, number: int):
        name = f"fedssl{os.getpid()}"
        self.name, self._wire, self._bridge = name, f"f{os.getpid()}", f"b{os.getpid()}"
        self._near, self._far = f"{self._wire}n", f"{self._wire}f"
        self.here, self._there = f"10.231.{number}.1", f"10.231.{number}.2"
        self.prefix = ["ip", "netns", "exec", name]

    def make(self) -> None:
        """Raises Unavailable."""
        _do("ip", "netns", "add", self.name)
        _do("ip", "link", "add", self._wire, "type", "veth", "peer", "name", self._near)
        _do("ip", "link", "add", self._far, "type", "veth", "peer", "name", "wire", "netns", self.name)
        _do("ip", "link", "add", self._bridge, "type", "bridge")
        _do("ip", "address", "add", f"{self.here}/24", "dev", self._wire)
        for end in (self._near, self._far):
            _do("ip", "link", "set", end, "master", self._bridge)
        _do("ip", "link", "set", self._bridge, "arp", "off")  # Or it would answer for this machine's address, with a hardware address of its own.
        for end in (self._wire, self._near, self._far, self._bridge):
            _do("ip", "link", "set", end, "up")
        for words in (["address", "add", f"{self._there}/24", "dev", "wire"], ["link", "set", "wire", "up"], ["link", "set", "lo", "up"]):
            _do(*self.prefix, "ip", *words)
        # Whole packets with their checksums, as a cable has them: `far` carries them by hand.
        for before, end in (([], self._wire), ([], self._near), ([], self._far), (self.prefix, "wire")):
            _do(*before, "ethtool", "-K", end, *(word for kind in ("tx", "rx", "gso", "tso", "gro") for word in (kind, "off")))

    @contextmanager
    def far(self, seconds: float) -> Iterator[None]:
        """While the block runs every packet takes so long each way (netem would do it, where the kernel has it)."""
        for end in (self._near, self._far):
            _do("ip", "link", "set", end, "nomaster")
        carrier = _Carrier(self._near, self._far, seconds)
        carrier.start()
        try:
            yield
        finally:
            carrier.end.set()
            carrier.join()
            for end in (self._near, self._far):
                _do("ip", "link", "set", end, "master", self._bridge)

    @contextmanager
    def lossy(self, share: float, rate: str) -> Iterator[None]:
        """While the block runs so large a share of packets is lost each way, and no more than ``rate`` gets out."""
        rules = [(chain, end, "wire") for chain, end in (("INPUT", "-i"), ("OUTPUT", "-o"))]
        loss = ["-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP"]
        for chain, end, wire in rules:
            _do(*self.prefix, "iptables", "-A", chain, end, wire, *loss)
        _do(*self.prefix, "tc", "qdisc", "add", "dev", "wire", "root", "tbf", "rate", rate, "burst", "16kb", "latency", "2s")
        try:
            yield
        finally:
            for chain, end, wire in rules:
                _do(*self.prefix, "iptables", "-D", chain, end, wire, *loss)
            _do(*self.prefix, "tc", "qdisc", "del", "dev", "wire", "root")

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing passes while the block runs."""
        _do("ip", "link", "set", self._wire, "down")
        try:
            yield
        finally:
            _do("ip", "link", "set", self._wire, "up")

    def end(self) -> None:
        """Take it away, where it is there."""
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)
        for link in (self._wire, self._far, self._bridge):
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)


class _Carrier(threading.Thread):
    """Carries packets between two interfaces, ``seconds`` later, until ``end``."""

    def __init__(self, near: str, far: str, seconds: float):
        super().__init__(daemon=True)
        self.end, self._seconds = threading.Event(), seconds
        self._ends = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) for _ in range(2)]
        for one, name in zip(self._ends, (near, far), strict=True):
            one.bind((name, 0))
            one.setblocking(False)

    def run(self) -> None:
        waiting: deque[tuple[float, socket.socket, bytes]] = deque()
        while not self.end.is_set():
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, to, packet = waiting.popleft()
                with suppress(OSError):
                    to.send(packet)
            wait = min(waiting[0][0] - now, 0.2) if waiting else 0.2
            for one in select.select(self._ends, [], [], max(wait, 0.0))[0]:
                with suppress(BlockingIOError):
                    while True:
                        packet, address = one.recvfrom(65535)
                        if address[2] != socket.PACKET_OUTGOING:
                            waiting.append((time.monotonic() + self._seconds, self._ends[one is self._ends[0]], packet))
        for one in self._ends:
            one.close()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """An empty disk of that size at ``folder`` while the block runs. Raises Unavailable."""
    folder.mkdir(parents=True, exist_ok=True)
    _do("mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(folder))
    try:
        yield
    finally:
        _do("umount", "--lazy", str(folder))


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """No byte is free on the disk of ``folder`` while the block runs."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    try:
        yield
    finally:
        filler.unlink()


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long ahead(void) { const char *s = getenv("CLOCK_AHEAD"); return s ? atol(s) : 0; }
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int r = real(id, t);
    if (!r && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += ahead();
    return r;
}
int gettimeofday(struct timeval *t, void *z) {
    struct timespec s;
    int r = clock_gettime(CLOCK_REALTIME, &s);
    if (t) { t->tv_sec = s.tv_sec; t->tv_usec = s.tv_nsec / 1000; }
    return r;
}
time_t time(time_t *t) {
    struct timespec s;
    clock_gettime(CLOCK_REALTIME, &s);
    if (t) *t = s.tv_sec;
    return s.tv_sec;
}
"""


def make_clock(folder: Path) -> Path:
    """A library that, preloaded, sets a process's clock ahead. Raises Unavailable."""
    (folder / "clock.c").write_text(CLOCK)
    _do("cc", "-shared", "-fPIC", "-O1", "-o", str(folder / "clock.so"), str(folder / "clock.c"), "-ldl")
    return folder / "clock.so"


def ahead(library: Path, seconds: int) -> dict[str, str]:
    """The environment of a process whose clock is so many seconds ahead."""
    return {"LD_PRELOAD": str(library), "CLOCK_AHEAD": str(seconds)}
