"""The same bytes again, with any workers, order of replies and nodes; other chunks agree to rounding. And what a round computes."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedssl_server import exchange
from fedssl_simulations.grids import InProcessGrid
from flwr.app import Message
from oracles.slow_round import large_batch_step
from small import dataset_of, far_apart, recipe_of, small_config, small_dataset, train

from fedssl.config import RunConfig
from fedssl.records import Upload
from fedssl.server_round import State, first_state

CONFIG = small_config({"encoder": {"dropout": 0.1}, "local": {"steps": 2, "windows": 2}, "privacy": {"clip_norm": 0.3}, "counts": {"lags": 2}})
# Adam's default epsilon turns the rounding of a gradient that is zero in truth into whole steps.
STEADY: dict[str, Any] = {"server": {"epsilon": 1e-4}}


class ShufflingGrid(InProcessGrid):
    """Waits for all replies, then hands them out one at a time, in an order of its own."""

    _chance = random.Random(7)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = super().push_messages(messages)
        self._window = len(ids)
        self.late: set[str] = set(ids)
        self.ready: dict[str, Message] = {}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        while self.late:
            for reply in super().pull_messages(self.late):
                self.ready[reply.metadata.reply_to_message_id] = reply
                self.late.discard(reply.metadata.reply_to_message_id)
        return [self.ready.pop(self._chance.choice([name for name in message_ids if name in self.ready]))]


def same_bytes(left: State, right: State) -> bool:
    def parts(state: State) -> list[bytes]:
        counts = state.counts
        of_counts = [] if counts is None else [counts.starts.tobytes(), counts.columns.tobytes(), counts.values.tobytes()]
        return [state.weights_P.numpy().tobytes(), *(state.memory[name].numpy().tobytes() for name in sorted(state.memory)), *of_counts]

    return parts(left) == parts(right)


def with_system(config: RunConfig, **system: int) -> RunConfig:
    return config.model_copy(update={"system": config.system.model_copy(update=system)})


def test_the_same_run_twice_gives_the_same_bytes():
    assert same_bytes(train(CONFIG, small_dataset())[0], train(CONFIG, small_dataset())[0])


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_changes_no_byte(workers: int):
    assert same_bytes(train(CONFIG, small_dataset())[0], train(with_system(CONFIG, workers=workers), small_dataset())[0])


def test_the_order_of_replies_changes_no_byte():
    straight, _ = train(CONFIG, small_dataset(), shards=8)
    for _ in range(3):
        shuffled, facts = train(CONFIG, small_dataset(), shards=8, grid=ShufflingGrid)
        assert same_bytes(straight, shuffled)
        assert not any(fact.refused for fact in facts)


def test_how_users_are_dealt_to_nodes_changes_no_byte_where_chunks_are_of_one():
    alone = with_system(CONFIG, users_per_chunk=1)
    whole, _ = train(alone, small_dataset())
    chance = np.random.default_rng(1)
    pieces = [np.sort(piece) for piece in np.array_split(chance.permutation(24), 5)]
    for shards in (3, 24, pieces):
        assert same_bytes(whole, train(alone, small_dataset(), shards=shards)[0])


@pytest.mark.parametrize(("rounds", "tolerance"), [(1, 1e-6), (20, 1e-4)])
def test_other_chunks_and_shards_agree_to_rounding(rounds: int, tolerance: float):
    config = small_config(STEADY, {"server": {"rounds": rounds}, "local": {"steps": 2}})
    base, _ = train(config, small_dataset())
    for chunk, shards in ((1, 1), (32, 1), (7, 3)):
        other, _ = train(with_system(config, users_per_chunk=chunk), small_dataset(), shards=shards)
        assert far_apart(base, other) < tolerance


def test_the_server_holds_totals_not_uploads(monkeypatch: pytest.MonkeyPatch):
    uploads: list[weakref.ref[Upload]] = []
    alive: list[int] = []
    real = exchange.add

    def add(totals: Any, upload: Upload) -> None:
        uploads.append(weakref.ref(upload))
        alive.append(sum(ref() is not None for ref in uploads))
        real(totals, upload)

    monkeypatch.setattr(exchange, "add", add)
    train(small_config({"server": {"rounds": 1, "cohort": 24}}), small_dataset(), shards=24)
    # The newest alone: those before it are gone, without the help of the garbage collector.
    assert len(uploads) == 24
    assert max(alive) == 1


# Histories that fit the window, so that no chance is left in what a user reads; the last two events are held out.
WRITTEN = dataset_of([1, 2, 3, 4, 5], [6, 7, 6, 8, 1, 2], [3, 9], [5, 4, 3, 2, 1, 9, 8, 7, 6], [2, 4, 6, 8, 9, 9], num_items=9)
EVERYBODY = {"rounds": 1, "cohort": 5, "optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "schedule": "constant"}


@pytest.mark.parametrize("weighting", ["equal", "positions"])
def test_a_round_of_one_step_is_the_gradient_step_of_the_large_batch(weighting: str):
    # Shares of a window of 8 positions are whole steps of a weight.
    config = small_config({"server": {**EVERYBODY, "weighting": weighting}, "local": {"lr": 0.7, "grid_step": 2.0**-22}, "encoder": {"window": 8}})
    recipe = recipe_of(config, WRITTEN)
    before = first_state(recipe)
    after, facts = train(config, WRITTEN)
    expected, loss = large_batch_step(recipe, before.weights(recipe), WRITTEN.histories, lr=0.7, weighting=weighting)
    assert torch.allclose(after.weights_P, expected, rtol=0, atol=3e-6)
    assert not torch.allclose(after.weights_P, before.weights_P, rtol=0, atol=1e-3)
    assert facts[0].loss == pytest.approx(loss, abs=1e-4)


def test_users_without_a_position_to_learn_from_are_not_in_the_denominator():
    written = dataset_of([1, 2, 3, 4, 5], [7], num_items=9)
    config = small_config({"server": {**EVERYBODY, "cohort": 2}})
    both, facts = train(config, written)
    alone, _ = train(config, dataset_of([1, 2, 3, 4, 5], num_items=9))
    assert facts[0].users == 2 and facts[0].weight == 1.0
    assert far_apart(both, alone) < 1e-6


def test_a_round_to_which_nobody_came_changes_nothing_but_its_number(tmp_path: Path):
    config = small_config({"server": {"rounds": 1, "cohort": 1e-9, "sampling": "poisson"}})
    before = first_state(recipe_of(config, small_dataset()))
    after, facts = train(config, small_dataset(), state=before)
    assert facts[0].users == 0 and after.round == 1
    assert torch.equal(after.weights_P, before.weights_P)


def test_passes_ask_every_user_once_a_pass():
    asked: list[int] = []
    train(small_config({"server": {"rounds": 4, "cohort": 7}}), small_dataset(), on_round=lambda state, facts: asked.append(facts.users))
    assert asked == [7, 7, 7, 3]
