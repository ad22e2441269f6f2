"""A node that speaks Flower's Fleet protocol from a thread of this process, with what a SuperNode itself uses for it: TLS, a key, heartbeats.

What is not there is a SuperNode's local API, its SuperExec and its ClientApp: ``answer`` is called instead, in this thread.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import PULL_BACKOFF_CAP, PULL_INITIAL_BACKOFF
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, inflate_object_from_contents
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_connection import http_request_response

Answer = Callable[[Message], Message]
IDLE_SECONDS = 3.0
"""A SuperNode that finds no message asks again after so long."""


class FleetNode(threading.Thread):
    """One node, from `start` until ``end`` is set. ``answered``: how many messages; ``failed``: how many replies nobody took; ``returned``: how often it began
    anew after its connection had failed, as a SuperNode does that an init system keeps up.

    ``key``: the file of its private key, as `fedssl server init` makes it; ``ca``: the certificate of who signed the server's.
    """

    def __init__(self, address: str, ca: Path, key: Path, answer: Answer, end: threading.Event):
        super().__init__(name=key.stem, daemon=True)
        self._address, self._ca, self._answer, self._end = address, ca, answer, end
        private = load_ssh_private_key(key.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        self._keys = (private, private.public_key())
        self.node_id, self.answered, self.failed, self.returned = 0, 0, 0, 0

    def run(self) -> None:
        """Ask for messages and answer them."""
        while True:
            with suppress(SystemExit):  # So Flower's code says that there is no connection.
                self._hold()
            if self._end.wait(1.0):
                return
            self.returned += 1

    def _hold(self) -> None:
        """One connection."""
        connected = http_request_response(self._address, False, str(self._ca), self._keys)
        with connected as (self.node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm):
            known: set[int] = set()
            while not self._end.is_set():
                try:
                    received = receive()
                    if received is None:
                        self._end.wait(IDLE_SECONDS)
                        continue
                    message, tree = received
                    run = message.metadata.run_id
                    if run not in known:  # As a SuperNode: what is to run comes before the first message. Here nothing of it runs.
                        get_fab(get_run(run).fab_hash, run)
                        known.add(run)
                    whole = _whole(message, tree, lambda name, run=run: pull_object(run, name))
                    confirm(run, message.metadata.message_id)
                    begin = time.monotonic()
                    reply = self._answer(whole)
                    with no_object_id_recompute():
                        reply.metadata.__dict__["_message_id"] = reply.object_id
                        contents = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
                        wanted, session = send(reply, get_object_tree(reply), time.monotonic() - begin)
                    for name in wanted:
                        push_object(run, session, name, contents[name])
                    self.answered += 1
                except RunNotRunningException:
                    self.failed += 1


def _whole(message: Message, tree: ObjectTree, pull: Callable[[str], bytes]) -> Message:
    """The message with its content, which is pulled object by object."""
    contents = {}
    for name in dict.fromkeys(one.object_id for one in iterate_object_tree(tree)):
        pause = float(PULL_INITIAL_BACKOFF)
        while name not in contents:
            try:
                contents[name] = pull(name)
            except ObjectUnavailableError:  # The server pushes it still: a SuperNode waits so, too.
                time.sleep(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, PULL_BACKOFF_CAP)
    whole = inflate_object_from_contents(tree.object_id, contents)
    assert isinstance(whole, Message)
    whole.metadata.__dict__["_message_id"] = message.metadata.message_id
    return whole
