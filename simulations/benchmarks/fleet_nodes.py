"""Two hundred nodes that speak Flower's Fleet protocol from one process hold rounds on one SuperLink: the server's memory, and time a node a round.

The server is an operator's: `fedssl server start` and `fedssl server run`, TLS, node authentication, rounds under a privacy plan in which everybody is
asked. A node is one user; it trains and answers with the code of a device's child process, and asks every 3 s, as a SuperNode does.

    python simulations/benchmarks/fleet_nodes.py --nodes 200 --rounds 5
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import results
import torch
from fedssl_client.trainer import answer
from fedssl_simulations.run_files import write_run
from fleet_node import FleetNode
from flwr.app import Message
from trial_server import TrialServer, Watch

from fedssl import wire
from fedssl.catalogue import write_catalogue
from fedssl.client_round import Shard, open_shard, write_shard
from fedssl.config import DataConfig, RunConfig
from fedssl.data.dataset import make_dataset
from fedssl.data.synthetic import synthesize

ITEMS = 1000


def config_of(nodes: int, rounds: int) -> RunConfig:
    """Everybody is asked in each round (a rate of 1), Adam, a head, dropout, noise by the server."""
    return RunConfig.model_validate(
        {
            "encoder": {"width": 16, "blocks": 1, "heads": 2, "hidden": 32, "window": 20, "dropout": 0.1},
            "head": {"name": "user-vector"},
            "local": {"steps": 2, "lr": 0.1},
            "server": {"rounds": rounds, "cohort": nodes, "sampling": "poisson", "optimizer": "adam"},
            "privacy": {"clip_norm": 0.5, "noise_multiplier": 1.0, "delta": 1e-3},
        }
    )


_training = threading.Lock()
"""One node trains at a time: they share a process, on devices they do not."""


def answering(shard: Shard):
    """What a node with this shard answers to `hello` and to a Download."""

    def reply(message: Message) -> Message:
        if message.metadata.message_type == "query.hello":
            return Message(wire.hello_to_record_dict(wire.Hello(shard.users)), reply_to=message)
        with _training:
            return Message(wire.to_record_dict(answer(wire.download_from_record_dict(message.content), shard)), reply_to=message)

    return reply


def hold(folder: Path, nodes: int, rounds: int, state: str) -> dict[str, object]:
    """A run of so many rounds on so many nodes: what was measured."""
    config = config_of(nodes, rounds)
    dataset = make_dataset(synthesize(users=nodes, items=ITEMS, seed=3, mean_events=20.0), DataConfig(min_events=1))
    if dataset.histories.num_users != nodes:
        sys.exit(f"the data have {dataset.histories.num_users} users, not {nodes}")
    (folder / "start").mkdir()
    write_run(config, folder / "start" / "run.toml")
    write_catalogue(dataset.catalogue, folder / "start" / "catalogue.jsonl")
    names = [f"node-{number}" for number in range(nodes)]
    server = TrialServer(folder / "server", names, rounds={"nodes": nodes, "nodes_seconds": 300, "round_seconds": 300}, state=state)
    end = threading.Event()
    try:
        began = time.perf_counter()
        server.start()
        registered = time.perf_counter() - began
        fleet = []
        for number, name in enumerate(names):
            write_shard(folder / name, dataset.histories, np.array([number]), users_per_chunk=1)
            fleet.append(FleetNode(server.address, server.ca, server.key(name), answering(open_shard(folder / name)), end))
        for node in fleet:
            node.start()
        settings = [str(folder / "start" / "run.toml"), "--catalogue", str(folder / "start" / "catalogue.jsonl"), "--out", str(folder / "run")]
        began = time.perf_counter()
        running = server.command("run", *settings)
        watch = Watch([server.starting.pid, running.pid])
        code = running.wait(900)
        seconds = time.perf_counter() - began
        watch.stop()
    finally:
        end.set()
        server.end()
    if code:
        sys.exit(f"`fedssl server run` ended with {code}:\n{(folder / 'server' / 'run.log').read_text()[-3000:]}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [line["researcher_only"] for line in lines]
    return {
        "nodes": nodes,
        "rounds": len(lines),
        "answers": sum(node.answered for node in fleet),
        "returned": sum(node.returned for node in fleet),
        "refused": sum(sum(one["refused_for"].values()) for one in seen),
        "state": state,
        "round_seconds": [line["seconds"] for line in lines],
        "seconds": round(seconds, 1),
        "register_seconds": round(registered, 1),
        "seconds_a_node_a_round": round(sum(line["seconds"] for line in lines) / len(lines) / nodes, 4),
        "cpu_seconds_a_node_a_round": {name: round(used / len(lines) / nodes, 4) for name, used in sorted(watch.seconds.items())},
        "upload_bytes": seen[-1]["upload_bytes"] // nodes,
        "download_bytes": seen[-1]["download_bytes"] // nodes,
        "peak_rss_mb": {name: round(size / 1e6) for name, size in sorted(watch.bytes.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--state", choices=["disk", "memory"], default="memory", help="[superlink] state of server.toml")
    parser.add_argument("--keep", type=Path, help="a folder to work in, which stays")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        row = hold(folder, arguments.nodes, arguments.rounds, arguments.state)
    print(json.dumps(row, indent=1))
    if not arguments.dry:
        results.append("fleet_nodes", row)
    if row["refused"]:
        sys.exit(f"{row['refused']} answers were refused or missed")


if __name__ == "__main__":
    main()
