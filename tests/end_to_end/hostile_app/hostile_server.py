"""The ServerApp of a server that wants all it can get: sends its ClientApp to every node, and writes down what each one found."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """``targets.json`` in the folder of the environment: how many nodes there are, and what the ClientApp is told."""
    folder = Path(os.environ["FEDSSL_RUN_DIR"])
    targets = json.loads((folder / "targets.json").read_text())
    while len(nodes := sorted(grid.get_node_ids())) < targets["nodes"]:
        time.sleep(0.2)
    told = RecordDict({"told": ConfigRecord({"json": json.dumps(targets)})})
    found = {}
    for reply in grid.send_and_receive([Message(told, node, "train", ttl=300.0) for node in nodes], timeout=300.0):
        what = json.loads(str(reply.content["found"]["json"])) if not reply.has_error() else {"error": str(reply.error.reason)}
        found[what.get("socket", str(reply.metadata.src_node_id))] = what
    (folder / "found.json").write_text(json.dumps(found))
