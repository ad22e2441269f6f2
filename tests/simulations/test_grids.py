"""The in-process Grid: what a server's loop may count on, shown with trivial nodes."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from fedssl_simulations.grids import Handler, InProcessGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedssl.errors import BudgetSpent, ConfigError, DataError


def nodes(number: int) -> dict[int, dict[str, bool | float | int | str]]:
    return {10 + index: {"partition-id": index} for index in range(number)}


def note(text: str) -> RecordDict:
    return RecordDict({"note": ConfigRecord({"text": text})})


def text_of(message: Message) -> str:
    record = message.content["note"]
    assert isinstance(record, ConfigRecord)
    return str(record["text"])


def echo(message: Message, context: Context) -> Message:
    return Message(note(f"{context.node_config['partition-id']}:{text_of(message)}"), reply_to=message)


def to_all(grid: InProcessGrid, text: str = "hi", ttl: float | None = None) -> list[Message]:
    content = note(text)
    return [Message(content, node, "train", ttl=ttl, group_id="1") for node in grid.get_node_ids()]


def wait_for(condition: object, seconds: float = 5.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def test_replies_come_in_the_order_of_the_messages_and_say_which_they_answer():
    with InProcessGrid(echo, nodes(5)) as grid:
        ids = grid.push_messages(to_all(grid))
        replies: list[Message] = []
        while len(replies) < 5:
            replies += grid.pull_messages(ids[len(replies) :])
        assert [text_of(reply) for reply in replies] == ["0:hi", "1:hi", "2:hi", "3:hi", "4:hi"]
        assert [reply.metadata.reply_to_message_id for reply in replies] == ids
        assert [reply.metadata.src_node_id for reply in replies] == grid.get_node_ids()


def test_a_client_app_is_called_as_it_is_and_keeps_its_state_between_messages():
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.state[f"seen-{len(context.state)}"] = ConfigRecord()
        return Message(note(f"seen {len(context.state)}"), reply_to=message)

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return Message(note(str(context.node_config["partition-id"])), reply_to=message)

    with InProcessGrid(app, nodes(2)) as grid:
        for seen in ("seen 1", "seen 2"):
            assert [text_of(reply) for reply in grid.send_and_receive(to_all(grid))] == [seen] * 2
        asked = [Message(note(""), node, "query.hello", group_id="1") for node in grid.get_node_ids()]
        assert sorted(text_of(reply) for reply in grid.send_and_receive(asked)) == ["0", "1"]


def test_a_node_that_changes_what_it_got_or_what_it_sent_reaches_nobody():
    kept: list[RecordDict] = []

    def vandal(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        seen = note(f"{text_of(message)} {sorted(arrays)}")
        message.content["note"] = ConfigRecord({"text": "changed"})
        arrays["more"] = arrays["items"]
        arrays["items"].data = b""
        reply = Message(seen, reply_to=message)
        kept.append(reply.content)
        return reply

    with InProcessGrid(vandal, nodes(3), window=3) as grid:
        content = RecordDict({**note("hi"), "arrays": ArrayRecord({"items": Array(np.ones(3))})})
        ids = grid.push_messages([Message(content, node, "train", group_id="1") for node in grid.get_node_ids()])
        # The server, too, may reuse what it sent before anybody has read it.
        content["note"] = ConfigRecord({"text": "next round"})
        wait_for(lambda: len(kept) == 3)
        for sent in kept:
            sent["note"] = ConfigRecord({"text": "changed later"})
        replies: list[Message] = []
        while len(replies) < 3:
            replies += grid.pull_messages(ids)
        assert [text_of(reply) for reply in replies] == ["hi ['items']"] * 3


def test_bytes_of_arrays_are_shared_not_copied():
    seen: list[bytes] = []

    def look(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        seen.append(arrays["items"].data)
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    with InProcessGrid(look, nodes(2)) as grid:
        array = Array(np.ones(3))
        content = RecordDict({"arrays": ArrayRecord({"items": array})})
        replies = grid.send_and_receive([Message(content, node, "train", group_id="1") for node in grid.get_node_ids()])
        returned = [reply.content["arrays"]["items"].data for reply in replies]  # type: ignore[index]
        assert all(data is array.data for data in [*seen, *returned])


@pytest.mark.parametrize(("window", "threads"), [(1, 1), (3, 1), (4, 3)])
def test_never_more_replies_in_being_than_the_window(window: int, threads: int):
    lock = threading.Lock()
    started = pulled = most = 0

    def work(message: Message, context: Context) -> Message:
        nonlocal started, most
        with lock:
            started += 1
            most = max(most, started - pulled)
        return echo(message, context)

    with InProcessGrid(work, nodes(40), window=window, threads=threads) as grid:
        missing = set(grid.push_messages(to_all(grid)))
        wait_for(lambda: started == window)
        while missing:
            time.sleep(0.001)
            # Counted before the pull returns: replies leave the window inside it.
            with lock:
                expected = len(grid._done)
                pulled += expected
            replies = grid.pull_messages(missing)
            with lock:
                pulled += len(replies) - expected
            missing -= {reply.metadata.reply_to_message_id for reply in replies}
        assert started == 40
        assert most <= window


def test_whoever_pulls_one_id_at_a_time_in_any_order_is_served():
    with InProcessGrid(echo, nodes(6), window=2) as grid:
        ids = grid.push_messages(to_all(grid))
        for index in (5, 0, 3, 1, 4, 2):
            replies: list[Message] = []
            end = time.monotonic() + 5
            while not replies and time.monotonic() < end:
                replies = grid.pull_messages([ids[index]])
            assert [text_of(reply) for reply in replies] == [f"{index}:hi"]


def test_one_node_never_answers_two_messages_at_once_while_others_do():
    lock = threading.Lock()
    running: dict[int, int] = {}
    together: list[int] = []

    def work(message: Message, context: Context) -> Message:
        node = message.metadata.dst_node_id
        with lock:
            running[node] = running.get(node, 0) + 1
            assert running[node] == 1
            together.append(sum(running.values()))
        time.sleep(0.01)
        with lock:
            running[node] -= 1
        return echo(message, context)

    with InProcessGrid(work, nodes(2), window=8, threads=4) as grid:
        first, second = grid.get_node_ids()
        messages = [Message(note("hi"), node, "train", group_id="1") for node in (first, first, first, second, second)]
        replies = grid.send_and_receive(messages)
        assert [reply.has_error() for reply in replies] == [False] * 5
        assert max(together) == 2


def test_a_node_that_fails_is_an_error_reply_and_the_others_go_on():
    def work(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ZeroDivisionError("no users")
        return echo(message, context)

    with InProcessGrid(work, nodes(3)) as grid:
        replies = grid.send_and_receive(to_all(grid))
        assert [reply.has_error() for reply in replies] == [False, True, False]
        assert replies[1].error == Error(2, "ZeroDivisionError: no users")


@pytest.mark.parametrize(
    "error", [ConfigError("[task] is unknown"), DataError("empty"), BudgetSpent(spent=2.0, promised=1.0, round_number=3), KeyboardInterrupt(), SystemExit(1)]
)
def test_what_a_person_must_act_on_is_raised_to_the_caller(error: BaseException):
    def work(message: Message, context: Context) -> Message:
        raise error

    with InProcessGrid(work, nodes(2)) as grid, pytest.raises(type(error)) as caught:
        grid.send_and_receive(to_all(grid))
    assert caught.value is error
    assert not [thread for thread in grid._threads if thread.is_alive()]


def test_an_answer_to_another_message_is_an_error_reply():
    first: list[Message] = []

    def work(message: Message, context: Context) -> Message:
        first.append(message)
        return echo(first[0], context)

    with InProcessGrid(work, nodes(2)) as grid:
        replies = grid.send_and_receive(to_all(grid))
        assert [reply.has_error() for reply in replies] == [False, True]
        assert "answers another message" in str(replies[1].error.reason)


def test_a_message_to_an_unknown_node_and_an_unknown_id_are_error_replies():
    with InProcessGrid(echo, nodes(1)) as grid:
        (reply,) = grid.send_and_receive([Message(note("hi"), 99, "train", group_id="1")])
        assert reply.error.code == 5
        (reply,) = grid.pull_messages(["message-77"])
        assert (reply.error.code, reply.metadata.reply_to_message_id) == (3, "message-77")


def test_after_a_timeout_the_late_are_forgotten_and_the_next_round_is_not_delayed():
    is_free = threading.Event()
    answered: list[str] = []

    def work(message: Message, context: Context) -> Message:
        answered.append(text_of(message))
        if text_of(message) == "slow" and context.node_config["partition-id"] == 1:
            is_free.wait(5)
        return echo(message, context)

    with InProcessGrid(work, nodes(4), window=2) as grid:
        start = time.monotonic()
        replies = grid.send_and_receive(to_all(grid, "slow"), timeout=0.2)
        assert 0.2 <= time.monotonic() - start < 1.0
        assert [text_of(reply) for reply in replies] == ["0:slow"]
        is_free.set()
        replies = grid.send_and_receive(to_all(grid, "next"), timeout=5)
        assert [text_of(reply) for reply in replies] == ["0:next", "1:next", "2:next", "3:next"]
        assert answered == ["slow"] * 2 + ["next"] * 4


def test_a_message_past_its_time_to_live_is_never_handled_and_says_so():
    is_free = threading.Event()
    handled: list[str] = []

    def work(message: Message, context: Context) -> Message:
        handled.append(text_of(message))
        is_free.wait(5)
        return echo(message, context)

    with InProcessGrid(work, nodes(2), window=2) as grid:
        grid.push_messages([Message(note("first"), 10, "train", group_id="1")])
        ids = grid.push_messages([Message(note("short"), 11, "train", ttl=0.1, group_id="1")])
        replies: list[Message] = []
        start = time.monotonic()
        while not replies and time.monotonic() - start < 5:
            replies = grid.pull_messages(ids)
        assert replies[0].error.code == 3
        assert time.monotonic() - start < 1.0
        is_free.set()
    assert handled == ["first"]


@pytest.mark.parametrize("hours", [-30.0, 30.0])
def test_a_clock_that_jumps_expires_nothing(hours: float):
    with InProcessGrid(echo, nodes(2)) as grid:
        messages = to_all(grid, ttl=60.0)
        for message in messages:
            # As if it had been sent before, or after, the clock was set.
            message.metadata.__dict__["_created_at"] += hours * 3600
        assert [text_of(reply) for reply in grid.send_and_receive(messages, timeout=10)] == ["0:hi", "1:hi"]


def test_nothing_is_kept_of_messages_that_are_done_with():
    with InProcessGrid(echo, nodes(3)) as grid:
        grid.send_and_receive(to_all(grid))
        grid.abandon(grid.push_messages(to_all(grid)))
        wait_for(lambda: not (grid._waiting or grid._done or grid._running))
        assert not grid._ends


def test_the_message_that_flowers_deprecated_method_makes_is_the_same():
    with InProcessGrid(echo, nodes(1)) as grid:
        assert text_of(grid.send_and_receive([grid.create_message(note("hi"), "train", 10, "1", 5.0)])[0]) == "0:hi"


def test_closing_ends_the_threads_and_drops_what_waits():
    handled: list[str] = []
    begun = threading.Event()

    def work(message: Message, context: Context) -> Message:
        begun.set()
        time.sleep(0.05)
        handled.append(text_of(message))
        return echo(message, context)

    with InProcessGrid(work, nodes(9), window=9, threads=2) as grid:
        grid.push_messages(to_all(grid))
        begun.wait(5)
    assert len(handled) <= 2
    assert not [thread for thread in grid._threads if thread.is_alive()]
    with pytest.raises(RuntimeError, match="this grid is closed"):
        grid.push_messages(to_all(grid))


def test_a_thousand_messages_a_second(capsys: pytest.CaptureFixture[str]):
    weights = Array("float32", (100_000,), "raw", bytes(400_000))

    def work(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord({"items": weights})}), reply_to=message)

    handler: Handler = work
    with InProcessGrid(handler, nodes(2000), window=4) as grid:
        content = RecordDict({"arrays": ArrayRecord({"items": weights}), **note("hi")})
        start = time.process_time()
        missing = set(grid.push_messages([Message(content, node, "train", group_id="1") for node in grid.get_node_ids()]))
        while missing:
            missing -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(missing)}
        rate = 2000 / (time.process_time() - start)
    with capsys.disabled():
        print(f" in-process grid: {rate:,.0f} messages of 400 kB a second of the processor ", end="")
    # A quarter of what is promised: on a busy machine caches are cold.
    assert rate > 250
