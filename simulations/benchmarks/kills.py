"""Private runs killed with SIGKILL at random moments and resumed: is any round released that the ledger then on disk does not know?

A run is a forked child of a warmed process, killed at a random moment of its life, resumed, killed again, until it ends.
Before noise is drawn, and again after the release, the child writes down what it is about to give out; a user's upload, before
it leaves. After every kill all that was written down is held to the ledgers on disk:

    central (counts with noise, an adaptive clip, heads): charged, sealed, and no two releases under one attempt that differ;
    local (every user adds their own noise): charged to each user, and no two answers to one question that differ.

A run that ends must end with the bytes and the charges of one that was never killed. A killed process loses nothing that it gave to the
operating system, so children do not wait for the disk.

    python simulations/benchmarks/kills.py --kills 500
    python simulations/benchmarks/kills.py --kills 20 --planted     (a ledger that forgets to write: must be found, exit code 1)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import results
import torch
from fedssl_server import rounds
from fedssl_simulations import grids
from fedssl_simulations import run as run_module
from fedssl_simulations.run import simulate

from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset
from fedssl.data.histories import make_histories
from fedssl.data.synthetic import make_world, synthesize
from fedssl.privacy.keys import Keys
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.plan import make_plan
from fedssl.privacy.uploads import UploadLedger, question_of
from fedssl.records import Download
from fedssl.wire import to_bytes

USERS, ROUNDS = 24, 8
KEYS = Keys(cohort=b"c" * 32, noise=b"n" * 32)
"""Known to everybody, so that runs can be compared."""
SMALL: dict[str, Any] = {
    "encoder": {"width": 8, "blocks": 1, "heads": 2, "hidden": 8, "window": 10, "dropout": 0.1},
    "head": {"name": "user-vector", "lr": 0.5},
    "system": {"users_per_chunk": 4, "workers": 1, "shards": 2, "checkpoint_every": 3, "checkpoint_seconds": 0},
}
SERVER = {"rounds": ROUNDS, "cohort": 10, "average_from": 4}
CONFIGS = {
    "central": RunConfig.model_validate(
        {
            **SMALL,
            "server": {**SERVER, "sampling": "poisson"},
            "counts": {"clip_norm": 1.0},
            "privacy": {"clip_norm": 0.5, "clip": "adaptive", "noise_multiplier": 1.0, "counts_noise_multiplier": 1.0, "delta": 1e-3},
        }
    ),
    "local": RunConfig.model_validate({**SMALL, "server": SERVER, "privacy": {"mode": "local", "clip_norm": 0.5, "noise_multiplier": 3.0, "delta": 1e-3}}),
}


@dataclass
class Tally:
    """What was seen so far."""

    kills: int = 0
    runs: int = 0
    told: int = 0
    unknown: list[str] = field(default_factory=list)
    redrawn: list[str] = field(default_factory=list)
    other_bytes: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.unknown or self.redrawn or self.other_bytes)


def dataset() -> Dataset:
    histories, catalogue = make_histories(synthesize(users=USERS, items=40, seed=3, mean_events=8, world=make_world(40, 3, topics=4)))
    return Dataset(histories, catalogue, "", {})


# ---- in the child ----


def watch(log: Path) -> None:
    """In this process, write down every release and every upload before it is given out, and every release after."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(**values: Any) -> None:
        os.write(descriptor, json.dumps(values).encode() + b"\n")

    real_release, real_answer = rounds.Release, grids.answer

    def release(*arguments: Any) -> Any:
        if arguments[3] is not None:
            tell(kind="noise", phase=arguments[0], round=arguments[1], attempt=arguments[2])
        return real_release(*arguments)

    def answer(download: Download, shard: Any) -> Any:
        upload = real_answer(download, shard)
        if download.recipe.privacy.is_local:
            digest, users = sha256(to_bytes(upload)).hexdigest(), download.users if download.users is not None else shard.users
            tell(kind="upload", node=shard.heads_folder.name, question=question_of(download), users=np.asarray(users).tolist(), digest=digest)
        return upload

    rounds.Release, grids.answer = release, answer  # type: ignore[misc,assignment]
    real_round = rounds._round

    def one_round(*arguments: Any) -> Any:
        state, facts = real_round(*arguments)
        learned = [state.weights_P.numpy().tobytes(), repr(state.clip_norm).encode()]
        if state.counts is not None:
            learned += [array.tobytes() for array in vars(state.counts).values()]
        tell(kind="release", phase=facts.phase, round=facts.round, attempt=facts.attempt, digest=sha256(b"".join(learned)).hexdigest())
        return state, facts

    rounds._round = one_round


def plant() -> None:
    """A ledger that believes what it never wrote."""

    def forgetful(self: Ledger, entry: dict[str, Any]) -> None:
        self._apply(entry, 0)

    Ledger._append = forgetful  # type: ignore[method-assign]


def play(mode: str, data: Dataset, folder: Path, log: Path, planted: bool) -> None:
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    # Noise of users is of the run: all must bear one name to be compared.
    run_module.uuid4 = lambda: SimpleNamespace(hex="a run that is killed")  # type: ignore[assignment]
    watch(log)
    if planted:
        plant()
    quiet: Any = lambda progress: None  # noqa: E731
    if (folder / "run.toml").exists():
        simulate(resume=folder, dataset=data, keys=KEYS, on_progress=quiet)
    else:
        simulate(CONFIGS[mode], out=folder, dataset=data, keys=KEYS, on_progress=quiet)


def start(mode: str, data: Dataset, folder: Path, log: Path, planted: bool) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        play(mode, data, folder, log, planted)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


# ---- in the parent ----


def told(log: Path) -> list[dict[str, Any]]:
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def check(folder: Path, log: Path, tally: Tally) -> None:
    """Hold all that was told to the ledgers on disk."""
    lines = told(log)
    ledger = Ledger(folder / "ledger.jsonl")
    devices = {path.parent.name: UploadLedger(path, KEYS.noise, may_be_new=False) for path in folder.glob("devices/*/uploads.sqlite")}
    digests: dict[tuple[Any, ...], str] = {}
    for line in lines:
        if line["kind"] == "upload":
            device, key = devices.get(line["node"]), (line["node"], line["question"])
            users = None if device is None else device._charged.get(line["question"])
            is_known = users is not None and np.frombuffer(users, dtype="<i8").tolist() == line["users"]
        else:
            key = (line["phase"], line["round"], line["attempt"])
            last = ledger.last_attempt(line["phase"], line["round"])
            is_known = bool(devices) or (last is not None and last >= line["attempt"] and ledger.sealed(*key) is not None)
        if not is_known:
            tally.unknown.append(f"{folder.name}: {line}")
        if "digest" in line and digests.setdefault(key, line["digest"]) != line["digest"]:
            tally.redrawn.append(f"{folder.name}: {line}")
    for device in devices.values():
        device.close()


def learned(folder: Path) -> dict[str, Any]:
    """All that a run learned, and what it charged."""
    found: dict[str, Any] = {}
    for path in [*folder.glob("checkpoints/*/*.safetensors"), *folder.glob("heads/*/user-vector.f32")]:
        found[str(path.relative_to(folder))] = sha256(path.read_bytes()).hexdigest()
    found["charged"] = Ledger(folder / "ledger.jsonl").charged()
    for path in sorted(folder.glob("devices/*/uploads.sqlite")):
        device = UploadLedger(path, KEYS.noise, may_be_new=False)
        found[path.parent.name] = device.uploads()
        device.close()
    return found


def reference(mode: str, data: Dataset, folder: Path) -> tuple[dict[str, Any], float]:
    """What a run that is never killed learns and charges, and its seconds."""
    plan = make_plan(CONFIGS[mode].privacy, CONFIGS[mode].server, CONFIGS[mode].counts, USERS)
    assert plan is not None
    # The accountant remembers what it was asked, and a child inherits it.
    for count in range(ROUNDS + 1):
        plan.epsilon({"training": count} if mode == "local" else {"counts": 1, "training": count})
    log, began = folder.with_suffix(".log"), time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(start(mode, data, folder, log, False), 0)[1])
    if code:
        sys.exit(f"the run that is never killed ended with {code}")
    tally = Tally()
    check(folder, log, tally)
    assert tally.is_clean and told(log), "the check finds fault with a run that was never killed, or sees nothing"
    return learned(folder), time.monotonic() - began


def kill_runs(kills: int, seed: int, *, planted: bool, folder: Path, modes: tuple[str, ...] = ("central", "local")) -> Tally:
    chance, data, tally = random.Random(seed), dataset(), Tally()
    torch.set_num_threads(1)
    references = {mode: reference(mode, data, folder / f"{mode}-never-killed") for mode in modes}
    while tally.kills < kills and not (planted and tally.unknown):
        mode = modes[tally.runs % len(modes)]
        whole, seconds = references[mode]
        run = folder / f"{mode}-{tally.runs}"
        log = run.with_suffix(".log")
        while tally.kills < kills:
            child = start(mode, data, run, log, planted)
            time.sleep(chance.random() * 0.5 * seconds)
            os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == -signal.SIGKILL:
                tally.kills += 1
            elif code != 0 and not planted:
                sys.exit(f"{run}: a resumed run ended with {code}; see above")
            check(run, log, tally)
            if code != -signal.SIGKILL or (planted and tally.unknown):
                break
        if not planted:
            code = os.waitstatus_to_exitcode(os.waitpid(start(mode, data, run, log, False), 0)[1])
            if code:
                sys.exit(f"{run}: ended with {code} after it was resumed for the last time; see above")
            check(run, log, tally)
            found = learned(run)
            tally.other_bytes += [f"{run.name}: {name}" for name in sorted({*found, *whole}) if found.get(name) != whole.get(name)]
        tally.told += len(told(log))
        tally.runs += 1
        shutil.rmtree(run, ignore_errors=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill private runs at random moments and hold what they gave out to their ledgers")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--planted", action="store_true", help="let the ledger forget to write, to see that this is found")
    parser.add_argument("--record", action="store_true", help="append to results/kills.jsonl")
    chosen = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        modes = ("central",) if chosen.planted else ("central", "local")
        tally = kill_runs(chosen.kills, chosen.seed, planted=chosen.planted, folder=Path(folder), modes=modes)
    row = {
        "kills": tally.kills,
        "runs": tally.runs,
        "given_out": tally.told,
        "unknown_to_the_ledger": len(tally.unknown),
        "two_under_one_attempt": len(tally.redrawn),
        "other_than_never_killed": len(tally.other_bytes),
        "seconds": round(time.monotonic() - began, 1),
    }
    for found in [*tally.unknown, *tally.redrawn, *tally.other_bytes][:10]:
        print(found, file=sys.stderr)
    print(json.dumps(results.append("kills", row) if chosen.record else row))
    sys.exit(0 if tally.is_clean else 1)


if __name__ == "__main__":
    main()
