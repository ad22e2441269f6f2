"""The loop over a Grid: exchanges, nodes that fail or lie, deadlines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fedssl_server import exchange
from fedssl_server.rounds import RoundFacts, Run, owners, run_rounds
from fedssl_simulations.grids import Handler, InProcessGrid, handler_of
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray
from small import PLAN, deal, recipe_of, small_config, small_dataset, train

from fedssl import wire
from fedssl.client_round import CLIENT_PHASES, ClientPhase, Shard
from fedssl.config import RunConfig
from fedssl.errors import AllUploadsRefused, ConfigError, TooFewUploads, WireError
from fedssl.privacy.manifest import DeclaredSum
from fedssl.privacy.plan import make_plan
from fedssl.recipe import make_recipe
from fedssl.records import Download, SparseSum, Upload
from fedssl.server_round import Release, ServerPhase, State, Totals, first_state

ONE = {"server": {"rounds": 1, "cohort": 24}}


# ---- a round of two exchanges ----


def toy_phases(rounds: int) -> tuple[ServerPhase, ...]:
    """Nodes sum their users' numbers; then each user adds what all summed; the state keeps the last total."""
    declared = {"total": DeclaredSum("total", (2,), "dense", "int", None, 1.0)}

    def middle(state: State, totals: Totals, exchange: int) -> dict[str, NDArray[np.float32]]:
        assert exchange == 0
        return {"summed": np.asarray(totals["total"], dtype=np.float32)}

    def finish(state: State, totals: Totals, release: Release) -> State:
        return replace(state, phase=release.phase, round=release.round, weights_P=torch.tensor(np.asarray(totals["total"]), dtype=torch.float32))

    return (ServerPhase("toy", rounds, 2, lambda state: {}, lambda state, exchange: declared, middle, finish),)


def toy_client(download: Download, parts: Any, shard: Shard, users: NDArray[np.int64]) -> Any:
    if download.address.exchange == 0:
        assert not download.tensors
        return {"total": np.array([users.sum(), len(users)], dtype=np.int64)}
    return {"total": (download.tensors["summed"] * len(users)).astype(np.int64)}


def test_the_second_exchange_sees_what_the_first_one_summed(monkeypatch: pytest.MonkeyPatch):
    declared = {"total": DeclaredSum("total", (2,), "dense", "int", None, 1.0)}
    monkeypatch.setitem(CLIENT_PHASES, "toy", ClientPhase(lambda download, parts: declared, toy_client))
    state, facts = train(small_config(ONE), small_dataset(), shards=3, phases=toy_phases(2))
    # All 24 users: numbers 0 .. 23 sum to 276; then each of them adds (276, 24).
    assert state.weights_P.tolist() == [24 * 276.0, 24 * 24.0]
    assert [(fact.phase, fact.round, fact.users) for fact in facts] == [("toy", 1, 24), ("toy", 2, 24)]


def test_a_node_that_failed_in_the_first_exchange_is_not_asked_in_the_second(monkeypatch: pytest.MonkeyPatch):
    declared = {"total": DeclaredSum("total", (2,), "dense", "int", None, 1.0)}
    asked: list[tuple[int, int]] = []

    def noted(download: Download, parts: Any, shard: Shard, users: NDArray[np.int64]) -> Any:
        asked.append((download.address.exchange, int(users[0])))
        if download.address.exchange == 0 and users[0] == 8:
            raise RuntimeError("out of memory")
        return toy_client(download, parts, shard, users)

    monkeypatch.setitem(CLIENT_PHASES, "toy", ClientPhase(lambda download, parts: declared, noted))
    state, facts = train(small_config(ONE), small_dataset(), shards=3, phases=toy_phases(1))
    assert asked == [(0, 0), (0, 8), (0, 16), (1, 0), (1, 16)]
    assert state.weights_P.tolist() == [16 * (276.0 - sum(range(8, 16))), 16 * 16.0]
    assert facts[0].refused.keys() == {2}


# ---- nodes that fail, lie or are late ----


def spoiled(node: int, spoil: Callable[[Upload], Upload]) -> Callable[[Handler], Handler]:
    """The reply of one node changed on its way."""

    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            reply = handler(message, context)
            if context.node_id != node:
                return reply
            upload = wire.upload_from_record_dict(reply.content)
            return Message(wire.to_record_dict(spoil(upload)), reply_to=message)

        return handle

    return tamper


def with_sum(name: str, change: Callable[[NDArray[Any]], Any]) -> Callable[[Upload], Upload]:
    return lambda upload: replace(upload, sums={**upload.sums, name: change(np.array(upload.sums[name]))})


def at_place(upload: Upload, **place: Any) -> Upload:
    return replace(upload, address=replace(upload.address, **place))


LIES: dict[str, tuple[Callable[[Upload], Upload], str]] = {
    "floats": (with_sum("update", lambda sums: sums.astype(np.float32)), "whole numbers"),
    "nan": (with_sum("update", lambda sums: np.full(sums.shape, np.nan, dtype=np.float32)), "whole numbers"),
    "shape": (with_sum("update", lambda sums: sums[:-1]), "shape"),
    "axes": (with_sum("update", lambda sums: sums[None]), "shape"),
    "sparse": (lambda upload: replace(upload, sums={**upload.sums, "update": SparseSum(*(np.ones(1, np.int32) for _ in range(3)), (9, 9))}), "dense"),
    "round": (lambda upload: at_place(upload, round=2), "another exchange"),
    "attempt": (lambda upload: at_place(upload, attempt=1), "another exchange"),
    "exchange": (lambda upload: at_place(upload, exchange=1), "another exchange"),
    "run": (lambda upload: at_place(upload, run="other"), "another exchange"),
    "phase": (lambda upload: at_place(upload, phase="counts"), "another exchange"),
    "recipe": (lambda upload: replace(upload, recipe="0" * 64), "followed recipe"),
    "undeclared": (lambda upload: replace(upload, sums={**upload.sums, "history": np.array([3, 1], dtype=np.int32)}), "not declared"),
    "missing": (lambda upload: replace(upload, sums={name: value for name, value in upload.sums.items() if name != "weight"}), "missing"),
    "too long": (with_sum("update", lambda sums: np.full(sums.shape, 2**24, dtype=np.int64)), "norm"),
    "huge": (with_sum("update", lambda sums: np.full(sums.shape, 2**62, dtype=np.int64)), "coordinates"),
    "least": (with_sum("update", lambda sums: np.full(sums.shape, -(2**63), dtype=np.int64)), "coordinates"),
    "weight": (with_sum("weight", lambda sums: sums * 3), "weight"),
    "no weight": (with_sum("weight", lambda sums: -sums), "weight"),
    "loss": (with_sum("loss", lambda sums: sums + 2**40), "loss"),
}
KINDS = {
    **dict.fromkeys(("floats", "nan", "shape", "axes", "sparse"), "form"),
    **dict.fromkeys(("round", "attempt", "exchange", "run", "phase"), "exchange"),
    "recipe": "recipe",
    **dict.fromkeys(("undeclared", "missing"), "names"),
    "too long": "norm",
    **dict.fromkeys(("huge", "least", "weight", "no weight", "loss"), "coordinates"),
}
CLIPPED = small_config(ONE, {"privacy": {"clip_norm": 0.2}, "system": {"users_per_chunk": 1}})
PIECES = [np.arange(0, 8), np.arange(8, 16), np.arange(16, 24)]


@pytest.mark.parametrize("lie", LIES)
def test_an_upload_that_lies_is_refused_named_and_the_round_goes_on_with_the_others(lie: str):
    spoil, why = LIES[lie]
    state, facts = train(CLIPPED, small_dataset(), shards=PIECES, tamper=spoiled(2, spoil))
    assert facts[0].refused.keys() == {2}
    assert why in facts[0].refused[2]
    assert facts[0].refused_for == {KINDS[lie]: 1}
    # As if the users of that node were nowhere to be found.
    nowhere = np.repeat(np.array([0, -1, 2], dtype=np.int32), 8)
    without, _ = train(CLIPPED, small_dataset(), shards=PIECES, owner_U=nowhere)
    assert torch.equal(state.weights_P, without.weights_P)
    assert facts[0].weight == 16.0


def test_an_honest_upload_passes():
    _, facts = train(CLIPPED, small_dataset(), shards=PIECES, tamper=spoiled(2, lambda upload: upload))
    assert not facts[0].refused and facts[0].weight == 24.0


def test_what_is_not_an_upload_is_refused():
    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            return Message(message.content, reply_to=message) if context.node_id == 1 else handler(message, context)

        return handle

    _, facts = train(CLIPPED, small_dataset(), shards=PIECES, tamper=tamper)
    assert facts[0].refused.keys() == {1} and "kind 'download'" in facts[0].refused[1]


def test_a_node_that_raises_is_counted_and_the_round_goes_on():
    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            if context.node_id == 3:
                raise MemoryError("no room")
            return handler(message, context)

        return handle

    _, facts = train(CLIPPED, small_dataset(), shards=PIECES, tamper=tamper)
    assert facts[0].refused.keys() == {3} and "MemoryError" in facts[0].refused[3]
    assert facts[0].refused_for == {"failed": 1}
    assert facts[0].weight == 16.0


def test_when_every_upload_is_refused_the_round_fails_and_says_why():
    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            raise RuntimeError("broken build")

        return handle

    with pytest.raises(AllUploadsRefused, match=r"training round 1: none of 3 nodes .*broken build"):
        train(CLIPPED, small_dataset(), shards=PIECES, tamper=tamper)


def slow(nodes: set[int], seconds: float) -> Callable[[Handler], Handler]:
    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            if context.node_id in nodes:
                time.sleep(seconds)
            return handler(message, context)

        return handle

    return tamper


def past_the_deadline(monkeypatch: pytest.MonkeyPatch, *, late: set[int]) -> dict[str, Any]:
    """Settings of `train` for a deadline that passes once all but the ``late`` nodes have answered, however busy the machine is."""
    is_over, passed, in_time = threading.Event(), [0.0], 3 - len(late)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0], perf_counter=time.perf_counter, sleep=time.sleep)
    monkeypatch.setattr(exchange, "time", clock)

    class LateGrid(InProcessGrid):
        pulled = 0

        def pull_messages(self, message_ids: Any) -> list[Message]:
            replies = super().pull_messages(message_ids)
            self.pulled += len(replies)
            if self.pulled == in_time:
                passed[0] = 3600.0
            return replies

        def close(self) -> None:
            is_over.set()
            super().close()

    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            if context.node_id in late:
                is_over.wait(60)
            return handler(message, context)

        return handle

    return {"grid": LateGrid, "tamper": tamper, "threads": 3, "deadline_seconds": 600.0}


def test_the_deadline_drops_late_nodes_and_the_round_goes_on(monkeypatch: pytest.MonkeyPatch):
    state, facts = train(CLIPPED, small_dataset(), shards=PIECES, **past_the_deadline(monkeypatch, late={1}))
    assert facts[0].refused == {1: "not reached, or no answer before the deadline"}
    assert facts[0].refused_for == {"missing": 1}
    assert facts[0].weight == 16.0
    nowhere = np.repeat(np.array([-1, 1, 2], dtype=np.int32), 8)
    assert torch.equal(state.weights_P, train(CLIPPED, small_dataset(), shards=PIECES, owner_U=nowhere)[0].weights_P)


def test_when_all_are_late_the_round_fails(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AllUploadsRefused, match="deadline"):
        train(CLIPPED, small_dataset(), shards=PIECES, **past_the_deadline(monkeypatch, late={1, 2, 3}))


def test_without_a_deadline_slow_nodes_are_waited_for():
    _, facts = train(CLIPPED, small_dataset(), shards=PIECES, tamper=slow({1}, 0.4), threads=3)
    assert not facts[0].refused
    assert 0.3 < facts[0].waited <= facts[0].seconds


class DeafGrid(InProcessGrid):
    """As a deployed Grid does: no name for a message that could not be pushed."""

    def push_messages(self, messages: Any) -> Any:
        return [None if message.metadata.dst_node_id == 2 else super(DeafGrid, self).push_messages([message])[0] for message in messages]


def test_a_node_that_cannot_be_reached_is_counted():
    _, facts = train(CLIPPED, small_dataset(), shards=PIECES, grid=DeafGrid)
    assert facts[0].refused.keys() == {2}
    assert facts[0].weight == 16.0


class EchoingGrid(InProcessGrid):
    """Every reply comes twice, and once more in the next round."""

    heard: tuple[Message, ...] = ()

    def pull_messages(self, message_ids: Any) -> list[Message]:
        replies = super().pull_messages(message_ids)
        again = [*self.heard, *replies, *replies]
        self.heard = (*self.heard, *replies)
        return again


def test_one_upload_of_a_node_is_added_a_round_and_none_is_played_again():
    config = small_config({"server": {"rounds": 2, "cohort": 24}}, {"privacy": {"clip_norm": 0.2}, "system": {"users_per_chunk": 1}})
    echoed, facts = train(config, small_dataset(), shards=PIECES, grid=EchoingGrid)
    honest, _ = train(config, small_dataset(), shards=PIECES)
    assert torch.equal(echoed.weights_P, honest.weights_P)
    assert all(fact.refused == {} and fact.refused_for.keys() == {"unasked"} and fact.weight == 24.0 for fact in facts)
    assert facts[1].refused_for["unasked"] > facts[0].refused_for["unasked"] >= 3


class ForgingGrid(InProcessGrid):
    """Every reply says that it comes from node 1."""

    def pull_messages(self, message_ids: Any) -> list[Message]:
        replies = super().pull_messages(message_ids)
        for reply in replies:
            reply.metadata.__dict__["_src_node_id"] = 1
        return replies


def test_a_reply_belongs_to_the_node_that_was_asked_whatever_it_says():
    forged, facts = train(CLIPPED, small_dataset(), shards=PIECES, grid=ForgingGrid)
    assert not facts[0].refused
    assert torch.equal(forged.weights_P, train(CLIPPED, small_dataset(), shards=PIECES)[0].weights_P)


# ---- nodes that drop out and come back ----


class FlakyGrid(InProcessGrid):
    """Node 2 is killed when it is first asked, as Flower tells of one: its message is lost, and it is there again after some looks."""

    away, code, is_noticed = 2, ErrorCode.NODE_UNAVAILABLE, True
    looks = 0
    lost: str | None = None

    def push_messages(self, messages: Any) -> list[str]:
        wanted = list(messages)
        names = super().push_messages(wanted)
        if self.lost is None:
            self.lost = next(name for name, message in zip(names, wanted, strict=True) if message.metadata.dst_node_id == 2)
            self.abandon([self.lost])
            self.waiting = wanted[names.index(self.lost)]
        return names

    def pull_messages(self, message_ids: Any) -> list[Message]:
        rest = [name for name in message_ids if name != self.lost]
        replies = super().pull_messages(rest) if rest else []
        if len(rest) < len(message_ids) and self.is_noticed:
            replies.append(Message(Error(self.code, "gone"), reply_to=self.waiting))
        return replies

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return [node for node in super().get_node_ids() if node != 2 or self.looks > self.away]


def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(exchange, "PAUSE_SECONDS", 0.01)


@pytest.mark.parametrize("code", exchange.LOST)
def test_a_node_that_drops_out_and_returns_within_the_window_is_asked_anew_and_counted(code: int, monkeypatch: pytest.MonkeyPatch):
    quick_looks(monkeypatch)
    monkeypatch.setattr(FlakyGrid, "code", code)
    state, facts = train(CLIPPED, small_dataset(), shards=PIECES, grid=FlakyGrid, deadline_seconds=60.0, reconnect_seconds=30.0)
    assert (facts[0].refused, facts[0].refused_for, facts[0].weight) == ({}, {}, 24.0)
    assert torch.equal(state.weights_P, train(CLIPPED, small_dataset(), shards=PIECES)[0].weights_P)


def test_a_node_that_flower_never_tells_of_is_missed_by_looking_who_is_there(monkeypatch: pytest.MonkeyPatch):
    quick_looks(monkeypatch)
    monkeypatch.setattr(FlakyGrid, "is_noticed", False)
    _, facts = train(CLIPPED, small_dataset(), shards=PIECES, grid=FlakyGrid, deadline_seconds=60.0, reconnect_seconds=30.0)
    assert (facts[0].refused, facts[0].weight) == ({}, 24.0)


@pytest.mark.parametrize("reconnect", [0.0, 0.05])
def test_a_node_that_does_not_return_within_the_window_is_missing_and_the_round_does_not_wait_for_the_deadline(
    reconnect: float, monkeypatch: pytest.MonkeyPatch
):
    quick_looks(monkeypatch)
    monkeypatch.setattr(FlakyGrid, "away", 10**9)
    _, facts = train(CLIPPED, small_dataset(), shards=PIECES, grid=FlakyGrid, deadline_seconds=600.0, reconnect_seconds=reconnect)
    assert facts[0].refused.keys() == {2} and facts[0].refused_for == {"missing": 1}
    assert facts[0].weight == 16.0 and facts[0].seconds < 60


class DyingGrid(FlakyGrid):
    """Node 2 is lost whenever it is asked, and there again at once."""

    away, asked = 0, 0

    def push_messages(self, messages: Any) -> list[str]:
        self.lost = None
        self.asked += any(message.metadata.dst_node_id == 2 for message in messages)
        return super().push_messages(messages)


def test_a_node_that_is_lost_again_and_again_gets_one_window(monkeypatch: pytest.MonkeyPatch):
    quick_looks(monkeypatch)
    _, facts = train(CLIPPED, small_dataset(), shards=PIECES, grid=DyingGrid, reconnect_seconds=0.3)
    assert facts[0].refused_for == {"missing": 1} and facts[0].weight == 16.0


class HealedGrid(FlakyGrid):
    """Only the line was cut: when node 2 is back it answers what it was asked first, too."""

    away, code = 1, ErrorCode.NODE_UNAVAILABLE

    def push_messages(self, messages: Any) -> list[str]:
        return InProcessGrid.push_messages(self, messages)


def test_of_both_answers_of_a_node_that_was_asked_anew_one_is_added(monkeypatch: pytest.MonkeyPatch):
    quick_looks(monkeypatch)
    started = threading.Event()

    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            if context.node_id == 2 and not started.is_set():
                started.set()
                time.sleep(0.3)
            return handler(message, context)

        return handle

    state, facts = train(CLIPPED, small_dataset(), shards=PIECES, grid=HealedGrid, tamper=tamper, threads=3, reconnect_seconds=30.0)
    assert facts[0].refused == {} and facts[0].weight == 24.0
    assert torch.equal(state.weights_P, train(CLIPPED, small_dataset(), shards=PIECES)[0].weights_P)


class FullGrid(InProcessGrid):
    """As a deployed Grid does when a message is larger than the SuperLink takes: no names at all."""

    def push_messages(self, messages: Any) -> list[str]:
        return []


def test_messages_that_are_too_large_for_the_link_are_an_error_that_says_so():
    with pytest.raises(AllUploadsRefused, match="not reached"):
        train(CLIPPED, small_dataset(), shards=PIECES, grid=FullGrid)


# ---- rounds with too few uploads ----


def failing(nodes: set[int], rounds: set[int]) -> Callable[[Handler], Handler]:
    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            if context.node_id in nodes and wire.download_from_record_dict(message.content).address.round in rounds:
                raise RuntimeError("broken build")
            return handler(message, context)

        return handle

    return tamper


THREE_ROUNDS = small_config({"server": {"rounds": 3, "cohort": 24, "optimizer": "sgd"}}, {"privacy": {"clip_norm": 0.2}, "system": {"users_per_chunk": 1}})


def test_a_round_with_too_few_uploads_is_not_applied_and_the_run_goes_on_where_it_may():
    states: list[State] = []
    settings: dict[str, Any] = {"shards": PIECES, "least_fraction": 0.5, "goes_on": True}
    _, facts = train(THREE_ROUNDS, small_dataset(), tamper=failing({1, 2}, {2}), on_round=lambda state, facts: states.append(state), **settings)
    assert [(fact.nodes, fact.nodes_used, fact.is_applied) for fact in facts] == [(3, 3, True), (3, 1, False), (3, 3, True)]
    assert torch.equal(states[1].weights_P, states[0].weights_P) and states[1].memory is states[0].memory
    assert not torch.equal(states[2].weights_P, states[1].weights_P)
    assert [state.round for state in states] == [1, 2, 3]


def test_just_the_least_fraction_is_enough():
    _, facts = train(THREE_ROUNDS, small_dataset(), tamper=failing({1}, {1, 2, 3}), shards=PIECES, least_fraction=2 / 3)
    assert all(fact.is_applied and fact.nodes_used == 2 for fact in facts)


def test_a_round_with_too_few_uploads_ends_the_run_where_it_may_not_go_on_and_is_asked_for_again():
    states: list[State] = []
    with pytest.raises(TooFewUploads, match=r"training round 2: 1 of 3 nodes sent what could be used, and \[rounds\] least_fraction is 0.5; .*broken build"):
        train(
            THREE_ROUNDS,
            small_dataset(),
            tamper=failing({1, 2}, {2}),
            shards=PIECES,
            least_fraction=0.5,
            on_round=lambda state, facts: states.append(state),
        )
    assert [state.round for state in states] == [1]
    again, _ = train(THREE_ROUNDS, small_dataset(), shards=PIECES, state=states[0])
    assert torch.equal(again.weights_P, train(THREE_ROUNDS, small_dataset(), shards=PIECES)[0].weights_P)


def test_counts_of_too_few_nodes_end_the_run_because_they_are_summed_once():
    config = small_config({"counts": {}, "server": {"rounds": 1}})
    with pytest.raises(TooFewUploads, match="counts round 1: 1 of 3"):
        train(config, small_dataset(), tamper=failing({1, 2}, {1}), shards=PIECES, least_fraction=0.5, goes_on=True)


def test_under_a_plan_a_least_fraction_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="whether a round counts would say who took part"):
        train(small_config(ONE, PLAN), small_dataset(), folder=tmp_path, least_fraction=0.5)


def test_users_who_add_their_own_noise_are_charged_for_a_round_that_is_not_applied(tmp_path: Path):
    config = small_config({"server": {"rounds": 1, "cohort": 24}, "privacy": {"clip_norm": 0.5, "noise_multiplier": 1.0, "mode": "local", "delta": 1e-3}})
    plan = make_plan(config.privacy, config.server, None, 24, local=config.local)
    assert plan is not None
    recipe = make_recipe(config, num_items=40, catalogue=small_dataset().catalogue.hash, privacy=plan.told_to_nodes(config.privacy))
    run = Run("test", recipe, 24, (1, 2), np.repeat(np.array([0, 1], np.int32), 12), least_fraction=0.9, goes_on=True)
    shards = deal(config, small_dataset(), [np.arange(12), np.arange(12, 24)])
    for node, shard in shards.items():
        shard.device_folder = tmp_path / str(node)
        shard.device_folder.mkdir()
    inner = handler_of(shards)

    def handle(message: Message, context: Context) -> Message:
        if context.node_id == 1:
            raise RuntimeError("lost on its way")
        return inner(message, context)

    with InProcessGrid(handle, {1: {"partition-id": 1}, 2: {"partition-id": 2}}) as grid:
        told: list[RoundFacts] = []
        state = run_rounds(grid, run, first_state(recipe), on_round=lambda state, facts: told.append(facts))
    assert not told[0].is_applied and state.charged == {"training": 1}


# ---- who hosts whom ----


def test_users_whom_nobody_hosts_are_left_out():
    nowhere = np.repeat(np.array([-1, 1, 2], dtype=np.int32), 8)
    _, facts = train(CLIPPED, small_dataset(), shards=PIECES, owner_U=nowhere)
    assert (facts[0].users, facts[0].weight) == (24, 16.0)


def test_a_user_lives_on_one_node():
    with pytest.raises(WireError, match="user 3, whom node 7 hosts too"):
        owners({7: np.array([1, 3]), 9: np.array([3, 4])}, 5)
    with pytest.raises(WireError, match="user numbers up to 5"):
        owners({7: np.array([1, 5])}, 5)
    node_ids, owner_U = owners({9: np.array([0, 2]), 7: np.array([1])}, 4)
    assert node_ids == (9, 7) and owner_U.tolist() == [0, 1, 0, -1]


# ---- stopping and going on ----


def test_a_run_goes_on_where_its_state_says():
    config = small_config({"counts": {}, "server": {"rounds": 4}})
    states: list[State] = [first_state(recipe_of(config, small_dataset()))]
    whole, facts = train(config, small_dataset(), on_round=lambda state, facts: states.append(state))
    assert [(fact.phase, fact.round) for fact in facts] == [("counts", 1), *(("training", number) for number in (1, 2, 3, 4))]
    for done, state in enumerate(states):
        again, rest = train(config, small_dataset(), state=state)
        assert len(rest) == 5 - done
        assert torch.equal(again.weights_P, whole.weights_P)
        assert again.counts is not None and whole.counts is not None
        assert np.array_equal(again.counts.values, whole.counts.values)


@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_counts_in_blocks_are_those_at_once_and_go_on_between_two(top: int, clip: float | None):
    def config_of(blocks: int) -> RunConfig:
        return small_config({"counts": {"top": top, "clip_norm": clip, "blocks": blocks}, "server": {"rounds": 1}})

    whole, _ = train(config_of(1), small_dataset())
    states: list[State] = []
    blocks, facts = train(config_of(3), small_dataset(), on_round=lambda state, facts: states.append(state))
    assert [(fact.phase, fact.round) for fact in facts] == [("counts", 1), ("counts", 2), ("counts", 3), ("training", 1)]
    resumed, _ = train(config_of(3), small_dataset(), state=states[1])
    assert whole.counts is not None and len(vars(whole.counts)["values"])
    for name, array in vars(whole.counts).items():
        assert np.array_equal(array, getattr(blocks.counts, name)) and np.array_equal(array, getattr(resumed.counts, name))


def test_bytes_up_and_down_are_those_of_the_tensors():
    config = small_config(ONE)
    _, facts = train(config, small_dataset(), shards=PIECES)
    num_weights = first_state(recipe_of(config, small_dataset())).weights_P.numel()
    assert facts[0].download_bytes == 3 * 4 * num_weights
    # Updates of a few users fit 32 bits; weight and loss take 8 bytes each.
    assert facts[0].upload_bytes == 3 * (4 * num_weights + 16)
