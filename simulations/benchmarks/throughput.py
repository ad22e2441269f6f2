"""Users a second of whole federated rounds, beside a plain batch of the same windows and a Python loop over users.

The job: ML-1M, SASRec of width 64, 2 blocks, window 50, 256 negatives a user, one thread, every update clipped. A whole
round is sampling, messages, windows, training, clipping, integer sums, folding and the optimiser. The three are timed in
turn, round after round, in one process, so that a drifting machine drifts under all of them; medians are printed.

    python simulations/benchmarks/throughput.py            (needs ml-1m.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import results
import torch
import torch.nn.functional as F
from fedssl_client.trainer import answer
from fedssl_server.rounds import Run, owners, run_rounds
from fedssl_simulations import grids
from fedssl_simulations.simulated_nodes import make_shards
from peer_jobs.plain_sasrec import encode
from torch import Tensor

from fedssl import seeds
from fedssl.checking import check
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset, load_dataset
from fedssl.data.windows import draw_windows
from fedssl.parts import initial_weights
from fedssl.recipe import Recipe, make_recipe
from fedssl.server_round import first_state

COHORT, NEGATIVES, WINDOW, LR, BATCH = 512, 256, 50, 0.1, 64
OF_THE_FLOOR = {1: 0.60, 3: 0.55}
"""What is wanted, by local steps."""


def job(steps: int) -> RunConfig:
    return check(
        RunConfig,
        {
            "data": {"path": "ml-1m.inter.gz"},
            "encoder": {"width": 64, "blocks": 2, "heads": 2, "hidden": 128, "window": WINDOW},
            "task": [{"name": "next-item", "negatives": NEGATIVES}],
            "local": {"steps": steps, "lr": LR},
            "server": {"rounds": 10_000, "cohort": COHORT, "optimizer": "adam"},
            "privacy": {"clip_norm": 1.0},
            "system": {"workers": 1},
        },
        where="throughput",
    )


# ---- the plain batch: ordinary torch, no users ----


def plain_step(weights: dict[str, Tensor], read: Tensor, target: Tensor, negatives: Tensor) -> None:
    """One SGD step on a batch; padding is on the right here, which causal attention never sees."""
    table = weights["items"]
    hidden = encode(weights, F.embedding(read, table), heads=2, blocks=2)
    right = (hidden * F.embedding(target, table)).sum(-1, keepdim=True)
    wrong = (hidden @ F.embedding(negatives, table).transpose(1, 2)).masked_fill(target[:, :, None] == negatives[:, None], -1e9)
    loss = F.cross_entropy(torch.cat([right, wrong], -1).flatten(0, 1), torch.where(target.flatten() > 0, 0, -100))
    loss.backward()
    with torch.no_grad():
        for leaf in weights.values():
            leaf -= LR * leaf.grad  # type: ignore[operator]
            leaf.grad = None


def batches(dataset: Dataset, users: np.ndarray[Any, Any], steps: int, round: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The windows of these users, right-padded, those of like length together: (read, target, negatives), each with S in front."""
    order = users[np.argsort(dataset.histories.training_lengths[users], kind="stable")]
    found = []
    for first in range(0, len(order), BATCH):
        mine = order[first : first + BATCH]
        keys = seeds.keys_of_users(seeds.key("throughput", round), mine)
        windows = draw_windows(dataset.histories, mine, keys, steps=steps, windows=1, length=WINDOW)[:, :, 0]
        shifted = np.zeros_like(windows)
        for place in np.ndindex(windows.shape[:2]):
            real = windows[place][windows[place] > 0]
            shifted[place][: len(real)] = real
        whole = torch.from_numpy(shifted).transpose(0, 1)
        negatives = torch.from_numpy(1 + seeds.integers(keys ^ np.uint64(1), NEGATIVES, dataset.catalogue.num_items))
        found.append((whole[..., :-1], whole[..., 1:], negatives))
    return found


def plain_round(weights: dict[str, Tensor], prepared: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for read, target, negatives in prepared:
        for step in range(len(read)):
            plain_step(weights, read[step], target[step], negatives)


def loop_round(start: dict[str, Tensor], prepared: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """A Python loop over users: each trains a copy on the rows it touches, then is clipped and added. Ordinary torch."""
    total = {name: torch.zeros_like(leaf) for name, leaf in start.items()}
    for read, target, negatives in prepared:
        for user in range(read.shape[1]):
            touched, local = torch.unique(torch.cat([read[:, user].flatten(), target[:, user].flatten(), negatives[user]]), return_inverse=True)
            size = read[:, user].numel()
            ids_read, ids_target, ids_negative = local[:size].view(len(read), -1), local[size : 2 * size].view(len(read), -1), local[2 * size :]
            ids_target = torch.where(target[:, user] > 0, ids_target, 0)
            own = {name: (leaf[touched] if name == "items" else leaf).clone().requires_grad_() for name, leaf in start.items()}
            for step in range(len(read)):
                plain_step(own, ids_read[step][None], ids_target[step][None], ids_negative[None])
            with torch.no_grad():
                update = {name: own[name] - (start[name][touched] if name == "items" else start[name]) for name in own}
                norm = torch.stack([leaf.norm() for leaf in update.values()]).norm()
                factor = (1.0 / norm).clamp(max=1.0)
                for name, leaf in update.items():
                    total[name].index_add_(0, touched, leaf * factor) if name == "items" else total[name].add_(leaf * factor)


# ---- whole federated rounds ----


class Rounds:
    """Whole rounds of our own, one a call; `inside` sums the seconds of client_round."""

    def __init__(self, recipe: Recipe, dataset: Dataset, config: RunConfig, folder: Path):
        self.inside = 0.0
        shards = make_shards(dataset, config, folder)
        handle = grids.handler_of(shards)
        real = answer

        def timed(download: Any, shard: Any) -> Any:
            began = time.perf_counter()
            upload = real(download, shard)
            self.inside += time.perf_counter() - began
            return upload

        grids.answer = timed
        self.grid = grids.InProcessGrid(handle, {1: {"partition-id": 0}})
        node_ids, owner = owners({1: shards[0].users}, dataset.histories.num_users)
        self.run = Run("throughput", recipe, dataset.histories.num_users, node_ids, owner)
        self.state = first_state(recipe)

    def __call__(self) -> None:
        target = self.state.round + 1

        def stop() -> bool:
            return self.state.round >= target

        def keep(state: Any, facts: Any) -> None:
            self.state = state

        self.state = run_rounds(self.grid, self.run, self.state, on_round=keep, should_stop=stop)


def measure(dataset: Dataset, steps: int, rounds: int) -> dict[str, Any]:
    config = job(steps)
    recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash)
    users = np.random.default_rng(0).choice(dataset.histories.num_users, COHORT, replace=False)
    prepared = batches(dataset, users, steps, 0)
    some = [(read[:, ::8], target[:, ::8], negatives[::8]) for read, target, negatives in prepared]
    weights = {name: leaf.clone().requires_grad_() for name, leaf in initial_weights(recipe).items()}
    start = initial_weights(recipe)
    with TemporaryDirectory() as folder:
        whole = Rounds(recipe, dataset, config, Path(folder))
        tried: dict[str, tuple[Callable[[], None], int]] = {
            "plain batch (the floor)": (lambda: plain_round(weights, prepared), COHORT),
            "federated rounds": (whole, COHORT),
            "Python loop over users": (lambda: loop_round(start, some), sum(read.shape[1] for read, _, _ in some)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in tried}
        inside = 0.0
        for turn in range(rounds + 1):
            for name, (call, count) in tried.items():
                whole.inside = 0.0
                began = time.perf_counter()
                call()
                took = time.perf_counter() - began
                if turn:
                    seconds[name].append(took / count)
                    inside += whole.inside
        whole.grid.close()
    median = {name: statistics.median(found) for name, found in seconds.items()}
    overhead = 1 - inside / (sum(seconds["federated rounds"]) * COHORT)
    floor, ours, loop = median.values()
    return {
        "steps": steps,
        "ms_a_user": {name: 1e3 * value for name, value in median.items()},
        "users_per_second": {name: 1 / value for name, value in median.items()},
        "of_the_floor": floor / ours,
        "times_the_loop": loop / ours,
        "outside_client_round": overhead,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(job(1).data)
    for steps in (1, 3):
        row = measure(dataset, steps, arguments.rounds)
        print(f"{steps} local step{'s' * (steps > 1)}, cohort {COHORT}, one thread")
        for name, value in row["ms_a_user"].items():
            print(f"  {name:26s} {value:7.3f} ms a user {row['users_per_second'][name]:8.0f} users a second")
        print(f"  of the floor: {row['of_the_floor']:.2f} (wanted {OF_THE_FLOOR[steps]:.2f})   times the loop: {row['times_the_loop']:.2f} (wanted 2.0)")
        print(f"  outside client_round: {row['outside_client_round']:.1%} of the round (wanted under 5 %)", flush=True)
        if not arguments.dry:
            results.append("throughput", {**row, "settings": results.settings_hash(job(steps).model_dump(mode="json"))})


if __name__ == "__main__":
    main()
