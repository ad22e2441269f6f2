"""Item-to-item counts of large catalogues: seconds, memory, bytes up and down, and what a cut to the largest cells of each row keeps.

- catalogues of 100,000 and 1,000,000 items, invented histories (`--users` of 50 events, half of them the habit of the item before): whole counts phases
  over an in-process grid, one node with everybody, each in a process of its own; at once, in blocks, and under a plan. Peak memory is what the process
  added to what it held before: node and server together. Bytes up are those of one user alone, over all rounds.
- real data: NDCG@10 on the test event of the preset's counts alone, whole and cut; and, under the noise of epsilon 8, how many of the cells that stand out
  by three deviations lie between the `counts.items` items met most, and what a count sketch (Charikar et al. 2002,
  https://doi.org/10.1016/S0304-3975(03)00400-6) of as many numbers would add to the noise of each cell by collisions.

    python simulations/benchmarks/counts_at_scale.py       (the real data: beauty.txt.gz and ml-1m.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import results
import torch
from fedssl_server.rounds import Run, owners, run_rounds
from fedssl_simulations.grids import InProcessGrid, handler_of
from fedssl_simulations.run_files import read_run
from safetensors.numpy import save

from fedssl import wire
from fedssl.client_round import Shard, client_round
from fedssl.config import RunConfig
from fedssl.counts import Counts, CountsScorer, from_cells, keep_top, most_popular, sum_items, sum_transitions
from fedssl.data.dataset import load_dataset
from fedssl.data.histories import Histories
from fedssl.evaluation import evaluate
from fedssl.privacy.keys import Keys
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.manifest import declared_sums
from fedssl.privacy.plan import make_plan
from fedssl.recipe import make_recipe
from fedssl.records import Address, Download
from fedssl.server_round import first_state, phases_of

EVENTS, ASKED = 50, 20
"""Events of an invented user, and users whose bytes are counted."""
CASES = {
    "at once": {"counts": {"top": 20}},
    "in 8 blocks": {"counts": {"top": 20, "blocks": 8}},
    "under a plan": {
        "counts": {"clip_norm": 1.0, "items": 1000},
        "server": {"sampling": "poisson", "weighting": "equal"},
        "privacy": {"clip_norm": 1.0, "epsilon": 8.0, "delta": 1e-7},
    },
}
TOPS = (0, 200, 100, 50, 20)


def invented(users: int, items: int) -> Histories:
    """Histories of a catalogue with a long tail: an event is the habit of the one before (one of three), or any item, by popularity."""
    rng = np.random.default_rng(items)
    draw = np.exp(rng.random((users, EVENTS)) * np.log(items)).astype(np.int64)
    is_habit, which = rng.random((users, EVENTS)) < 0.5, rng.integers(1, 4, (users, EVENTS))
    for place in range(1, EVENTS):
        draw[:, place] = np.where(is_habit[:, place], draw[:, place - 1] * (2 * which[:, place] + 1) % items + 1, draw[:, place])
    # Numbers say nothing of popularity in a real catalogue.
    shuffled = np.random.default_rng(0).permutation(items).astype(np.int32) + 1
    return Histories(shuffled[draw.ravel() - 1], np.arange(users + 1, dtype=np.int64) * EVENTS, None, range(users))  # type: ignore[arg-type]


def phases(case: str, items: int, users: int) -> dict[str, Any]:
    """Whole counts phases, as any run has them: seconds, memory added, cells and bytes."""
    config = RunConfig.model_validate(
        {"encoder": {"width": 8, "blocks": 1, "heads": 2, "hidden": 8}, **CASES[case], "server": {"rounds": 0, **CASES[case].get("server", {})}}
    )
    histories = invented(users, items)
    recipe = make_recipe(config, num_items=items, catalogue="none")
    shard = Shard(histories, np.arange(users))
    node_ids, owner_U = owners({1: shard.users}, users)
    run = Run("scale", recipe, users, node_ids, owner_U)
    state, before = first_state(recipe), psutil.Process().memory_info().rss
    with TemporaryDirectory() as folder:
        plan = make_plan(config.privacy, config.server, config.counts, users)
        if plan is not None:
            run = Run("scale", recipe, users, node_ids, owner_U, plan, Keys(b"c" * 32, b"n" * 32), Ledger(Path(folder) / "ledger.jsonl"))
        began, cpu = time.perf_counter(), time.process_time()
        with InProcessGrid(handler_of({1: shard}), {1: {"partition-id": 1}}) as grid:
            state = run_rounds(grid, run, state, on_round=lambda state, facts: None)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert state.counts is not None
    kept = len(state.counts.values) if isinstance(state.counts, Counts) else state.counts.lift.size
    up, down = np.zeros(ASKED), 0
    for phase in phases_of(recipe):
        tensors = phase.tensors(state)
        for number in range(1, phase.rounds + 1):
            asked = Download(Address("scale", phase.name, number), recipe, tensors)
            down += len(wire.to_bytes(asked))
            up += [len(wire.to_bytes(client_round(asked, Shard(histories, np.array([user]))))) for user in range(ASKED)]
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "added_bytes": peak - before,
        "kept_cells": kept,
        "upload_bytes": round(float(np.median(up))),
        "download_bytes": down,
        "device_bytes": len(save(dict(vars(state.counts)))),
    }


def cut(preset: str) -> dict[str, Any]:
    """What the preset's counts alone reach with the largest cells of each row."""
    config = read_run(preset)
    dataset, counts = load_dataset(config.data), config.counts
    histories, items = dataset.histories, dataset.catalogue.num_items
    assert counts is not None
    recipe = make_recipe(config, num_items=items, catalogue=dataset.catalogue.hash)
    step = declared_sums(recipe, "counts", num_weights=0)["counts"].step
    sums, _ = sum_transitions(histories, np.arange(histories.num_users), counts, num_items=items, step=step)
    whole = from_cells(sums.rows, sums.columns, sums.values * step, num_items=items)
    found = []
    for top in TOPS:
        kept = keep_top(whole, top)
        scorer = CountsScorer(kept, counts)
        test = evaluate(lambda past, users, scorer=scorer: torch.from_numpy(scorer(past)), histories, "test", ks=(10,)).summary()  # type: ignore[misc]
        found.append({"top": top, "cells": len(kept.values), "all": test["all"]["ndcg@10"], "unseen": test["unseen"]["ndcg@10"]})
        print(f"  {preset}, top {top or 'all'}: {len(kept.values):,} cells, NDCG@10 {found[-1]['all']:.4f} / {found[-1]['unseen']:.4f}", flush=True)
    return {"items": items, "cut": found}


def sketched(name: str) -> dict[str, Any]:
    """How a count sketch of all pairs would compare with the dense counts of few items, under the noise of epsilon 8."""
    private = read_run("ml-1m-private-8", [] if name == "ml-1m" else ["data.path=beauty.txt.gz", "data.items="])
    dataset, counts = load_dataset(private.data), private.counts
    histories, items = dataset.histories, dataset.catalogue.num_items
    plan = make_plan(private.privacy, private.server, counts, histories.num_users)
    assert counts is not None and plan is not None
    step = declared_sums(make_recipe(private, num_items=items, catalogue="none"), "popularity", num_weights=0)["popularity"].step
    everybody, noise = np.arange(histories.num_users), plan.noise_std_in_steps("counts", "counts")
    sums, _ = sum_transitions(histories, everybody, counts, num_items=items, step=step)
    few = most_popular(sum_items(histories, everybody, counts, num_items=items, step=step).astype(np.float32), counts.items)
    stands_out = sums.values > 3 * noise
    is_few = np.isin(sums.rows, few) & np.isin(sums.columns, few)
    # A row of the sketch adds to a cell what hashed to the same place, of random signs: sqrt(sum of squares / width).
    collisions = float(np.sqrt((sums.values.astype(np.float64) ** 2).sum() / counts.items**2))
    return {
        "items": items,
        "between": counts.items,
        "stand_out": int(stands_out.sum()),
        "stand_out_between": int((stands_out & is_few).sum()),
        "collisions_of_noise": round(collisions / noise, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, action="append", help="sizes of catalogues; may be repeated (default: 100,000 and 1,000,000)")
    parser.add_argument("--only", choices=["scale", "cut", "sketch"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    sizes, users = arguments.items or [100_000, 1_000_000], arguments.users
    if arguments.case:
        print(json.dumps(phases(arguments.case, sizes[0], users)))
        return

    def say(text: str, row: dict[str, Any]) -> None:
        print(text, flush=True)
        if not arguments.dry:
            results.append("counts_at_scale", row)

    for items in sizes if arguments.only in (None, "scale") else []:
        for case in CASES:
            words = [sys.executable, __file__, "--case", case, "--items", str(items), "--users", str(users)]
            row = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            said = f"{items:,} items, {users:,} users of {EVENTS} events, {case}: {row['seconds']} s, adds {row['added_bytes'] / 1e6:.0f} MB"
            told = f"a user sends {row['upload_bytes']:,} bytes and is sent {row['download_bytes']:,}; a device holds {row['device_bytes'] / 1e6:.1f} MB"
            say(f"{said}; {told}", {"what": "scale", "items": items, "users": users, "case": case, **row})
    for preset in ("beauty", "ml-1m") if arguments.only in (None, "cut") else ():
        say(f"{preset}: cut", {"what": "cut", "preset": preset, **cut(preset)})
    for name in ("beauty", "ml-1m") if arguments.only in (None, "sketch") else ():
        row = sketched(name)
        say(
            f"{name}, epsilon 8: {row['stand_out_between']:,} of {row['stand_out']:,} cells that stand out lie between {row['between']:,} items; "
            f"a count sketch of as many numbers adds collisions of {row['collisions_of_noise']} times the noise",
            {"what": "sketch", "data": name, **row},
        )


if __name__ == "__main__":
    main()
