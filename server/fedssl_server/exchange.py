"""One exchange with the nodes over a Flower Grid: ask, wait, ask again who dropped out and came back, add what is admitted.

The server's memory does not grow with the nodes: a reply is added and dropped. A SuperNode says every 30 s that it is there; Flower calls it
offline once two of these are missing, so one that was killed is known to be lost after up to 60 s, and cannot come back before. What it was
asked is lost with it: it is asked anew. The same question has the same answer, of which one is added.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedssl import wire
from fedssl.errors import LedgerBehind, UploadRefused, WireError
from fedssl.privacy.manifest import DeclaredSum
from fedssl.records import Download, Upload
from fedssl.server_round import Sums, add
from fedssl_server.admission import admit
from fedssl_server.ledger_heads import LedgerHeads

REPLIES_AT_ONCE = 4
"""Replies asked for in one pull: a deployed Grid downloads all that are ready into a list."""
MOST_WORDS = 500
"""Characters that are kept of why an answer was refused: a node may have chosen them."""
SHORTEST_PULL_SECONDS, PAUSE_SECONDS, LOOK_SECONDS = 0.045, 0.2, 2.0
"""A pull that found nothing sooner than the first is followed by a pause, so that the loop does not spin; between two looks for who is there."""
LOST = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
"""What Flower says of a node that is not there, whose ClientApp died, or whose answer did not arrive whole."""


@dataclass(frozen=True)
class Patience:
    """How long an exchange waits. ``deadline_seconds``: for uploads; None: for all of them.

    ``reconnect_seconds``: for a node that dropped out to come back, from when that is noticed; then it is asked anew, and has what is left of
    the deadline. 0: who drops out is not waited for.
    """

    deadline_seconds: float | None = None
    reconnect_seconds: float = 0.0


@dataclass(frozen=True)
class Asked:
    """What one node is asked for: the sum of these users (None: of all that it hosts), who are ``most_users`` at most."""

    users: NDArray[np.int64] | None
    most_users: int


@dataclass
class Answers:
    """What an exchange brought. ``refused``: why, by node; ``kinds``: how often, by kind (`admission`); ``waited``: seconds without a reply to add."""

    sums: Sums = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    upload_bytes: int = 0
    waited: float = 0.0


def ask(
    grid: Grid,
    download: Download,
    asked: Mapping[int, Asked],
    declared: Mapping[str, DeclaredSum],
    patience: Patience,
    *,
    heads: LedgerHeads | None = None,
    kind: str = "train",
) -> Answers:
    """Send a Download to every node of ``asked`` and add the uploads that are admitted. ``kind``: Flower's type of the message.

    ``heads``: of the nodes' ledgers. Each node is told what is known of its own; those that come back are on the disk when this returns.
    """
    answers, missing = Answers(), dict(asked)
    content = wire.to_record_dict(download)

    def message_to(node: int, seconds: float | None) -> Message:
        group = f"{download.address.phase} {download.address.round}"
        known = None if heads is None else heads.known(node)
        return Message(wire.with_ledger_head(wire.with_users(content, asked[node].users), known), node, kind, ttl=seconds, group_id=group)

    for item in _replies(grid, message_to, list(asked), patience):
        if isinstance(item, float):
            answers.waited += item
            continue
        node, reply = item
        if node is None or node not in missing:
            answers.kinds["unasked"] += 1
            continue
        most_users = missing.pop(node).most_users
        try:
            upload = _upload_of(reply)
            if heads is not None:
                heads.take(node, wire.ledger_head_of(reply.content))
            admit(upload, address=download.address, recipe=download.recipe.hash, declared=declared, most_users=most_users)
        except (UploadRefused, WireError) as error:
            answers.refused[node] = _in_short(error)
            answers.kinds[error.kind] += 1
            continue
        answers.upload_bytes += _bytes_of(upload)
        add(answers.sums, upload)
    for node in missing:
        answers.refused[node] = "not reached, or no answer before the deadline"
        answers.kinds["missing"] += 1
    if heads is not None:
        heads.save()
    return answers


def _replies(
    grid: Grid, message_to: Callable[[int, float | None], Message], nodes: list[int], patience: Patience
) -> Iterator[tuple[int | None, Message] | float]:
    """Each reply as it arrives, with the node that was asked (None: nobody was); between them the seconds that were waited; ends at the deadline."""
    ends = None if patience.deadline_seconds is None else time.monotonic() + patience.deadline_seconds
    # Who was asked, not who says that they answer, counts.
    node_of: dict[str, int] = {}
    missing: list[str] = []
    gone: dict[int, float] = {}  # Nodes that are not there, and until when they may come back.
    given: dict[int, float] = {}  # The same of all that ever were not: nobody gets a second window.

    def push(some: list[int]) -> None:
        left = None if ends is None else max(ends - time.monotonic(), 0.001)
        names = list(grid.push_messages([message_to(node, left) for node in some])) if some else []
        # A deployed Grid has no name for a message that it could not push, and no names at all where they are too large.
        for node, name in zip(some, names or [""] * len(some), strict=True):
            if name:
                node_of[name] = node
                missing.append(name)

    def lose(node: int) -> None:
        until = given.setdefault(node, time.monotonic() + patience.reconnect_seconds)
        if time.monotonic() < until:
            gone.setdefault(node, until)

    push(nodes)
    looked = time.monotonic()
    while (missing or gone) and (ends is None or time.monotonic() < ends):
        before = time.perf_counter()
        replies = list(grid.pull_messages(missing[:REPLIES_AT_ONCE])) if missing else []
        spent = time.perf_counter() - before
        if not replies and spent < SHORTEST_PULL_SECONDS:
            # A deployed Grid answers at once; the in-process one waits by itself.
            time.sleep(PAUSE_SECONDS)
        yield time.perf_counter() - before
        if not replies:
            # Nothing yet: ask for others next, so that a slow node does not hold up those behind it.
            missing[:] = missing[REPLIES_AT_ONCE:] + missing[:REPLIES_AT_ONCE]
        for reply in replies:
            name = reply.metadata.reply_to_message_id
            node = node_of.get(name)
            if name in missing:
                missing.remove(name)
                if node is not None and _is_lost(reply) and patience.reconnect_seconds:
                    if any(node_of[other] == node for other in missing):
                        continue  # It was asked anew already.
                    lose(node)
                    if node in gone:
                        continue
            if node in given:
                gone.pop(node, None)
                missing[:] = [other for other in missing if node_of[other] != node]
            yield node, reply
        if patience.reconnect_seconds and time.monotonic() - looked >= LOOK_SECONDS:
            looked, there = time.monotonic(), set(grid.get_node_ids())
            for node in {node_of[name] for name in missing} - there:
                lose(node)
            back = sorted(gone.keys() & there)
            for node in [*back, *(node for node, until in gone.items() if looked > until)]:
                gone.pop(node, None)
            push(back)


def _is_lost(reply: Message) -> bool:
    return reply.has_error() and reply.error.code in LOST


def _upload_of(reply: Message) -> Upload:
    if _is_lost(reply):
        raise UploadRefused(f"not reached: {reply.error.reason}", "missing")
    if reply.has_error():
        raise UploadRefused(f"the node failed: {reply.error.reason}", "ledger" if LedgerBehind.__name__ in str(reply.error.reason) else "failed")
    return wire.upload_from_record_dict(reply.content)


def _in_short(error: Exception) -> str:
    """On one line, cut off."""
    return " ".join(str(error)[: 2 * MOST_WORDS].split())[:MOST_WORDS]


def _bytes_of(upload: Upload) -> int:
    arrays = [(value,) if isinstance(value, np.ndarray) else (value.rows, value.columns, value.values) for value in upload.sums.values()]
    return sum(array.nbytes for group in arrays for array in group)
