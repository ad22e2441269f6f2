"""The only part of a node with torch: one Download in, one Upload out, then gone. Run as ``python -m fedssl_client.trainer``.

The ClientApp is started anew for every message and must stay small, so the work is done by a child process: the Download
arrives on standard input, the Upload leaves on standard output. Standard error is the node owner's log and stays here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedssl.client_round import Shard, client_round, open_shard
from fedssl.errors import WireError
from fedssl.parts import foreign_names
from fedssl.records import Download, Upload
from fedssl.wire import download_from_bytes, to_bytes
from fedssl_client.child import answer_standard_input
from fedssl_client.store import allowed_parts, locked


def answer(download: Download | bytes, shard: Shard) -> Upload:
    """What a shard replies: the one function behind a device and a simulated node. Raises FedSSLError where a person must act."""
    record = download_from_bytes(download) if isinstance(download, bytes) else download
    return client_round(record, shard)


def train(download: bytes, store: str) -> bytes:
    """The Upload of the store's users, as bytes. A second call for the same store waits for the first.

    Raises WireError for a recipe whose parts are not those that ship: ``module:name`` would let a server call whatever is
    installed here, so it is followed only where the node's own `node.json` lists it under "parts". And for a recipe with
    ``fleet_users``, whose epsilon is not that of its users.
    """
    record = download_from_bytes(download)
    foreign = set(foreign_names(record.recipe)) - allowed_parts(Path(store))
    if foreign:
        raise WireError(
            f'the recipe names {sorted(foreign)[0]}, which is no part of fedssl; a node follows it only where its node.json allows that under "parts"'
        )
    if record.recipe.privacy.fleet_users:
        raise WireError("the recipe asks what noise a larger fleet would need and adds too little for its own users; only a simulation may ask that")
    with locked(Path(store)):
        return to_bytes(answer(record, open_shard(Path(store))))


def main() -> int:
    """Answer standard input. Exit 0: an Upload on standard output; 1: there, what the server may know of a failure."""
    parser = argparse.ArgumentParser(description="Answer one download; started by the ClientApp")
    parser.add_argument("--store", required=True, help="the node's folder")
    store = parser.parse_args().store
    return answer_standard_input(lambda data: train(data, store))


if __name__ == "__main__":
    sys.exit(main())
