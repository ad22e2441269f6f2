"""What each encoder costs, and how fast it learns: milliseconds a user and step, parameters, bytes of an upload.

The job: ML-1M's catalogue and window (3,416 items, 50 events), width 64, 256 negatives a user, chunks of 32 users with full windows of
invented events, one thread. Timed is what a node does for its users: drawing windows and views, and all local steps. The encoders take
turns, so that a drifting machine drifts under all of them; medians of CPU time are printed. The upload is a real one, of a node with one user.

    python simulations/benchmarks/encoders.py            (prints, appends to results/, rewrites docs/encoders.md)
    python simulations/benchmarks/encoders.py --trial    (trains each on ML-1M for 300 rounds: needs ml-1m.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import results
import torch
from fedssl_simulations.run import simulate

from fedssl.checking import check
from fedssl.client_round import Shard, client_round
from fedssl.config import RunConfig
from fedssl.data.dataset import load_dataset
from fedssl.data.histories import Histories
from fedssl.local_training import make_batch, train_users
from fedssl.parts import initial_weights, make_parts
from fedssl.recipe import Recipe, make_recipe
from fedssl.records import Address, Download, SparseSum
from fedssl.weights import ITEMS, to_numpy

ITEMS_IN_ALL, WINDOW, CHUNK, CHUNKS = 3416, 50, 32, 4
TRIAL_ROUNDS, TRIAL_COHORT = 300, 256
PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"

ENCODERS: dict[str, tuple[dict[str, Any], str]] = {
    "sasrec": ({"blocks": 2, "heads": 2, "hidden": 128}, "2 blocks, 2 heads, feed-forward 128"),
    "gru4rec": ({"blocks": 1, "hidden": 128}, "1 layer, state 128"),
    "bert4rec": ({"blocks": 2, "heads": 2, "hidden": 128}, "2 blocks, 2 heads, feed-forward 128"),
    "hgrn": ({"blocks": 2}, "2 blocks"),
}
ABOUT = {
    "sasrec": "causal transformer (Kang and McAuley 2018); learns from `next-item`",
    "gru4rec": "gated recurrent network, its cell and its way back through time written by hand (Hidasi et al. 2016); `next-item`",
    "bert4rec": "transformer that reads both ways and fills in hidden items (Sun et al. 2019); `masked-item`",
    "hgrn": "gated running means, no attention (Qin et al. 2023, a light one); `next-item`",
}
PAGE_TOP = """\
# Encoders

Made by `python simulations/benchmarks/encoders.py`; do not edit. `[encoder] name` chooses one; `[[task]] name` must suit it, and a pair that
cannot learn is refused: `next-item` and `previous-item` ask for a causal encoder, `masked-item` for one that reads both ways; `contrastive` trains any.

| encoder | what it is |
|---|---|
"""
PAGE_BOTTOM = """\
## Padding, dropout, masks

More padding on the left changes nothing: positions count from the newest event, and recurrent states stay exactly what they are over padding.
`bert4rec` has a learned vector `mask`. In training it stands where events are hidden; to say what comes next it is put behind the newest event, so
a prediction reads the newest `window` events and one mask, and the encoder has `window + 1` positions. Every training window hides the newest
event, which is that question, and each other with chance `1 - keep`. Half of the windows with the newest alone, half with others alone, as
BERT4Rec was published, learned much less in as many rounds of MovieLens-100K; so did a share hidden that differs from window to window.

## Tried, and no file

On ML-1M, trained centrally at width 64 for about as much CPU time each, one seed and one learning rate: relative positions in place of
SASRec's own, HSTU's pointwise attention (Zhai et al. 2024) and LiGR's gated blocks (Borisyuk et al. 2025) all learned more than `sasrec`,
HSTU and relative positions the most, and all less than `hgrn`, which takes more rounds in that time. Of `hgrn`'s losses gBCE (Petrov and
Macdonald 2023) with 256 negatives and the softmax over 1,024 drawn ones, which has logQ's correction here, ended where the full softmax does.
"""


def job(name: str, steps: int) -> RunConfig:
    return check(
        RunConfig,
        {
            "encoder": {"name": name, "width": 64, "window": WINDOW, **ENCODERS[name][0]},
            "task": [{"name": "masked-item" if name == "bert4rec" else "next-item", "negatives": 256}],
            "local": {"steps": steps, "lr": 0.1},
            "privacy": {"clip_norm": 1.0},
        },
        where="encoders",
    )


class Node:
    """Users with one full window each, and a recipe; a call trains them all."""

    def __init__(self, name: str, steps: int):
        users, events = CHUNK * CHUNKS, WINDOW + 3
        rows = np.random.default_rng(0).integers(1, ITEMS_IN_ALL + 1, users * events).astype(np.int32)
        self.histories = Histories(rows, np.arange(0, len(rows) + 1, events), None, tuple(str(user) for user in range(users)))
        self.recipe: Recipe = make_recipe(job(name, steps), num_items=ITEMS_IN_ALL, catalogue="")
        self.weights = initial_weights(self.recipe)
        self.round = 0

    def __call__(self) -> None:
        self.round += 1
        parts, recipe = make_parts(self.recipe), self.recipe
        for first in range(0, CHUNK * CHUNKS, CHUNK):
            some = np.arange(first, first + CHUNK)
            base = (recipe.seed, "training", self.round)
            batch = make_batch(parts.tasks, self.histories, some, some, base=base, local=recipe.local, window=WINDOW, num_items=ITEMS_IN_ALL)
            train_users(parts.encoder, parts.tasks, self.weights, batch, local=recipe.local, window=WINDOW)

    def upload_bytes(self) -> int:
        download = Download(Address("encoders", "training", 1), self.recipe, to_numpy(self.weights), users=np.array([0]))
        sums = client_round(download, Shard(self.histories, np.arange(CHUNK * CHUNKS))).sums
        return sum(value.nbytes for value in sums.values() if not isinstance(value, SparseSum))


def measure(rounds: int) -> list[dict[str, Any]]:
    nodes = {(name, steps): Node(name, steps) for name in ENCODERS for steps in (1, 3)}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in nodes}
    for turn in range(rounds + 1):
        for key, node in nodes.items():
            began = time.process_time()
            node()
            if turn:
                seconds[key].append(time.process_time() - began)
    found = []
    for name in ENCODERS:
        ms = {steps: 1e3 * statistics.median(seconds[name, steps]) / (CHUNK * CHUNKS * steps) for steps in (1, 3)}
        node = nodes[name, 1]
        parameters = sum(leaf.numel() for leaf_name, leaf in node.weights.items() if leaf_name != ITEMS)
        found.append(
            {
                "encoder": name,
                "ms_a_step": ms[1],
                "ms_a_step_of_three": ms[3],
                "parameters": parameters,
                "upload_bytes": node.upload_bytes(),
                "settings": results.settings_hash([job(name, steps).model_dump(mode="json") for steps in (1, 3)]),
            }
        )
    return found


def trial(name: str) -> dict[str, Any]:
    """NDCG@10 on the test events after few rounds, mean loss, no counts, no clip: how fast an encoder learns, not what it can reach."""
    config = job(name, 1).model_dump(mode="json")
    config |= {"data": {"path": "ml-1m.inter.gz"}, "privacy": {}, "system": {"workers": 1, "checkpoint_every": 10_000, "checkpoint_seconds": 10_000.0}}
    config |= {"local": {"lr": 1.0}, "server": {"rounds": TRIAL_ROUNDS, "cohort": TRIAL_COHORT, "lr": 0.004, "warmup": 10}}
    whole = check(RunConfig, config, where="encoders")
    dataset = load_dataset(whole.data)
    with TemporaryDirectory() as folder:
        report = simulate(whole, dataset=dataset, out=Path(folder) / "run").report
    return {
        "trial": name,
        "rounds": TRIAL_ROUNDS,
        "cohort": TRIAL_COHORT,
        "seconds": report["cost"]["seconds"],
        "unseen": report["test"]["unseen"]["ndcg@10"],
        "all": report["test"]["all"]["ndcg@10"],
        "settings": results.settings_hash(whole.model_dump(mode="json")),
    }


def page() -> str:
    """docs/encoders.md, from the newest rows."""
    rows = {name: results.newest("encoders", encoder=name) for name in ENCODERS}
    trials = {name: results.newest("encoders", trial=name) for name in ENCODERS}
    cpu = next((row["cpu"] for row in rows.values() if row), "a CPU")
    lines = [PAGE_TOP + "\n".join(f"| `{name}` | {ABOUT[name]} |" for name in ENCODERS), "", "## What they cost", ""]
    lines += [
        f"Width 64, window {WINDOW}, 256 negatives a user, chunks of {CHUNK} users, one thread of {cpu}.",
        "The time is CPU time of a node's whole work for a user, scores of candidates included. From the second step on users no longer hold the same",
        "weights, which costs most where products are small (`gru4rec` takes one a position); drawing is done once for all steps.",
        f"Parameters are those beside the item table, which has {64 * (ITEMS_IN_ALL + 1):,} here; the upload is that of one user, table included.",
        "",
        "| encoder | settings | ms a user, one step | ms a user and step, three steps | parameters | upload |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if row:
            lines.append(
                f"| `{name}` | {ENCODERS[name][1]} | {row['ms_a_step']:.2f} | {row['ms_a_step_of_three']:.2f} | {row['parameters']:,} "
                f"| {row['upload_bytes']:,} bytes |"
            )
    if any(trials.values()):
        lines += [
            "",
            "## How fast they learn",
            "",
            f"ML-1M, {TRIAL_ROUNDS} rounds of {TRIAL_COHORT} users, one step, the settings above, encoder alone (no counts, no head), one seed: a short",
            "trial, and not what an encoder reaches (`--trial`). A cloze asks fewer positions and has to find the newest event first; it needs",
            "many more rounds.",
            "",
            "| encoder | NDCG@10 `unseen` | NDCG@10 `all` |",
            "|---|---|---|",
        ]
        lines += [f"| `{name}` | {row['unseen']:.4f} | {row['all']:.4f} |" for name, row in trials.items() if row]
    return "\n".join([*lines, "", PAGE_BOTTOM])


def keep(row: dict[str, Any], *, dry: bool) -> None:
    if not dry:
        results.append("encoders", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each")
    parser.add_argument("--trial", nargs="*", metavar="ENCODER", help="train these on ML-1M instead; none named: all")
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.trial is None:
        for row in measure(arguments.rounds):
            print(
                f"{row['encoder']:9s} {row['ms_a_step']:6.3f} ms a user, {row['ms_a_step_of_three']:6.3f} ms a user and step of three, "
                f"{row['parameters']:7,} parameters, {row['upload_bytes']:9,} bytes up"
            )
            keep(row, dry=arguments.dry)
    else:
        for name in arguments.trial or ENCODERS:
            row = trial(name)
            print(f"{name:9s} NDCG@10 unseen {row['unseen']:.4f}, all {row['all']:.4f}; {row['seconds']:.0f} s", flush=True)
            keep(row, dry=arguments.dry)
    if not arguments.dry:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
