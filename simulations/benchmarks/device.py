"""A device: memory of the agent, time of its answers, time to its first recommendation, and what each process takes.

A model of ML-1M's size (3,416 items, the preset's encoder, 1.82 million cells of counts), with random weights:
times and bytes do not depend on what was learned. Its recipe has the head take a step from each event, so `Record` is timed with that step.
`Recommend` is timed as an app asks: soon after a new event; also at once after one, and again with nothing new.
Every number is of the real agent as a process of its own, asked over its Unix socket by another one.

    python simulations/benchmarks/device.py
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import results
import tomli_w
from fedssl_client.connection import Connection, connect
from fedssl_client.device_folder import app_socket, make_device_folder
from fedssl_client.history import Event, HistoryStore
from fedssl_client.policy import Retention
from fedssl_simulations.run_files import read_run
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedssl.catalogue import Catalogue
from fedssl.counts import from_cells
from fedssl.device_model import write_device_model
from fedssl.parts import initial_weights
from fedssl.recipe import Recipe, make_recipe
from fedssl.records import Address, Download
from fedssl.weights import to_numpy
from fedssl.wire import to_bytes

ITEMS, HISTORY, CELLS = 3416, 200, 532
"""Cells a row: 1.82 million in all, as the counts of ML-1M at six lags."""
ADAPT = 0.1
PAUSE = 0.01
"""Seconds from an event to what is asked soon after it."""
WANTED = {
    "idle MB": 120,
    "recommend again p50 ms": 2,
    "recommend soon p50 ms": 2,
    "recommend soon p99 ms": 10,
    "record p99 ms": 10,
    "start to first recommendation s": 1.5,
    "gate to the end of a training s": 2,
}


def make_device(folder: Path) -> Recipe:
    catalogue = Catalogue(tuple(f"item-{row}" for row in range(1, ITEMS + 1)), {f"item-{row}": f"The title of item {row}" for row in range(1, ITEMS + 1)})
    config = read_run("ml-1m", ["head.name=user-vector", f"head.adapt={ADAPT}"])
    recipe = make_recipe(config, num_items=ITEMS, catalogue=catalogue.hash)
    rng = np.random.default_rng(0)
    columns = np.sort(np.argsort(rng.random((ITEMS, ITEMS)), axis=1)[:, :CELLS] + 1, axis=1)
    counts = from_cells(np.repeat(np.arange(1, ITEMS + 1), CELLS), columns.ravel(), rng.random(columns.size) * 20, num_items=ITEMS)
    make_device_folder(folder, user=0)
    gates = {"most_busy": 1.0, "least_memory_mb": 0, "charging": False}
    policy = {
        "user": 0,
        "consent": {"train": True},
        "allow": {"servers": ["home"], "most_epsilon": float("inf")},
        "gates": gates,
        "retention": {"most_events": HISTORY},
    }
    (folder / "device.toml").write_text(tomli_w.dumps(policy))
    write_device_model(folder / "model", recipe, to_numpy(initial_weights(recipe)), catalogue, counts, run="benchmark", round=1)
    history = HistoryStore(folder / "history.sqlite")
    history.join("home")
    history.add([Event(f"item-{item}", float(when), 1.0) for when, item in enumerate(rng.integers(1, ITEMS + 1, HISTORY))], Retention())
    history.close()
    return recipe


def start(folder: Path) -> tuple[subprocess.Popen[bytes], float]:
    """The agent as `fedssl device run` starts it, and the seconds from there to its first recommendation."""
    code = "import sys; from fedssl_simulations.cli import main; sys.argv = ['fedssl', 'device', 'run', sys.argv[1]]; main()"
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with connect(f"unix:{app_socket(folder)}") as app:
        app.ask("Recommend", {"k": 10})
    return process, time.perf_counter() - began


def asked(app: Connection, method: str, fields: dict[str, Any]) -> float:
    """The milliseconds of a call."""
    began = time.perf_counter()
    app.ask(method, fields)
    return (time.perf_counter() - began) * 1e3


def after_events(app: Connection, calls: int, pause: float) -> tuple[list[float], list[float]]:
    """Milliseconds of recording an event, and of asking for recommendations ``pause`` seconds later, so many times."""
    recorded, recommended = [], []
    for number in range(calls):
        recorded.append(asked(app, "Record", {"item": f"item-{1 + number % ITEMS}"}))
        if pause:
            time.sleep(pause)
        recommended.append(asked(app, "Recommend", {"k": 10}))
    return recorded, recommended


def middle_and_worst(name: str, found: list[float]) -> dict[str, float]:
    """Median and 99th percentile, by name."""
    return {f"{name} p50 ms": float(np.median(found)), f"{name} p99 ms": float(np.quantile(found, 0.99))}


def bare_call(folder: Path, calls: int, pause: float) -> float:
    """Median milliseconds of a call that asks for no work, ``pause`` seconds after another: gRPC's health, over the same socket.

    What the machine is worth at the moment, and how long it takes to wake up.
    """
    found = []
    with grpc.insecure_channel(f"unix:{app_socket(folder)}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for _ in range(calls):
            if pause:
                time.sleep(pause)
            began = time.perf_counter()
            check(health_pb2.HealthCheckRequest())
            found.append((time.perf_counter() - began) * 1e3)
    return float(np.median(found))


def megabytes(process: psutil.Process) -> float:
    return float(process.memory_info().rss / 1e6)


def trained(folder: Path, recipe: Recipe, agent: psutil.Process) -> dict[str, float]:
    """Seconds and largest RSS of a training of one user, asked for as the ClientApp does."""
    download = to_bytes(Download(Address("benchmark", "training", 1), recipe, to_numpy(initial_weights(recipe)), users=np.array([0])))
    child_peak, agent_peak, done = 0.0, 0.0, threading.Event()

    def watch() -> None:
        nonlocal child_peak, agent_peak
        while not done.is_set():
            try:
                agent_peak = max(agent_peak, megabytes(agent))
                for child in agent.children(recursive=True):
                    child_peak = max(child_peak, megabytes(child))
            except psutil.Error:
                pass
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    with connect(f"unix:{folder / 'training' / 'train.sock'}", "Training") as clientapp:
        clientapp.ask("Train", {"server": "home", "download": download, "seconds": 300.0}, seconds=300)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return {"training s": seconds, "training child MB": child_peak, "agent while training MB": agent_peak}


def clientapp_megabytes() -> float:
    """RSS of what Flower starts for every message: a process that has imported the ClientApp."""
    code = "import psutil, fedssl_client.app; print(psutil.Process().memory_info().rss)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) / 1e6


def measure(calls: int) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="device-"))
    try:
        recipe = make_device(folder / "d")
        starts = []
        for _ in range(3):
            process, seconds = start(folder / "d")
            starts.append(seconds)
            process.send_signal(signal.SIGTERM)
            process.wait()
        process, seconds = start(folder / "d")
        starts.append(seconds)
        agent = psutil.Process(process.pid)
        try:
            time.sleep(2.0)
            row: dict[str, float] = {"start to first recommendation s": float(np.median(starts)), "idle MB": megabytes(agent)}
            with connect(f"unix:{app_socket(folder / 'd')}") as app:
                after_events(app, 20, 0.0)
                steps = app.ask("Status").steps
                recorded, soon = after_events(app, calls, PAUSE)
                row["steps a record"] = (app.ask("Status").steps - steps) / calls
                _, at_once = after_events(app, calls, 0.0)
                again = [asked(app, "Recommend", {"k": 10}) for _ in range(calls)]
                row |= middle_and_worst("recommend soon", soon) | middle_and_worst("recommend at once", at_once) | middle_and_worst("recommend again", again)
                row |= middle_and_worst("record", recorded)
                row["bare call p50 ms"], row["bare call soon p50 ms"] = (bare_call(folder / "d", calls, pause) for pause in (0.0, PAUSE))
            row["after these calls MB"] = megabytes(agent)
            row |= trained(folder / "d", recipe, agent)
            row["after a training MB"] = megabytes(agent)
            row["ClientApp MB"] = clientapp_megabytes()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
        row["model on disk MB"] = sum(path.stat().st_size for path in (folder / "d" / "model").iterdir()) / 1e6
        row["gate to the end of a training s"] = gate_seconds(folder / "d", recipe)
    finally:
        shutil.rmtree(folder)
    return row


def gate_seconds(folder: Path, recipe: Recipe) -> float:
    """Seconds from a gate that closes to the end of the process that trains: the agent in this process, over a machine whose battery we pull."""
    from dataclasses import replace

    from fedssl_client.agent import Agent
    from fedssl_client.gates import LinuxReadings
    from fedssl_client.training import NotNow

    endless = "import sys, torch; sys.stdin.buffer.read()\nwhile True: torch.randn(200, 200) @ torch.randn(200, 200)"
    agent = Agent(folder, command=lambda server: [sys.executable, "-c", endless])
    readings, closed = LinuxReadings(), threading.Event()
    agent._trainer.platform = lambda where, training: replace(readings(where, training), free_disk=0 if closed.is_set() else 10**12)
    ended: list[float] = []

    def ask() -> None:
        try:
            agent.train(b"x", "home", seconds=60)
        except NotNow:
            ended.append(time.perf_counter())

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(3.3)
    began = time.perf_counter()
    closed.set()
    thread.join()
    agent.close()
    return ended[0] - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="calls of each kind that are timed")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    row = measure(arguments.calls)
    for name, value in row.items():
        print(f"{name}: {value:.2f}" + (f" (wanted under {WANTED[name]})" if name in WANTED else ""), flush=True)
    if not arguments.dry:
        settings = results.settings_hash([ITEMS, HISTORY, CELLS, arguments.calls, ADAPT, sorted(row)])
        measured = {name: round(value, 3) for name, value in row.items()}
        results.append("device", {"items": ITEMS, "history": HISTORY, "calls": arguments.calls, "measured": measured, "settings": settings})


if __name__ == "__main__":
    main()
