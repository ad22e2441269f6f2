"""Users a second of the same job by ours, by Apple's pfl-research and by Flower's own simulation runtime, one thread of training each.

The job is that of `throughput.py`: ML-1M, SASRec of width 64, 2 blocks, window 50, 256 negatives a user, every update clipped to norm 1, Adam on
the server, one local step and three. Before anything is timed, some users are trained by all three from the same weights, windows and
negatives, and their clipped updates compared; it stops where they differ. Then the three take turns, round after round, so that a drifting
machine drifts under all of them; medians are printed.

Each peer has an environment of its own, made once, and runs in a process of its own; how it is set up for speed stands at the top of
`peer_jobs/pfl_job.py` and `peer_jobs/flower_job.py`. Ours draws windows and negatives inside the round and adds in whole steps; theirs are drawn
before. Flower runs twice: with a node for each of the 6,040 users, which is the job, and with no more nodes than a small round asks, which is
the least that its runtime can cost a user, because it looks through all nodes for messages again and again.

    python simulations/benchmarks/peers.py            (needs ml-1m.inter.gz where $FEDSSL_DATA points, and a package index for pip)
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import results
import torch
from peer_jobs.job_folder import Settings, UserTensors, read_updates, write_job
from throughput import COHORT, Rounds, job
from torch import Tensor

from fedssl.client_round import Shard, client_round
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset, load_dataset
from fedssl.local_training import Batch, make_batch
from fedssl.parts import initial_weights, make_parts
from fedssl.privacy.manifest import declared_sums
from fedssl.recipe import Recipe, make_recipe
from fedssl.records import Address, Download
from fedssl.weights import Weights, to_numpy, unflatten

JOBS = Path(__file__).parent / "peer_jobs"
ROOT = Path(__file__).parents[2]
PEERS = {"pfl-research": ("pfl_job.py", "pfl"), "flower": ("flower_job.py", "flwr")}
"""Each peer's script, and the package whose version is told. Its pins are in peer_jobs/NAME.txt."""

FEW = 64
RUNS = {"pfl-research": ("pfl-research", COHORT), "Flower": ("flower", COHORT), f"Flower, {FEW} nodes": ("flower", FEW)}
"""What is timed beside ours: which peer, and how many users a round. One with few nodes trains the same users in each round."""

WANTED = {"pfl-research": {1: 4, 3: 3}, "Flower": {1: 100, 3: 100}}
CHECKED_USERS, CHECKED_CLIPS = 6, (1.0, 0.1)
TOLERANCE = 1e-4
"""How far updates may lie apart, as a share of their length: ours are clipped to 1 - 2^-16 of the bound and cut to whole steps of 2^-24."""


# ---- environments ----


def make_environment(name: str, folder: Path, pip_args: list[str]) -> Path:
    """The Python of the peer's environment, made where it is not there or its pins have changed."""
    pins = JOBS / f"{name}.txt"
    home = folder / name
    python, stamp = home / "bin" / "python", home / "installed.txt"
    if not stamp.exists() or stamp.read_text() != pins.read_text():
        print(f"making the environment of {name} in {home}", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *pip_args, "-r", pins], check=True)
        stamp.write_text(pins.read_text())
    return python


def version(python: Path, package: str) -> str:
    told = subprocess.run([python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"], capture_output=True, text=True, check=True)
    return told.stdout.strip()


# ---- the job, as the peers get it ----


def tensors_of(batch: Batch, place: int) -> UserTensors:
    """What one user of a batch reads, without the padding it shares with the others."""
    assert batch.rows_UK is not None
    read_SL, target_SL = batch.sequences[0]["read"][place, :, 0], batch.sequences[0]["target"][place, :, 0]
    rows_K, own = batch.rows_UK[place], 1 + int(torch.maximum(read_SL, target_SL).max())
    own_M, candidates_N = rows_K[1:own], rows_K[own:][rows_K[own:] > 0]
    real = int((read_SL[0] > 0).sum())
    S = len(read_SL)
    return UserTensors(own_M.expand(S, -1), candidates_N.expand(S, -1), read_SL[:, -real:] - 1, target_SL[:, -real:] - 1)


def draw_users(recipe: Recipe, dataset: Dataset, users: np.ndarray[Any, Any]) -> list[UserTensors]:
    """What the first round draws for these users."""
    tasks, found = make_parts(recipe).tasks, []
    for first in range(0, len(users), 64):
        some = users[first : first + 64]
        base = (recipe.seed, "training", 1)
        batch = make_batch(tasks, dataset.histories, some, some, base=base, local=recipe.local, window=recipe.encoder.window, num_items=recipe.num_items)
        found += [tensors_of(batch, place) for place in range(len(some))]
    return found


def settings_of(config: RunConfig, *, cohort: int, nodes: int, rounds: int) -> Settings:
    server = config.server
    assert config.privacy.clip_norm is not None
    return Settings(
        steps=config.local.steps,
        lr=config.local.lr,
        clip_norm=config.privacy.clip_norm,
        heads=config.encoder.heads,
        blocks=config.encoder.blocks,
        cohort=cohort,
        nodes=nodes,
        rounds=rounds,
        server_lr=server.lr,
        momentum=server.momentum,
        beta2=server.beta2,
        epsilon=server.epsilon,
    )


# ---- the same job? ----


def our_update(recipe: Recipe, dataset: Dataset, weights: Weights, user: int) -> tuple[dict[str, Tensor], float]:
    """What a node uploads for one user in the first round, in units of the weights; and that user's loss."""
    shard = Shard(dataset.histories, np.arange(dataset.histories.num_users))
    upload = client_round(Download(Address("peers", "training", 1), recipe, to_numpy(weights), users=np.array([user])), shard)
    layout = make_parts(recipe).layout
    step = declared_sums(recipe, "training", num_weights=layout.num_weights)["update"].step
    flat = upload.sums["update"]
    assert isinstance(flat, np.ndarray)
    return unflatten(torch.from_numpy(flat.astype(np.float64) * step), layout), float(shard.notes.losses_U[0])


def check_same_job(steps: int, dataset: Dataset, pythons: Mapping[str, Path]) -> dict[str, float]:
    """How far each peer's clipped updates lie from ours, at most, as a share of their length. Exits where they are another job's."""
    lengths = dataset.histories.training_lengths
    users = np.argsort(lengths, kind="stable")[np.linspace(0, len(lengths) - 1, CHECKED_USERS).astype(int)]
    apart = dict.fromkeys(pythons, 0.0)
    clipped = 0
    for clip in CHECKED_CLIPS:
        config = job(steps)
        config = config.model_copy(update={"privacy": config.privacy.model_copy(update={"clip_norm": clip})})
        recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash)
        weights = initial_weights(recipe)
        with TemporaryDirectory() as name:
            folder = Path(name)
            write_job(folder, settings_of(config, cohort=len(users), nodes=len(users), rounds=2), weights, draw_users(recipe, dataset, users))
            for peer, python in pythons.items():
                subprocess.run([python, JOBS / PEERS[peer][0], folder, *map(str, range(len(users)))], check=True, env=quiet_environment(folder))
            for place, user in enumerate(users):
                ours, our_loss = our_update(recipe, dataset, weights, int(user))
                length = float(torch.cat([leaf.flatten() for leaf in ours.values()]).norm())
                clipped += length > 0.999 * clip
                for peer in pythons:
                    theirs, their_loss = read_updates(folder / f"{peer}.npz", place)
                    assert {name: leaf.shape for name, leaf in theirs.items()} == {name: leaf.shape for name, leaf in ours.items()}, peer
                    difference = float(torch.cat([(theirs[name] - ours[name]).flatten() for name in ours]).norm()) / length
                    apart[peer] = max(apart[peer], difference)
                    if difference > TOLERANCE or abs(their_loss - our_loss) > TOLERANCE:
                        sys.exit(f"{peer} does another job: user {user}'s update is {difference:.1e} of its length from ours, loss {their_loss} for {our_loss}")
    parameters = sum(leaf.numel() for leaf in ours.values())
    print(f"  the same job: {parameters:,} parameters, {len(users)} users at clips {CHECKED_CLIPS}, {clipped} of {2 * len(users)} updates clipped")
    for peer, share in apart.items():
        print(f"    {peer:13s} updates at most {share:.1e} of their length from ours (allowed {TOLERANCE:g})", flush=True)
    return apart


# ---- turns ----


def quiet_environment(folder: Path) -> dict[str, str]:
    """One thread, nothing told to anybody, and Ray's files in a short path of their own."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FLWR_", "FEDSSL_", "PYTHONPATH"))},
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


@contextmanager
def started(peer: str, python: Path, folder: Path) -> Iterator[Callable[[], float]]:
    """A peer's process that waits for its first round; a call lets it run one and gives the seconds.

    Between its rounds it is stopped: Flower's runtime never rests, and would slow the others.
    """
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [python, JOBS / PEERS[peer][0], folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=quiet_environment(folder)
        )
    assert process.stdin is not None and process.stdout is not None

    def told(word: str) -> str:
        for line in process.stdout or ():
            if line.startswith(word):
                return line.removeprefix(word)
        sys.exit(f"{peer} ended before it said {word}:\n{(folder / 'log').read_text()[-4000:]}")

    def round() -> float:
        assert process.stdin is not None
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        took = float(told("ROUND"))
        process.send_signal(signal.SIGSTOP)
        return took

    try:
        told("READY")
        process.send_signal(signal.SIGSTOP)
        yield round
        process.send_signal(signal.SIGCONT)
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def measure(steps: int, dataset: Dataset, pythons: Mapping[str, Path], *, rounds: int) -> dict[str, Any]:
    """All of them in turn, ``rounds`` times after a first round that is not counted."""
    apart = check_same_job(steps, dataset, pythons)
    config = job(steps)
    recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash)
    users = draw_users(recipe, dataset, np.arange(dataset.histories.num_users))
    with ExitStack() as stack:
        ours = Rounds(recipe, dataset, config, Path(stack.enter_context(TemporaryDirectory())))
        stack.callback(ours.grid.close)

        def our_round() -> float:
            began = time.perf_counter()
            ours()
            return time.perf_counter() - began

        calls: dict[str, tuple[Callable[[], float], int]] = {"ours": (our_round, COHORT)}
        for name, (peer, cohort) in RUNS.items():
            # Ray's sockets need a short path.
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True)))
            nodes = len(users) if cohort == COHORT else cohort
            write_job(folder, settings_of(config, cohort=cohort, nodes=nodes, rounds=rounds + 1), initial_weights(recipe), users)
            calls[name] = stack.enter_context(started(peer, pythons[peer], folder)), cohort
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):
            for name, (call, cohort) in calls.items():
                took = call() / cohort
                if turn:
                    seconds[name].append(took)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "steps": steps,
        "ms_a_user": {name: 1e3 * value for name, value in median.items()},
        "users_per_second": {name: 1 / value for name, value in median.items()},
        "times": {name: median[name] / median["ours"] for name in RUNS},
        "cohorts": {name: cohort for name, (_, cohort) in calls.items()},
        "updates_apart": apart,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3], help="local steps")
    parser.add_argument("--environments", type=Path, default=ROOT / ".cache" / "peers", help="where the peers' environments are, or are made")
    parser.add_argument("--pip-args", default="", help="arguments for pip, such as another index")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pythons = {peer: make_environment(peer, arguments.environments, arguments.pip_args.split()) for peer in PEERS}
    versions = {package: version(pythons[peer], package) for peer, (_, package) in PEERS.items()}
    dataset = load_dataset(job(1).data)
    for steps in arguments.steps:
        began = time.perf_counter()
        print(f"{steps} local step{'s' * (steps > 1)}, {', '.join(f'{name} {found}' for name, found in versions.items())}")
        row = measure(steps, dataset, pythons, rounds=arguments.rounds)
        print(f"  {'':16s} {'users a second':>14s} {'ms a user':>10s} {'users a round':>14s} {'ours is faster by':>18s}")
        for name, value in row["ms_a_user"].items():
            times = f"{row['times'][name]:18.1f}" if name in row["times"] else ""
            wanted = f" (wanted {WANTED[name][steps]})" if steps in WANTED.get(name, {}) else ""
            print(f"  {name:16s} {row['users_per_second'][name]:14.0f} {value:10.2f} {row['cohorts'][name]:14d} {times}{wanted}", flush=True)
        if not arguments.dry:
            stamp = {"versions": versions, "seconds": time.perf_counter() - began, "settings": results.settings_hash(job(steps).model_dump(mode="json"))}
            results.append("peers", {**row, **stamp})


if __name__ == "__main__":
    main()
