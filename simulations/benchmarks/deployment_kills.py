"""`kill -9` of every process of a deployment in real rounds: is anything that was recorded lost, anything released that was not charged?

Three devices with agents hold rounds over a SuperLink that `fedssl server start` and `fedssl server run` keep up, with TLS and node
authentication; in turn under a local plan (each device adds its own noise) and a central one (counts and updates with the server's). Killed are SuperLink,
ServerApp, the server's SuperExec, SuperNodes, ClientApps, agents, and training processes, those mostly between the charge in the device's ledger and its
answer.
An init system starts services again after a second, an operator goes on with a run that gave up; nobody else helps. Held afterwards:

- every event that an agent said was recorded is in its history, and every history and ledger opens (each row has an HMAC over those before it);
- every upload that came out of an agent was charged there before, and one question never got two answers that differ;
- every round that the server released was charged and sealed in its ledger, which its newest checkpoint agrees with; every run ended.

    python simulations/benchmarks/deployment_kills.py --kills 50          (rows with the same settings add up, such as of two seeds)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import results
from trial_device import Findings, TrialDevice
from trial_fleet import TrialFleet, TrialRun, config_of

from fedssl.checkpoints import list_checkpoints, read_checkpoint
from fedssl.privacy.ledger import Ledger

OF_FIFTY = {"between charge and answer": 16, "trainer": 6, "agent": 12, "ClientApp": 4, "SuperNode": 6, "SuperLink": 3, "ServerApp": 2, "SuperExec": 1}
ROUNDS, ROUND_SECONDS, LONGEST_WAIT = 4, 60.0, 20.0


def victims(kills: int, rng: random.Random) -> list[str]:
    """What is killed, in which order: the shares of `OF_FIFTY`, at least one of each where there are enough."""
    found = [what for what, share in OF_FIFTY.items() for _ in range(max(round(share * kills / 50), 1))]
    rng.shuffle(found)
    return found[:kills]


def kill(what: str, run: TrialRun, rng: random.Random) -> str | None:
    """Wait for a chance and kill; what was killed, or None where there was no chance soon."""
    devices = run.fleet.devices
    chosen: list[psutil.Process] = []
    charged: list[tuple[TrialDevice, tuple[int, str]]] = []

    def one_of(find: Any) -> bool:
        order = rng.sample(devices, len(devices))
        chosen[:] = next((found for device in order if (found := find(device))), [])
        return bool(chosen)

    def between() -> bool:
        for device in devices:
            charge, training = device.newest_charge(), device.trainers()
            if charge is not None and training and (device.number, charge) not in SEEN:
                SEEN.add((device.number, charge))
                charged[:], chosen[:] = [(device, charge)], training
                return True
        return False

    def of_server(word: str) -> bool:
        found = run.server_process(word)
        chosen[:] = [found] if found is not None else []
        return bool(chosen)

    ready = {
        "between charge and answer": between,
        "trainer": lambda: one_of(lambda device: device.trainers()),
        "ClientApp": lambda: one_of(lambda device: device.clientapps()),
        "agent": lambda: one_of(lambda device: device.running("agent")),
        "SuperNode": lambda: one_of(lambda device: device.running("supernode")),
        "SuperLink": lambda: of_server("flower-superlink"),
        "ServerApp": lambda: of_server("flwr-serverapp"),
        "SuperExec": lambda: of_server("flower-superexec"),
    }[what]
    if what not in ("between charge and answer", "trainer", "ClientApp"):
        time.sleep(rng.random() * 5.0)
    if not run.wait(ready, LONGEST_WAIT):
        return None
    if what == "trainer":
        time.sleep(rng.random())
    try:
        os.kill(chosen[0].pid, signal.SIGKILL)
    except ProcessLookupError:
        return None
    if charged:
        device, charge = charged[0]
        time.sleep(0.3)
        return what if device.newest_charge() == charge else "trainer"
    return what


SEEN: set[tuple[int, tuple[int, str]]] = set()
"""Charges whose training was killed, by device."""


def check_run(run: TrialRun, plan: str) -> dict[str, int]:
    """What of the server's files is wrong, counted."""
    newest = read_checkpoint(list_checkpoints(run.folder / "checkpoints")[-1])
    found = {"rounds": len(run.rounds()), "released_uncharged": 0, "not_finite": int(not newest.state.weights_P.isfinite().all())}
    if plan == "central":
        ledger = Ledger(run.folder / "ledger.jsonl")
        ledger.check_not_behind(newest.state.charged)
        for line in run.rounds():
            found["released_uncharged"] += ledger.sealed(line["phase"], line["round"], line["attempt"]) is None
    return found


def hold(folder: Path, kills: int, seed: int, plans: list[str], seconds: float) -> dict[str, Any]:
    """So many kills, or as many as so many seconds have room for, in as many runs as it takes, under these plans in turn; what was counted."""
    rng = random.Random(seed)
    to_kill, killed = victims(kills, rng), Counter[str]()
    fleet = TrialFleet(folder, round_seconds=ROUND_SECONDS)
    fleet.start()
    row: dict[str, Any] = {
        "runs": 0,
        "runs_ended": 0,
        "rounds": 0,
        "resumed_by_hand": 0,
        "resumed_by_itself": 0,
        "server_released_uncharged": 0,
        "not_finite": 0,
    }
    ends = time.monotonic() + seconds
    try:
        while to_kill:
            plan = plans[row["runs"] % len(plans)]
            with fleet.running(config_of(plan, ROUNDS, seed=row["runs"]), f"run-{row['runs']}") as run:
                left = max(len(to_kill) - max(kills // len(plans), 1), 0)
                while len(to_kill) > left and not run.is_done:
                    if time.monotonic() > ends:
                        to_kill = []
                        break
                    run.wait(lambda: run.rounds(), 600)
                    done = kill(to_kill[0], run, rng)
                    if done is None:  # No chance for that one now: another first.
                        to_kill.append(to_kill.pop(0))
                        continue
                    killed[done] += 1
                    to_kill.remove(done if done in to_kill else to_kill[0])
                    say(f"{sum(killed.values())} killed: {done}; {plan}, round {len(run.rounds())}")
                ended = run.wait(lambda: run.is_done, 1500) or run.is_done
                row["runs"] += 1
                row["runs_ended"] += ended
                row["resumed_by_hand"] += run.resumed
                checked = check_run(run, plan)
                row["rounds"] += checked["rounds"]
                row["server_released_uncharged"] += checked["released_uncharged"]
                row["not_finite"] += checked["not_finite"]
                if not ended:
                    say(f"{run.folder} did not end: {(fleet.server.folder / 'run.log').read_text()[-2000:]}")
                    break
    finally:
        fleet.end()
    found = sum((device.findings() for device in fleet.devices), Findings())
    row["resumed_by_itself"] = (fleet.server.folder / "run.log").read_text().count("as a new Flower run")
    return {"kills": sum(killed.values()), "killed": dict(killed), **row, **vars(found)}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plan", choices=("local", "central"), help="one plan alone")
    parser.add_argument("--seconds", type=float, default=3600.0, help="after so long nothing more is killed")
    parser.add_argument("--keep", type=Path, help="a folder to work in, which stays")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args(words)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        row = hold(
            arguments.keep or Path(name), arguments.kills, arguments.seed, [arguments.plan] if arguments.plan else ["local", "central"], arguments.seconds
        )
    row["settings"] = results.settings_hash([OF_FIFTY, ROUNDS, ROUND_SECONDS])
    row["seconds"] = round(time.monotonic() - began)
    print(json.dumps(row, indent=1))
    if not arguments.dry:
        results.append("deployment_kills", row)
    bad = row["events_lost"] + row["uncharged"] + row["unlike"] + row["server_released_uncharged"] + row["not_finite"] + row["runs"] - row["runs_ended"]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
