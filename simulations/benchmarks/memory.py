"""Memory: the ML-1M run at its peak, and the server's part with 64 and with 2,048 nodes.

The run is a process of its own, watched from outside: PSS (shared pages counted once) summed over all its processes, ten
times a second. The server's part is a round in which every node is one user and sends a whole upload of the job's size.

    python simulations/benchmarks/memory.py          (needs ml-1m.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import results

ROUNDS = 100


def peak_pss(command: list[str]) -> tuple[int, float]:
    """Largest PSS in bytes of a command and its children, and its seconds."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for each in [watched, *watched.children(recursive=True)]:
                total += each.memory_full_info().pss
        except psutil.Error:
            pass
        peak = max(peak, total)
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return peak, time.perf_counter() - began


SERVER = """
import sys, resource
from pathlib import Path
import numpy as np
from flwr.app import Message
from fedssl import wire
from fedssl.config import RunConfig
from fedssl.recipe import make_recipe
from fedssl.records import Upload
from fedssl.server_round import first_state
from fedssl_server.rounds import Run, owners, run_rounds
from fedssl_simulations.grids import InProcessGrid
nodes = int(sys.argv[1])
config = RunConfig.model_validate({"encoder": {"window": 100}, "server": {"rounds": 2, "cohort": nodes}, "local": {"grid_step": 2.0**-20}})
recipe = make_recipe(config, num_items=3416, catalogue="none")
state = first_state(recipe)
rng = np.random.default_rng(0)
def reply(message, context):
    download = wire.download_from_record_dict(message.content)
    update = rng.integers(-1000, 1000, len(state.weights_P)).astype(np.int32)
    sums = {"update": update, "weight": np.array([65536]), "loss": np.array([65536])}
    return Message(wire.to_record_dict(Upload(download.address, download.recipe.hash, sums)), reply_to=message)
ids, owner = owners({n + 1: np.array([n]) for n in range(nodes)}, nodes)
with InProcessGrid(reply, {n + 1: {"partition-id": n} for n in range(nodes)}) as grid:
    run_rounds(grid, Run("memory", recipe, nodes, ids, owner), state, on_round=lambda state, facts: None)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="training rounds of the ML-1M run; its memory is flat from the first on")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    row: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from fedssl_simulations.cli import main; main()", "simulate", "ml-1m", "--quiet", "--out", str(Path(folder) / "run")]
        settings = ["--set", f"server.rounds={arguments.rounds}", "--set", "evaluation.every=50"]
        row["ml-1m run"], seconds = peak_pss(command + settings)
    peak = f"{row['ml-1m run'] / 1e6:.0f} MB at its peak (wanted under 1200)"
    print(f"ML-1M run, {arguments.rounds} rounds with counts, evaluation and report: {peak}, {seconds:.0f} s", flush=True)
    for nodes in (64, 2048):
        row[f"server, {nodes} nodes"], seconds = peak_pss([sys.executable, "-c", SERVER, str(nodes)])
        print(f"server's part, cohort of {nodes:5d} one-user nodes: {row[f'server, {nodes} nodes'] / 1e6:.0f} MB, {seconds:.0f} s for two rounds", flush=True)
    if not arguments.dry:
        results.append("memory", {"rounds": arguments.rounds, "bytes": row, "settings": results.settings_hash(arguments.rounds)})


if __name__ == "__main__":
    main()
