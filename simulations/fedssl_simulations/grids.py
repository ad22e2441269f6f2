"""A Flower Grid inside this process: nodes are a function call away, and the server's loop cannot tell the difference.

Messages wait in order; a few handler threads answer them, so that a node trains while the server folds. Training is
threaded inside the handler, so one handler thread is the default. What is true here as on a SuperLink: containers are
not shared (a node that changes what it received, or what it sent, reaches nobody else), a node's exception is an error
reply, messages expire after their time to live (here by a clock that nobody sets), one node never answers two messages at once, and a node's state lasts
as long as the Grid. What is different:
  - at most ``window`` replies are in being at once (being made, or waiting to be pulled), so memory does not grow with
    the number of nodes; only a message that is asked for while nothing else that is asked for is on its way may exceed it;
  - a FedSSLError says that a person must act, and in a simulation that person has the caller's console in front of them:
    it is raised from the pull that would have brought the reply, and so are KeyboardInterrupt and SystemExit. On a
    device such an error concerns its owner alone, so there it becomes an error reply like any other.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Set
from itertools import count
from threading import Condition, Thread
from types import TracebackType

from fedssl_client.trainer import answer
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.app.user_config import UserConfig
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedssl import wire
from fedssl.client_round import Shard
from fedssl.errors import FedSSLError

Handler = Callable[[Message, Context], Message]

# Seconds that a pull waits for a first reply, so that a loop around it neither spins nor sleeps past a reply.
PULL_SECONDS = 0.05
_SERVER_NODE = 1
_log = logging.getLogger(__name__)


class InProcessGrid(Grid):
    """A Grid whose nodes are calls of ``handler(message, context)``: a Flower ClientApp, or any function of that form.

    ``nodes``: each node's id and its node config, which the handler finds in ``context.node_config``. ``window``: replies
    in being at once. ``threads``: how many handlers run at once, each for another node. A context manager: leaving it
    ends the threads, after the messages being handled.
    """

    def __init__(
        self,
        handler: Handler,
        nodes: Mapping[int, UserConfig],
        *,
        window: int = 2,
        threads: int = 1,
        run_config: UserConfig | None = None,
        run_id: int = 1,
    ):
        assert min(window, threads) >= 1, "a grid needs a window and a thread of at least one"
        # Message() asks for the identity of the task it is made in, and only Flower's own runtimes set it. Not public: only here.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, _SERVER_NODE, 1
        self._handler, self._window = handler, window
        self._run = Run.create_empty(run_id=run_id)
        self._contexts = {node: Context(run_id, node, dict(config), RecordDict(), dict(run_config or {})) for node, config in nodes.items()}
        self._numbers = count(1)
        # The condition guards everything below it.
        self._changed = Condition()
        self._waiting: OrderedDict[str, Message] = OrderedDict()
        # When each is to be forgotten, by a clock that nobody sets.
        self._ends: dict[str, float] = {}
        self._running: dict[str, int] = {}
        self._done: dict[str, Message | BaseException] = {}
        self._abandoned: set[str] = set()
        self._asked: Set[str] = frozenset()
        self._is_closed = False
        self._threads = [Thread(target=self._work, name=f"grid-{number}", daemon=True) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def set_run(self, run: Run) -> None:
        """Say which run this Grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this Grid operates in."""
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """`Message` with its arguments in another order: deprecated in Flower, whose Grid still asks for it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The nodes, in the order they were given."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages and return their ids, in order. Contents are copied (not the bytes in them), so they may be used again."""
        ids = []
        with self._changed:
            if self._is_closed:
                raise RuntimeError("this grid is closed; messages can be pushed only inside its `with` block")
            for message in messages:
                name = f"message-{next(self._numbers)}"
                message.metadata.__dict__["_message_id"] = name
                self._waiting[name] = _isolate(message)
                self._ends[name] = time.monotonic() + message.metadata.ttl
                ids.append(name)
            self._changed.notify_all()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are ready, in the order they were finished; waits a moment for a first one.

        An id that was never pushed, has expired, was abandoned or already pulled is answered with an error reply. Raises the
        FedSSLError (or KeyboardInterrupt, SystemExit) that a node raised; its message is done with, the others stay.
        """
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        deadline = time.monotonic() + PULL_SECONDS
        with self._changed:
            self._asked = wanted
            try:
                while not (ready := [name for name in self._done if name in wanted]):
                    lost = set(wanted).difference(self._waiting, self._running, self._done)
                    remaining = deadline - time.monotonic()
                    if lost or not wanted or remaining <= 0:
                        lost |= self._forget_expired() & wanted
                        return [self._unavailable(name) for name in lost]
                    self._changed.notify_all()
                    self._changed.wait(remaining)
            finally:
                self._asked = frozenset()
            replies: list[Message] = []
            for name in ready:
                outcome = self._done[name]
                if isinstance(outcome, Message):
                    replies.append(outcome)
                elif replies:
                    break
                del self._done[name], self._ends[name]
                self._changed.notify_all()
                if isinstance(outcome, BaseException):
                    raise outcome
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, and pull until all replies are there or ``timeout`` seconds are over; what is late is abandoned."""
        deadline = None if timeout is None else time.monotonic() + timeout
        missing, replies = set(self.push_messages(messages)), []
        try:
            while missing and (deadline is None or time.monotonic() < deadline):
                for reply in self.pull_messages(missing):
                    replies.append(reply)
                    missing.discard(reply.metadata.reply_to_message_id)
        finally:
            self.abandon(missing)
        return replies

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Forget messages: those that wait are never handled, replies are dropped. On a SuperLink the time to live does this."""
        with self._changed:
            for name in message_ids:
                for known in (self._waiting, self._done, self._ends):
                    known.pop(name, None)
                if name in self._running:
                    self._abandoned.add(name)
            self._changed.notify_all()

    def close(self) -> None:
        """Forget all messages and end the threads, after what they are handling."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._done.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> InProcessGrid:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- the threads ----

    def _work(self) -> None:
        while True:
            with self._changed:
                while (message := self._next()) is None:
                    if self._is_closed:
                        return
                    self._changed.wait()
                name = message.metadata.message_id
                self._running[name] = message.metadata.dst_node_id
            outcome = self._answer(message)
            with self._changed:
                del self._running[name]
                if name in self._abandoned or self._is_closed:
                    self._abandoned.discard(name)
                else:
                    self._done[name] = outcome
                self._changed.notify_all()
            # Held until the next message otherwise, beside the window.
            del message, outcome

    def _next(self) -> Message | None:
        """Take the first message that may be handled now off the queue. Called with the lock held."""
        in_being = self._running.keys() | self._done.keys()
        is_full = len(in_being) >= self._window
        # Whoever pulls one id at a time, in any order, must not wait for a window full of replies that nobody pulls.
        if is_full and (not self._asked or any(name in self._asked for name in in_being)):
            return None
        busy, now = set(self._running.values()), time.monotonic()
        for name, message in self._waiting.items():
            if message.metadata.dst_node_id not in busy and (not is_full or name in self._asked) and self._ends[name] > now:
                return self._waiting.pop(name)
        return None

    def _answer(self, message: Message) -> Message | BaseException:
        """The node's reply, an error reply, or the exception that the caller must see."""
        node = message.metadata.dst_node_id
        context = self._contexts.get(node)
        if context is None:
            return _error(message, ErrorCode.NODE_UNAVAILABLE, f"no node {node} in this grid")
        try:
            reply = self._handler(message, context)
            if reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise ValueError("the reply answers another message; make it with Message(content, reply_to=message)")
            return _isolate(reply)
        except FedSSLError as error:
            return error
        except Exception as error:
            _log.warning("node %s failed; the server gets an error reply", node, exc_info=True)
            return _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}")
        except BaseException as error:
            return error

    def _forget_expired(self) -> set[str]:
        """Drop messages and replies past their time to live, and return their ids. Called with the lock held."""
        now = time.monotonic()
        expired = {name for name, message in [*self._waiting.items(), *self._done.items()] if isinstance(message, Message) and self._ends[name] <= now}
        for name in expired:
            for known in (self._waiting, self._done, self._ends):
                known.pop(name, None)
        self._changed.notify_all()
        return expired

    def _unavailable(self, name: str) -> Message:
        reason = f"{name} is not known here: never pushed, expired, abandoned, or pulled before"
        metadata = Metadata(self._run.run_id, "", _SERVER_NODE, _SERVER_NODE, name, "", time.time(), 0.0, "query")
        return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))


def handler_of(shards: Mapping[int, Shard]) -> Handler:
    """The nodes of a simulation: what a device does once its Download was read, for the shard that each node's partition names."""

    def handle(message: Message, context: Context) -> Message:
        upload = answer(wire.download_from_record_dict(message.content), shards[int(context.node_config["partition-id"])])
        return Message(wire.to_record_dict(upload), reply_to=message)

    return handle


def _isolate(message: Message) -> Message:
    """The same message in containers of its own; the bytes of arrays are immutable and stay shared."""
    metadata = copy.copy(message.metadata)
    if not message.has_content():
        return make_message(metadata, error=message.error)
    content = RecordDict()
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            content[name] = ArrayRecord(dict(record))
        else:
            content[name] = copy.deepcopy(record)
    return make_message(metadata, content)


def _error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=message)
