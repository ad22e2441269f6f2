"""The child process of an agent: one Download in, one Upload out, then gone. Run as ``python -m fedssl_client.device_trainer``.

The only part of a device with torch, and it is imported last: the person's policy and the ledger come before it, the history after the charge.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from fedssl.catalogue import Catalogue, read_catalogue
from fedssl.data.histories import Histories
from fedssl.device_model import write_encoder
from fedssl.errors import FedSSLError, WireError
from fedssl.privacy.uploads import UploadLedger, question_of
from fedssl.recipe import Recipe, read_recipe
from fedssl.records import Download
from fedssl.wire import download_from_bytes, to_bytes
from fedssl_client.child import answer_standard_input
from fedssl_client.device_folder import HISTORY, MODEL, heads_folder, opened_ledger
from fedssl_client.history import Event, HistoryStore
from fedssl_client.policy import OutsidePolicy, check_evaluation, check_policy, promised_epsilon, read_policy
from fedssl_client.store import locked


def train(data: bytes, folder: Path, server: str) -> bytes:
    """The Upload that answers a Download of ``server``, as bytes. A second call for the same folder waits for the first.

    Guarantees, in this order:
      - a recipe outside the policy, of a server that was not joined, or of another catalogue, reads nothing of the person's;
      - the run's whole promise is charged when its first Download comes, and this question, both on disk, before the history is read;
      - what leaves was kept first: asked again, the same bytes leave, whatever has changed here since.

    Raises OutsidePolicy; WireError for what is wrong with the Download; DataError where the ledger is missing, changed or put back.
    """
    policy = read_policy(folder)
    if len(data) > policy.allow.most_bytes:
        raise OutsidePolicy(f"a download of {len(data)} bytes, and [allow] most_bytes is {policy.allow.most_bytes}")
    download = download_from_bytes(data)
    recipe, address = download.recipe, download.address
    user = np.array([policy.user], dtype=np.int64)
    with locked(folder), closing(HistoryStore(folder / HISTORY)) as history, opened_ledger(folder, history) as device:
        ledger = device.ledger
        if server not in history.servers():
            raise OutsidePolicy(f"the person has not joined server '{server}'")
        check_policy(policy, recipe, server, spent=spent_elsewhere(ledger, address.run))
        if address.phase == "evaluation":
            check_evaluation(policy)
        catalogue = _catalogue(folder, recipe)
        ledger.join(address.run, epsilon=promised_epsilon(recipe), delta=recipe.privacy.delta, recipe=recipe.hash)
        question = question_of(download)
        if not recipe.privacy.is_local:  # Else the round charges it, with what its noise costs.
            ledger.charge(question, address, user, cost=0.0, promised=None, delta=recipe.privacy.delta)

        from fedssl.client_round import Shard, client_round  # Torch is paid for only now.

        heads = heads_folder(folder, address.run)
        heads.parent.mkdir(mode=0o700, exist_ok=True)
        shard = Shard(histories_of(history.events(), catalogue), user, heads, users_per_chunk=1, device=device)
        upload = to_bytes(client_round(download, shard))
        if len(upload) > policy.allow.most_bytes:
            raise OutsidePolicy(f"an upload of {len(upload)} bytes, and [allow] most_bytes is {policy.allow.most_bytes}")
        if not recipe.privacy.is_local:
            upload = ledger.keep(question, address, upload)
            ledger.forget(address.run, download.settled)
        history.set_anchor(*ledger.head)
        _take_weights(folder, download)
    return upload


def spent_elsewhere(ledger: UploadLedger, run: str) -> float:
    """Epsilon of all runs that were joined but this one."""
    return sum(epsilon for name, epsilon in ledger.joined().items() if name != run)


def histories_of(events: list[Event], catalogue: Catalogue) -> Histories:
    """One user's events, oldest first, as rows of a catalogue. What it does not list is left out; a catalogue that grew lists more."""
    known = [(catalogue.rows[event.item], event.time) for event in events if event.item in catalogue.rows]
    items = np.array([row for row, _ in known], dtype=np.int32)
    return Histories(items, np.array([0, len(items)], dtype=np.int64), np.array([when for _, when in known], dtype=np.float64), ("me",))


def _catalogue(folder: Path, recipe: Recipe) -> Catalogue:
    """The catalogue on the device, where it is the recipe's."""
    try:
        catalogue = read_catalogue(folder / MODEL / "catalogue.jsonl")
    except FedSSLError:
        raise WireError("this device has no catalogue yet; its person takes one with a model (`fedssl device import --model`)") from None
    if (catalogue.hash, catalogue.num_items) != (recipe.catalogue, recipe.num_items):
        raise WireError(f"the recipe is for another catalogue ({recipe.num_items} items) than this device has ({catalogue.num_items}); it needs a newer model")
    return catalogue


def _take_weights(folder: Path, download: Download) -> None:
    """Recommend with the weights of this round from now on, where the model on the device was made by the same recipe."""
    if download.address.phase != "training":
        return
    own = read_recipe((folder / MODEL / "recipe.json").read_text(encoding="utf-8"), where="the model on the device")
    if own.hash == download.recipe.hash:
        write_encoder(folder / MODEL, own, download.tensors, run=download.address.run, round=download.address.round)


def _end_with_the_agent(agent: int) -> None:
    """End when the agent has: a training that nobody watches would not stop at a gate."""

    def watch() -> None:
        while os.getppid() == agent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Answer standard input, as the least urgent process of the device."""
    parser = argparse.ArgumentParser(description="Answer one download; started by the agent")
    parser.add_argument("--folder", required=True, type=Path, help="the device's folder")
    parser.add_argument("--server", required=True, help="the server that asks")
    parser.add_argument("--agent", required=True, type=int, help="the process that watches this one; it may have ended before this one looked")
    arguments = parser.parse_args()
    os.umask(0o077)
    os.nice(10)
    _end_with_the_agent(arguments.agent)
    return answer_standard_input(lambda data: train(data, arguments.folder, arguments.server))


if __name__ == "__main__":
    sys.exit(main())
