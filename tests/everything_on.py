"""One run with everything on, small enough to go over every kind of Grid; what it learned here is what it must learn there."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run, write_run
from fedssl_simulations.simulated_nodes import make_shards

from fedssl.catalogue import write_catalogue
from fedssl.checkpoints import list_checkpoints
from fedssl.client_round import write_shard
from fedssl.config import DataConfig, RunConfig
from fedssl.data.dataset import Dataset, make_dataset
from fedssl.data.synthetic import synthesize
from fedssl.privacy.keys import Keys

SETTINGS = """
seed = 5
[encoder]
width = 8
blocks = 1
heads = 1
hidden = 8
window = 8
dropout = 0.2
[[task]]
name = "next-item"
[counts]
lags = 2
clip_norm = 1.0
[head]
name = "user-vector"
[local]
steps = 2
lr = 0.1
[server]
rounds = 5
cohort = 20
sampling = "poisson"
optimizer = "adam"
[privacy]
clip_norm = 0.5
noise_multiplier = 0.3
counts_noise_multiplier = 0.2
delta = 1e-3
[evaluation]
ks = [5]
[system]
shards = 2
"""


def lay_out(config: RunConfig, dataset: Dataset, folder: Path) -> tuple[list[Path], Path]:
    """Stores of two nodes that host the users of the simulation's two shards, and the run folder of a server."""
    shards = make_shards(dataset, config, folder)
    stores = [folder / f"node-{number}" for number in shards]
    for store, shard in zip(stores, shards.values(), strict=True):
        write_shard(store, dataset.histories, shard.users)
    run = folder / "run"
    run.mkdir()
    write_run(config, run / "run.toml")
    write_catalogue(dataset.catalogue, run / "catalogue.jsonl")
    return stores, run


TEST_KEYS = Keys(cohort=bytes(range(32)), noise=bytes(range(32, 64)))
"""Known to everybody, so they protect nobody: for this test alone."""


def give_keys(run: Path, keys: Keys) -> None:
    """Put keys where a server keeps its own."""
    (run / "secrets").mkdir(mode=0o700)
    for name, key in (("cohort.key", keys.cohort), ("noise.key", keys.noise)):
        (run / "secrets" / name).touch(mode=0o600)
        (run / "secrets" / name).write_bytes(key)


def learn_here(folder: Path, *, rounds: int = 5) -> tuple[RunConfig, Dataset, dict[str, bytes]]:
    """The run in this process, in ``folder``: its settings, its data, and all that it learned."""
    config = read_run(tomllib.loads(SETTINGS), [f"server.rounds={rounds}"])
    dataset = make_dataset(synthesize(users=50, items=200, seed=3, mean_events=10.0), DataConfig(min_events=1))
    simulate(config, out=folder, dataset=dataset, keys=TEST_KEYS)
    everything = learned(folder, sorted((folder / "heads").glob("node-*")))
    arrays = ("weights", "optimizer", "popularity", "counts")
    assert everything.keys() == {"checkpoint", *(f"{name}.safetensors" for name in arrays), "heads of node 0", "heads of node 1"}
    assert everything["checkpoint"] == b"round-%06d" % rounds
    assert all(any(value) for value in everything.values())
    return config, dataset, everything


def learned(run: Path, heads: Sequence[Path]) -> dict[str, bytes]:
    """All that was learned: the newest checkpoint's name and files, and the heads of each node, from the folder it keeps them in."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    files = {"checkpoint": newest.name.encode()} | {path.name: path.read_bytes() for path in sorted(newest.glob("*.safetensors"))}
    return files | {f"heads of node {number}": (folder / "user-vector.f32").read_bytes() for number, folder in enumerate(heads)}
