"""A million users: conversion of a large file, opening the store, synthesis, and a round of 1,000 from few and from many.

- convert: a file of EVENTS random events of a million users, written first; seconds and the peak of the converting process.
  Then the store is opened by a process of its own: seconds, and memory that opening adds.
- lines: the same for a hundred million events of a million invented users, a line a user.
- synthesize: `fedssl data synthesize --users 1000000`.
- round: rounds of 1,000 users with personal heads, from a store of 10,000 and from one of 1,000,000 users of the same world, in turn in one
  process, with the flush and journal of a checkpoint each ten rounds; medians, of seconds and of seconds of CPU (for a machine that is shared).
  All heads have been trained before. In turn with them goes the same without heads, from the million. Then memory: rounds from the million in processes
  of their own, with heads and without: what is resident in the end and at most.

    python simulations/benchmarks/scale.py --events 10000000 --events 100000000        (needs pyarrow; 100 million events take 6 GB of disk)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import results

from fedssl.heads.store import HeadStore

COMMAND = [sys.executable, "-c", "from fedssl_simulations.cli import main; main()"]
FEW, MANY, COHORT, MEAN_EVENTS = 10_000, 1_000_000, 1000, 20

CONVERT = """
import json, resource, sys, time
from pathlib import Path
from fedssl.config import DataConfig
from fedssl.data.convert import convert
began = time.perf_counter()
dataset = convert(DataConfig(path=sys.argv[1]), Path(sys.argv[2]))
seconds = time.perf_counter() - began
facts = {"users": dataset.histories.num_users, "kept": dataset.histories.num_events, "seconds": round(seconds, 1)}
print(json.dumps({**facts, "cpu_seconds": round(time.process_time(), 1), "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""

OPEN = """
import json, sys, time, psutil
from fedssl.config import DataConfig
from fedssl.data.dataset import load_dataset
before = psutil.Process().memory_info().rss
began = time.perf_counter()
dataset = load_dataset(DataConfig(path=sys.argv[1]))
dataset.histories.training_lengths
dataset.histories.fingerprint
facts = {"users": dataset.histories.num_users, "events": dataset.histories.num_events, "seconds": round(time.perf_counter() - began, 3)}
print(json.dumps({**facts, "added_bytes": psutil.Process().memory_info().rss - before}))
"""


def write_events(path: Path, events: int) -> None:
    """Random events of a million users and 50,000 items, some of either often, in order of time."""
    import pyarrow as pa
    import pyarrow.csv as csv

    rng = np.random.default_rng(0)
    options = csv.WriteOptions(include_header=False, delimiter="\t")
    with path.open("wb") as file:
        file.write(b"user_id\titem_id\ttimestamp\n")
        for first in range(0, events, 1 << 20):
            count = min(1 << 20, events - first)
            users, items = (MANY * rng.random(count) ** 1.3).astype(np.int64), (50_000 * rng.random(count) ** 2).astype(np.int64)
            times = 1_500_000_000 + first // 10 + rng.integers(0, 1_000_000, count)
            csv.write_csv(pa.table({"user": users, "item": items, "time": times}), file, options)


def in_process(program: str, *words: object) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def synthesize(users: int, out: Path, *more: str) -> float:
    began = time.perf_counter()
    subprocess.run([*COMMAND, "data", "synthesize", str(out), "--users", str(users), *more], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def convert_lines(path: Path, store: Path, say: Callable[[str, dict[str, Any]], None]) -> None:
    """Convert a file with one line a user, and open the store."""
    row = in_process(CONVERT, path, store)
    row |= {"what": "convert", "events": row["kept"], "format": "lines"}
    peak = row["peak_rss_bytes"] / 1e6
    say(
        f"convert {row['events']:,} events of {row['users']:,} users, a line a user: {row['seconds']} s ({row['cpu_seconds']} s of CPU), peak {peak:.0f} MB",
        row,
    )
    opened = in_process(OPEN, store)
    say(f"open it: {opened['seconds']} s, adds {opened['added_bytes'] / 1e6:.0f} MB", {"what": "open", **opened})


def rounds_of(store: Path, folder: Path, head: str = "user-vector") -> Callable[[], None]:
    """Whole rounds of 1,000 users with heads (all trained before) or without from a store, one a call."""
    from fedssl_server.rounds import Run, owners, run_rounds
    from fedssl_simulations.grids import InProcessGrid, handler_of
    from fedssl_simulations.simulated_nodes import make_shards

    from fedssl.checking import check
    from fedssl.config import RunConfig
    from fedssl.data.dataset import load_dataset
    from fedssl.recipe import make_recipe
    from fedssl.server_round import first_state

    settings = {
        "data": {"path": str(store)},
        "encoder": {"width": 32, "window": 50},
        "task": [{"name": "next-item", "negatives": 128}],
        "head": {"name": head},
        "server": {"rounds": 10_000, "cohort": COHORT},
        "privacy": {"clip_norm": 1.0},
        "system": {"workers": 1},
    }
    config = check(RunConfig, settings, where="scale")
    dataset = load_dataset(config.data)
    recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash)
    shards = make_shards(dataset, config, folder)
    nodes: dict[int, dict[str, Any]] = {index + 1: {"partition-id": index} for index in shards}
    node_ids, owner_U = owners({index + 1: shard.users for index, shard in shards.items()}, dataset.histories.num_users)
    run = Run("scale", recipe, dataset.histories.num_users, node_ids, owner_U)
    grid = InProcessGrid(handler_of(shards), nodes)
    state = first_state(recipe)

    for shard in shards.values():
        fill_heads(shard.heads(recipe))

    def one() -> None:
        nonlocal state
        target = state.round + 1

        def keep(found: Any, facts: Any) -> None:
            nonlocal state
            state = found

        state = run_rounds(grid, run, state, on_round=keep, should_stop=lambda: state.round >= target, settled=lambda: (target - 1) // 10 * 10)
        if target % 10 == 0:
            for shard in shards.values():
                heads = shard.heads(recipe)
                if heads is not None:
                    heads.flush()

    return one


def fill_heads(heads: HeadStore | None) -> None:
    """Give every user a head that is not zero, as if all had been trained; nothing is left in the journal."""
    if heads is None:
        return
    rng = np.random.default_rng(0)
    for users in np.array_split(heads.users, max(len(heads.users) // 20_000, 1)):
        heads.write(users, rng.standard_normal((len(users), heads.width), dtype=np.float32), round=0)
        heads.begin(1, settled=0)
    heads.flush()


def memory_of(store: Path, folder: Path, rounds: int, head: str) -> dict[str, Any]:
    """Resident bytes of a process of its own that ran rounds from a store: in the end, and at most."""
    program = f"""
import json, resource, sys, psutil
sys.path.insert(0, {str(Path(__file__).parent)!r})
import pathlib, scale
one = scale.rounds_of(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), {head!r})
for _ in range({rounds}):
    one()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"rss_bytes": psutil.Process().memory_info().rss, "peak_rss_bytes": peak}}))
"""
    return in_process(program, store, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, action="append", help="size of a file to convert; may be repeated (default: 10,000,000)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["convert", "lines", "synthesize", "round"], help="one part; round makes its stores by itself")
    parser.add_argument("--folder", type=Path, help="where files go; they are removed")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    parts = [arguments.only] if arguments.only else ["convert", "lines", "synthesize", "round"]

    def say(text: str, row: dict[str, Any]) -> None:
        print(text, flush=True)
        if not arguments.dry:
            results.append("scale", {**row, "settings": results.settings_hash({name: row.get(name) for name in ("what", "events", "users")})})

    with TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for events in (arguments.events or [10_000_000]) if "convert" in parts else []:
            write_events(folder / "events.tsv", events)
            row = {"what": "convert", "events": events, "file_bytes": (folder / "events.tsv").stat().st_size}
            row |= in_process(CONVERT, folder / "events.tsv", folder / f"store-{events}")
            peak = row["peak_rss_bytes"] / 1e6
            say(f"convert {events:,} events of {row['users']:,} users: {row['seconds']} s ({row['cpu_seconds']} s of CPU), peak {peak:.0f} MB", row)
            (folder / "events.tsv").unlink()
            opened = in_process(OPEN, folder / f"store-{events}")
            say(f"open it: {opened['seconds']} s, adds {opened['added_bytes'] / 1e6:.0f} MB", {"what": "open", **opened})
        if "lines" in parts:
            synthesize(MANY, folder / "people.txt", "--items", "2000", "--events", "100")
            convert_lines(folder / "people.txt", folder / "store-lines", say)
            (folder / "people.txt").unlink()
        if "synthesize" in parts:
            seconds = round(synthesize(MANY, folder / "people.txt"), 1)
            say(f"synthesize {MANY:,} users: {seconds} s (wanted under 180)", {"what": "synthesize", "users": MANY, "seconds": seconds})
            (folder / "people.txt").unlink()
        if "round" in parts:
            for users in (FEW, MANY):
                synthesize(users, folder / f"{users}.txt", "--events", str(MEAN_EVENTS))
            for users in (FEW, MANY):
                made = in_process(CONVERT, folder / f"{users}.txt", folder / f"store-{users}")
                opened = in_process(OPEN, folder / f"store-{users}")
                said = f"store of {users:,} users, {made['kept']:,} events: made in {made['seconds']} s with {made['peak_rss_bytes'] / 1e6:.0f} MB"
                say(f"{said}, opened in {opened['seconds']} s, adds {opened['added_bytes'] / 1e6:.0f} MB", {"what": "open", **opened})
            cases = {"few": (FEW, "user-vector"), "many": (MANY, "user-vector"), "none": (MANY, "none")}
            tried = {name: rounds_of(folder / f"store-{users}", folder / f"heads-{name}", head) for name, (users, head) in cases.items()}
            seconds_of: dict[str, list[float]] = {name: [] for name in tried}
            cpu_of: dict[str, list[float]] = {name: [] for name in tried}
            for number in range(arguments.rounds + 1):
                for name, one in tried.items():
                    began, cpu_began = time.perf_counter(), time.process_time()
                    one()
                    if number:  # the first makes the parts, and the order of the pass
                        seconds_of[name].append(time.perf_counter() - began)
                        cpu_of[name].append(time.process_time() - cpu_began)
            row = {"what": "round", "users": [FEW, MANY]}
            for what, found in (("seconds", seconds_of), ("cpu_seconds", cpu_of)):
                few, many, none = (statistics.median(found[name]) for name in ("few", "many", "none"))
                row |= {what: [round(few, 4), round(many, 4)], f"{what}_ratio": round(many / few, 4)}
                row |= {f"{what}_without_heads": round(none, 4), f"{what}_ratio_of_heads": round(many / none, 4)}
            wanted = f"ratio {row['seconds_ratio']:.3f} (wanted under 1.1), of CPU {row['cpu_seconds_ratio']:.3f}"
            said = f"round of {COHORT:,} with heads: {row['seconds'][0]:.3f} s from {FEW:,}, {row['seconds'][1]:.3f} s from {MANY:,}; {wanted}"
            without_them = f"without heads {row['seconds_without_heads']:.3f} s; heads cost x{row['seconds_ratio_of_heads']:.3f}"
            say(f"{said}; {without_them} (wanted under 1.1), of CPU x{row['cpu_seconds_ratio_of_heads']:.3f}", row)
            with_heads, without = (memory_of(folder / f"store-{MANY}", folder / f"heads-memory-{head}", 12, head) for head in ("user-vector", "none"))
            row = {"what": "heads", "users": MANY, **with_heads, "without": without, "added_bytes": with_heads["rss_bytes"] - without["rss_bytes"]}
            end, base, added = (number / 1e6 for number in (with_heads["rss_bytes"], without["rss_bytes"], row["added_bytes"]))
            say(f"resident after rounds with {MANY:,} heads: {end:.0f} MB, without heads {base:.0f} MB: heads add {added:.1f} MB (wanted under 300)", row)


if __name__ == "__main__":
    main()
