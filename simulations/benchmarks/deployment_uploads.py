"""What a node may send that it should not: is the model of a deployed run the one that the others alone would have made, to the byte?

Three nodes speak Flower's Fleet protocol to a server as an operator starts it (TLS, node authentication). Two are honest; the third lies in
another way in each round: nan, 1e30, other shapes, another round, 100 MB, a replay, an older version of the wire, and more. Beside them a node that is
not registered, and one that trusts another authority, try to join. The weights and the optimiser's memory at the end are held to a run
in this process in which the third node failed in those rounds.

    python simulations/benchmarks/deployment_uploads.py
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fleet_node
import numpy as np
import results
import torch
from fedssl_client.trainer import answer
from fedssl_server.processes import flower_environment, free_ports, program
from fedssl_server.serve import serve
from fedssl_server.server_folder import make_server_folder
from fedssl_server.trial_keys import make_node_key
from fedssl_simulations.grids import InProcessGrid
from fedssl_simulations.run_files import write_run
from fleet_node import FleetNode
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from trial_server import TrialServer

from fedssl import wire
from fedssl.catalogue import write_catalogue
from fedssl.checkpoints import list_checkpoints
from fedssl.client_round import Shard, open_shard, write_shard
from fedssl.config import DataConfig, RunConfig
from fedssl.data.dataset import Dataset, make_dataset
from fedssl.data.synthetic import synthesize
from fedssl.records import Download, SparseSum, Upload

USERS = 6
LIAR = 2
Lie = Callable[[Download, Upload], RecordDict]


def with_array(upload: Upload, name: str, array: np.ndarray[Any, Any]) -> RecordDict:
    """The upload with one sum exchanged for any array at all, float too."""
    content = wire.to_record_dict(upload)
    arrays = dict(content["tensors"])
    stype = next(iter(arrays.values())).stype
    arrays[f"sum/{name}"] = Array(str(array.dtype), array.shape, stype, array.tobytes())
    content["tensors"] = ArrayRecord(arrays)
    return content


def with_header(upload: Upload, **changes: Any) -> RecordDict:
    content = wire.to_record_dict(upload)
    content["header"] = ConfigRecord({"json": json.dumps({**json.loads(str(content["header"]["json"])), **changes})})
    return content


def size_of(upload: Upload) -> int:
    update = upload.sums["update"]
    assert not isinstance(update, SparseSum)
    return update.size


def with_sums(upload: Upload, change: Callable[[Any], Any]) -> RecordDict:
    return wire.to_record_dict(replace(upload, sums={**upload.sums, "update": change(upload.sums["update"])}))


def at(upload: Upload, **place: Any) -> RecordDict:
    return wire.to_record_dict(replace(upload, address=replace(upload.address, **place)))


_before: list[RecordDict] = []
"""An honest answer to an earlier round."""

LIES: dict[str, tuple[str, Lie]] = {
    "nan": ("form", lambda download, upload: with_array(upload, "update", np.full(size_of(upload), np.nan, "<f4"))),
    "1e30": ("form", lambda download, upload: with_array(upload, "update", np.full(size_of(upload), 1e30, "<f4"))),
    "largest whole numbers": ("coordinates", lambda download, upload: with_sums(upload, lambda array: np.full_like(array, np.iinfo(array.dtype).max))),
    "one coordinate more": ("form", lambda download, upload: with_array(upload, "update", np.zeros(size_of(upload) + 1, "<i4"))),
    "100 MB": ("form", lambda download, upload: with_array(upload, "update", np.arange(25_000_000, dtype="<i4"))),
    "a sum that was not declared": ("names", lambda download, upload: with_array(upload, "history", np.arange(5, dtype="<i4"))),
    "another round": ("exchange", lambda download, upload: at(upload, round=upload.address.round + 1)),
    "another run": ("exchange", lambda download, upload: at(upload, run="another")),
    "a replay": ("exchange", lambda download, upload: _before[0]),
    "another recipe": ("recipe", lambda download, upload: wire.to_record_dict(replace(upload, recipe="0" * 64))),
    "an older version": ("version", lambda download, upload: with_header(upload, format=0)),
    "no upload at all": ("form", lambda download, upload: RecordDict({})),
}


SHORT = ("nan", "1e30", "one coordinate more", "another round", "an older version")
"""Lies enough for a test."""


def config_of(lies: list[str]) -> RunConfig:
    """An honest round, one round for each lie, an honest round; everybody is asked in each, every update is clipped, no noise."""
    return RunConfig.model_validate(
        {
            "encoder": {"width": 8, "blocks": 1, "heads": 1, "hidden": 8, "window": 8},
            "local": {"steps": 1, "lr": 0.1},
            "server": {"rounds": len(lies) + 2, "cohort": USERS, "optimizer": "adam"},
            "privacy": {"clip_norm": 0.5},
        }
    )


class Node:
    """A node's answers. ``lies``: what it sends instead in round 2, 3, ...; ``says``: the recipe formats that it claims to read."""

    def __init__(self, shard: Shard, lies: list[str] | None = None):
        self.shard, self.lies, self.says = shard, lies or [], wire.RECIPE_FORMAT

    def __call__(self, message: Message) -> Message:
        if message.metadata.message_type == "query.hello":
            return Message(wire.hello_to_record_dict(wire.Hello(self.shard.users, recipe_formats=(self.says,))), reply_to=message)
        download = wire.download_from_record_dict(message.content)
        upload = answer(download, self.shard)
        content, number = wire.to_record_dict(upload), download.address.round - 2
        if self.lies and number < 0:
            _before[:] = [content]
        if 0 <= number < len(self.lies):
            content = LIES[self.lies[number]][1](download, upload)
        return Message(content, reply_to=message)


def expected(folder: Path, config: RunConfig, dataset: Dataset, lies: list[str]) -> dict[str, bytes]:
    """What the run learns where the third node says in those rounds that it failed."""
    lay_out(folder, config, dataset)
    shards = [open_shard(folder.parent / f"node-{number}") for number in range(3)]

    def handle(message: Message, context: Context) -> Message:
        download, number = wire.download_from_record_dict(message.content), int(context.node_config["partition-id"])
        if number == LIAR and 0 <= download.address.round - 2 < len(lies):
            raise RuntimeError("it lies in this round")
        return Message(wire.to_record_dict(answer(download, shards[number])), reply_to=message)

    with InProcessGrid(handle, {number + 1: {"partition-id": number} for number in range(3)}) as grid:
        serve(grid, {number + 1: shard.users for number, shard in enumerate(shards)}, folder)
    return learned(folder)


def lay_out(folder: Path, config: RunConfig, dataset: Dataset) -> None:
    folder.mkdir()
    write_run(config, folder / "run.toml")
    write_catalogue(dataset.catalogue, folder / "catalogue.jsonl")


def learned(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(list_checkpoints(folder / "checkpoints")[-1].glob("*.safetensors"))}


def strangers(folder: Path, server: TrialServer) -> dict[str, subprocess.Popen[bytes]]:
    """A SuperNode whose key nobody registered, and one that trusts another authority than the server's."""
    make_server_folder(folder / "elsewhere")
    make_node_key(folder, "stranger")
    ways = {"not registered": (server.ca, folder / "stranger.key"), "another authority": (folder / "elsewhere" / "ca.crt", server.key("node-3"))}
    found = {}
    for (name, (ca, key)), port in zip(ways.items(), free_ports(2), strict=True):
        command = [program("flower-supernode"), "--superlink", server.address, "--root-certificates", str(ca), "--auth-supernode-private-key", str(key)]
        with (folder / f"{name}.log").open("wb") as log:
            found[name] = subprocess.Popen([*command, "--isolation", "process", "--port", str(port)], stdout=log, stderr=log, env=flower_environment(folder))
    return found


def hold(folder: Path, lies: list[str], *, is_short: bool) -> dict[str, Any]:
    """A deployed run with these lies: what was refused, as what, and whether the model is the others' own. ``is_short``: no node of an older version."""
    config = config_of(lies)
    dataset = make_dataset(synthesize(users=USERS, items=100, seed=3, mean_events=12.0), DataConfig(min_events=1))
    for number in range(3):
        write_shard(folder / f"node-{number}", dataset.histories, np.arange(2 * number, 2 * number + 2))
    logging.disable(logging.WARNING)  # Of the run in this process, in which a node fails on purpose.
    wanted = expected(folder / "expected", config, dataset, lies)
    lay_out(folder / "settings", config, dataset)
    server = TrialServer(folder / "server", [f"node-{number}" for number in range(4)], rounds={"nodes": 3, "round_seconds": 120, "nodes_seconds": 300})
    fleet_node.IDLE_SECONDS, end = 0.3, threading.Event()
    nodes = [Node(open_shard(folder / f"node-{number}"), lies if number == LIAR else None) for number in range(3)]
    beside: dict[str, subprocess.Popen[bytes]] = {}
    try:
        server.start()
        beside = strangers(folder, server)
        for number, node in enumerate(nodes):
            FleetNode(server.address, server.ca, server.key(f"node-{number}"), node, end).start()
        begin = ["run", str(folder / "settings" / "run.toml"), "--catalogue", str(folder / "settings" / "catalogue.jsonl"), "--out", str(folder / "run")]
        is_old_refused = None
        if not is_short:
            # A node of an older version: the run, which wants three, does not begin, and says which node and why. Then it is updated.
            nodes[LIAR].says = wire.RECIPE_FORMAT - 1
            is_old_refused = server.command(*begin).wait(400) == 1 and "install one fedssl on both" in (server.folder / "run.log").read_text()
            nodes[LIAR].says, begin = wire.RECIPE_FORMAT, ["run", "--resume", str(folder / "run")]
        code = server.command(*begin).wait(1000)
        joined = (server.folder / "logs" / "superlink.log").read_text().count("[Fleet.ActivateNode] Activated")
        stopped = {name: process.poll() for name, process in beside.items()}
    finally:
        end.set()
        for process in beside.values():
            process.kill()
            process.wait()
        server.end()
    if code:
        sys.exit(f"`fedssl server run` ended with {code}:\n{(server.folder / 'run.log').read_text()[-3000:]}")
    lines = {line["round"]: line for line in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())}
    seen = {lie: sorted(lines[number + 2]["refused_for"]) for number, lie in enumerate(lies)}
    found = learned(folder / "run")
    return {
        "rounds": len(lines),
        "lies": len(lies),
        "refused_as": {lie: kinds[0] if kinds else "added" for lie, kinds in seen.items()},
        "not_refused_so": [lie for lie, kinds in seen.items() if kinds != [LIES[lie][0]]],
        "refused_when_honest": sum(len(lines[number]["refused"]) for number in (1, len(lies) + 2)),
        "files_unlike": [name for name in wanted if found.get(name) != wanted[name]],
        "old_version_refused": is_old_refused,
        "nodes_joined": joined,
        "strangers": {name: f"ended with {code}" if code is not None else "still tries" for name, code in stopped.items()},
        "seconds_with_100_mb": next((lines[number + 2]["seconds"] for number, lie in enumerate(lies) if lie == "100 MB"), None),
    }


def is_clean(row: dict[str, Any]) -> bool:
    """Whether nothing of it is wrong."""
    wrong = row["not_refused_so"] or row["refused_when_honest"] or row["files_unlike"] or row["old_version_refused"] is False
    return not wrong and row["nodes_joined"] == 3


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a folder to work in, which stays")
    parser.add_argument("--short", action="store_true", help="fewer lies, and no node of an older version")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="uploads-") as name:
        folder = arguments.keep or Path(name)
        folder.mkdir(exist_ok=True, parents=True)
        row = hold(folder, list(SHORT if arguments.short else LIES), is_short=arguments.short)
    row["seconds"] = round(time.monotonic() - began)
    print(json.dumps(row, indent=1))
    if not arguments.dry:
        results.append("deployment_uploads", row)
    return 0 if is_clean(row) else 1


if __name__ == "__main__":
    sys.exit(main())
