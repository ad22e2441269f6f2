"""A deployment with a bad network, full disks and wrong clocks: does every round end, every device come back, and nothing get lost?

Three devices with agents hold rounds over a SuperLink, as in `deployment_kills.py`; one of them behind a wire of its own. One after another:
the wire loses packets and is slow; it is long; it is cut; the disk of a device is full; an agent's clock is a year ahead, and jumps back; a SuperNode's clock
is an hour ahead (Flower refuses what it signs); the disk of the run folder is full, and the operator goes on once there is room. After each trouble a
round has to come in which everybody answers. Histories and ledgers are held to what was recorded and to what left, as there.

    python simulations/benchmarks/deployment_troubles.py          (as root: network namespaces, small disks)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import results
from deployment_kills import check_run, say
from trial_device import Findings
from trial_fleet import TrialFleet, TrialRun, config_of
from trial_troubles import Network, ahead, full, make_clock, small_disk

HOUR, YEAR = 3600, 365 * 24 * 3600
ROUND_SECONDS, LONGEST = 75.0, 400.0


class Story:
    """A run, and what was seen of it under each trouble."""

    def __init__(self, run: TrialRun):
        self.run, self.seen, self.failed = run, {}, []

    def until(self, what: str, wanted: Callable[[dict[str, int]], bool], *, rounds: int = 1) -> None:
        """Wait for so many rounds from now on whose refusals, by kind, are as wanted; other rounds may come between."""
        first, began, good = len(self.run.rounds()), time.monotonic(), 0
        while good < rounds:
            last = len(self.run.rounds())
            if not self.run.wait(lambda: len(self.run.rounds()) > last, LONGEST) or time.monotonic() - began > LONGEST:  # noqa: B023
                self.failed.append(what)
                say(f"{what}: NOT within {LONGEST:.0f} s")
                return
            good = sum(wanted(refusals(line)) for line in self.run.rounds()[first:])
        took = self.run.rounds()[first:]
        self.seen[what] = {"rounds": len(took), "seconds": [line["seconds"] for line in took], "refused": [refusals(line) for line in took]}
        say(f"{what}: {self.seen[what]}")

    def everybody(self, after: str) -> None:
        """Wait for a round in which everybody answers."""
        self.until(f"everybody, after {after}", lambda refused: not refused)


def refusals(line: dict[str, Any]) -> dict[str, int]:
    return dict(line["researcher_only"]["refused_for"])


def hold(folder: Path) -> dict[str, Any]:
    """All troubles in one run: what was seen."""
    clock, network = make_clock(folder), Network(7)
    with ExitStack() as stack:
        stack.callback(network.end)
        network.make()
        for place, megabytes in (("d1", 24), ("run", 24)):
            stack.enter_context(small_disk(folder / place, megabytes))
        fleet = TrialFleet(folder, round_seconds=ROUND_SECONDS, here=network.here)
        near, small, far = fleet.devices
        far.prefix, far.superlink = network.prefix, f"{network.here}:{fleet.server.port}"
        fleet.start()
        stack.callback(fleet.end)
        with fleet.running(config_of("central", 200), "run") as run:
            story = Story(run)
            story.everybody("the start")
            with network.lossy(0.05, "512kbit"):
                story.until("5% of packets lost each way, 512 kbit/s", lambda refused: not refused, rounds=2)
            with network.far(0.4):
                story.until("0.4 s on the way, each way", lambda refused: not refused, rounds=2)
            with network.cut():
                story.until("the network is cut", lambda refused: refused.get("missing", 0) == 1)
            story.everybody("the cut")
            with full(small.folder):
                story.until("a device's disk is full", lambda refused: bool(refused))
            story.everybody("the full disk")
            for seconds, what in ((YEAR, "an agent's clock a year ahead"), (0, "that clock jumped back")):
                near.stop_part("agent")
                near.extra["agent"] = ahead(clock, seconds) if seconds else {}
                near.start_part("agent")
                story.everybody(what)
            near.stop_part("supernode")
            near.extra["supernode"] = ahead(clock, HOUR)
            near.start_part("supernode")
            story.until("a SuperNode's clock an hour ahead", lambda refused: refused.get("missing", 0) == 1)
            near.stop_part("supernode")
            near.extra["supernode"] = {}
            near.start_part("supernode")
            story.everybody("the wrong clock")
            before = run.resumed
            with full(run.folder):
                gave_up = run.wait(lambda: run.resumed > before, LONGEST)
            story.everybody("the server's disk was full")
            fleet.server.command("halt").wait(60)
            ended = run.wait(lambda: run.is_done, 120) or run.is_done
            checked, resumed = check_run(run, "central"), run.resumed
        fleet.end()
        found = sum((device.findings() for device in fleet.devices), Findings())
    about = {"troubles": len(story.seen), "not_seen": story.failed, "gave_up_on_a_full_disk": gave_up, "resumed_by_hand": resumed, "ended": ended}
    return {**about, **checked, **vars(found), "seen": story.seen}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a folder to work in, which stays")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args(words)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="troubles-") as name:
        folder = arguments.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        row = hold(folder)
    row["seconds"] = round(time.monotonic() - began)
    print(json.dumps(row, indent=1))
    if not arguments.dry:
        results.append("deployment_troubles", row)
    bad = row["events_lost"] + row["uncharged"] + row["unlike"] + row["released_uncharged"] + row["not_finite"] + len(row["not_seen"]) + (not row["ended"])
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
