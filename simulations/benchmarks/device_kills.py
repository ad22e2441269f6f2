"""`kill -9` on a device's history and ledger: nothing recorded is lost, nothing is released that was not charged.

A child records events, charges questions, keeps answers and releases them, over and over, on one device's files, and says so on a pipe after each. It is
killed at a random moment; in every fifth run it kills itself between a charge and its answer. Then the files are opened anew and held to what was said.

    python simulations/benchmarks/device_kills.py
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import results
from fedssl_client.device_folder import HISTORY, opened_ledger
from fedssl_client.history import HistoryStore
from fedssl_client.policy import Retention

from fedssl.records import Address

USER = np.array([0])
KEEP = Retention(most_events=10**6)


def upload_of(question: str, draw: int) -> bytes:
    """An upload whose bytes differ each time it is made: what left twice would show."""
    return hashlib.sha256(f"{question} {draw}".encode()).digest() * 100


def live(folder: Path, begin: int, dies_at: int, say: Callable[[str], None]) -> None:
    """What an agent and its child do to the files, from event and question number ``begin`` on. Dies between charge and answer of question ``dies_at``."""
    history = HistoryStore(folder / HISTORY)
    for number in range(begin, begin + 10**6):
        history.record(f"item {number}", float(number), 1.0, KEEP)
        say(f"recorded {number}")
        with opened_ledger(folder, history) as device:
            question, address = f"question {number}", Address("run", "training", number + 1)
            device.ledger.charge(question, address, USER, cost=0.0, promised=None, delta=1e-6)
            say(f"charged {number}")
            if number == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            kept = device.ledger.keep(question, address, upload_of(question, random.randrange(2**30)))
            history.set_anchor(*device.ledger.head)
            say(f"released {number} {hashlib.sha256(kept).hexdigest()}")


def kill_one(folder: Path, begin: int, *, between: bool, rng: random.Random) -> list[list[str]]:
    """What a child said until it was dead: its lines, in words. A last line that is torn was not said."""
    reading, writing = os.pipe()
    dies_at = begin + rng.randrange(3) if between else -1
    child = os.fork()
    if child == 0:
        os.close(reading)
        random.seed()
        try:
            live(folder, begin, dies_at, lambda words: os.write(writing, f"{words}\n".encode()) and None)
        finally:
            os._exit(1)
    os.close(writing)
    if not between:
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WTERMSIG(status) != signal.SIGKILL:
        sys.exit(f"a child ended by itself with {status}; begin anew with another folder")
    return [line.decode().split() for line in said.split(b"\n")[:-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    rng, began = random.Random(arguments.seed), time.perf_counter()
    row = {"kills": 0, "between_charge_and_answer": 0, "events": 0, "events_lost": 0, "released": 0, "released_uncharged": 0, "released_unlike": 0}
    recorded: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), 0
        for number in range(arguments.kills):
            said = kill_one(folder, begin, between=number % 5 == 0, rng=rng)
            row["kills"] += 1
            row["between_charge_and_answer"] += bool(said) and said[-1][0] == "charged"
            recorded |= {words[1] for words in said if words[0] == "recorded"}
            history = HistoryStore(folder / HISTORY)
            found = {event.item.split()[1] for event in history.events()}
            row["events_lost"] += len(recorded - found)
            with opened_ledger(folder, history) as device:
                charged = set(device.ledger._charged)
                for words in said:
                    if words[0] == "released":
                        row["released"] += 1
                        row["released_uncharged"] += f"question {words[1]}" not in charged
                        kept = device.ledger.answer(f"question {words[1]}")
                        row["released_unlike"] += kept is None or hashlib.sha256(kept).hexdigest() != words[2]
                    elif words[0] == "charged":
                        row["released_uncharged"] += f"question {words[1]}" not in charged  # A reserve that was said stays.
                begin = 1 + max((int(item) for item in found), default=-1)
                # Answers are dropped as a checkpoint settles them, so that the file stays small.
                device.ledger.forget("run", begin - 50)
            history.close()
    row["events"] = len(recorded)
    seconds = time.perf_counter() - began
    print(
        f"{row['kills']} kills, {row['between_charge_and_answer']} of them after a charge and before its release, in {seconds:.0f} s: {row['events']} events, "
        f"{row['events_lost']} lost; {row['released']} uploads released, {row['released_uncharged']} uncharged, {row['released_unlike']} unlike what is kept"
    )
    if not arguments.dry:
        results.append("device_kills", {**row, "settings": results.settings_hash([arguments.kills, arguments.seed])})
    if row["events_lost"] or row["released_uncharged"] or row["released_unlike"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
