"""Evaluation where the events are: sums that are exactly those of the central evaluation, and nothing under a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import SERVER, download_of, make_device
from device import recipe_of as recipe_of_device
from everything_on import lay_out
from fedssl_client.app import app
from fedssl_client.device_trainer import train as train_device
from fedssl_client.policy import OutsidePolicy
from fedssl_server.rounds import RoundFacts
from fedssl_server.serve import serve
from fedssl_simulations.grids import Handler, InProcessGrid
from fedssl_simulations.run import heads_of, simulate
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from small import PLAN, dataset_of, deal, recipe_of, small_config, small_dataset, train

from fedssl import wire
from fedssl.checkpoints import list_checkpoints, read_checkpoint
from fedssl.client_round import client_round
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset
from fedssl.device_evaluation import metrics_of, model_tensors, sums_of_ranks
from fedssl.errors import ConfigError, WireError
from fedssl.evaluation import evaluate
from fedssl.privacy.manifest import GAIN_STEP
from fedssl.privacy.uploads import open_device
from fedssl.recommender import Recommender
from fedssl.records import Address, Download
from fedssl.server_round import State, first_state

EVERY_2: dict[str, Any] = {"evaluation": {"on_devices": 2, "ks": (1, 5, 10)}, "server": {"rounds": 5, "cohort": 24}}
PIECES = [np.arange(0, 8), np.arange(8, 16), np.arange(16, 24)]


def centrally(config: RunConfig, dataset: Dataset, state: State, heads: Any = None) -> dict[str, Any]:
    model = Recommender(recipe_of(config, dataset), state.released(recipe_of(config, dataset)), state.counts, heads=heads)
    return evaluate(model, dataset.histories, "test", ks=config.evaluation.ks).summary()


def assert_same(found: Any, wanted: dict[str, Any], ks: tuple[int, ...]) -> None:
    for column in ("all", "unseen"):
        for k in ks:
            assert found[column][f"hr@{k}"] == wanted[column][f"hr@{k}"]
            # Every user's gain is rounded to the nearest step.
            assert abs(found[column][f"ndcg@{k}"] - wanted[column][f"ndcg@{k}"]) <= GAIN_STEP / 2


def test_the_sums_of_all_nodes_are_the_central_evaluation_of_the_same_users_with_counts_heads_and_a_mean_of_weights(tmp_path: Path):
    config = small_config(EVERY_2, {"counts": {}, "head": {"name": "user-vector"}, "server": {"average_from": 2}})
    states: dict[int, tuple[State, RoundFacts, Any]] = {}
    shards = deal(config, small_dataset(), PIECES, tmp_path / "heads")

    def note(state: State, facts: RoundFacts) -> None:
        if facts.phase == "training":
            read = heads_of(shards, recipe_of(config, small_dataset()))
            assert read is not None
            heads_UD = read(np.arange(24))
            states[facts.round] = (state, facts, lambda users: heads_UD[users])

    # The shards of `train` keep their heads in the same files.
    train(config, small_dataset(), shards=PIECES, folder=tmp_path, on_round=note)
    assert [number for number, (_, facts, _) in states.items() if facts.evaluation is not None] == [2, 4, 5]
    for number in (2, 4, 5):
        state, facts, heads = states[number]
        found = facts.evaluation
        assert found is not None and (found["users"], found["nodes"], found["nodes_used"], found["refused_for"]) == (24, 3, 3, {})
        assert_same(found, centrally(config, small_dataset(), state, heads), (1, 5, 10))
    assert any(facts.evaluation["all"]["hr@10"] for _, facts, _ in states.values() if facts.evaluation)
    assert states[5][0].average_P is not None


def test_evaluating_changes_nothing_that_is_learned():
    config, without = small_config(EVERY_2), small_config(EVERY_2, {"evaluation": {"on_devices": 0}})
    state, _ = train(config, small_dataset(), shards=PIECES)
    assert torch.equal(state.weights_P, train(without, small_dataset(), shards=PIECES)[0].weights_P)


def test_hits_and_gains_are_those_worked_by_hand():
    """Four items, scores 4, 3, 2, 1 whatever the history; the third user has no target."""
    dataset = dataset_of([1, 4, 2], [3, 2, 1, 4], [2, 3], num_items=4)

    def scorer(histories: Any, users: Any) -> torch.Tensor:
        return torch.tensor([[0.0, 4.0, 3.0, 2.0, 1.0]]).expand(len(histories), 5)

    sums = sums_of_ranks(scorer, dataset.histories, np.arange(3), (1, 2))
    # Ranks among all: 2 and 4. Unseen: user 0 met 1 and 4, so 1; user 1 met 1, 2, 3, so 1.
    assert sums["tested"].tolist() == [2]
    assert sums["hits"].tolist() == [[0, 1], [2, 2]]
    second = round(2**24 / np.log2(3))
    assert sums["gains"].tolist() == [[0, second], [2 * 2**24, 2 * 2**24]]
    assert metrics_of(sums, (1, 2)) == {
        "users": 2,
        "all": {"hr@1": 0.0, "ndcg@1": 0.0, "hr@2": 0.5, "ndcg@2": second * GAIN_STEP / 2},
        "unseen": {"hr@1": 1.0, "ndcg@1": 1.0, "hr@2": 1.0, "ndcg@2": 1.0},
    }
    assert metrics_of(sums_of_ranks(scorer, dataset.histories, np.array([2]), (1, 2)), (1, 2)) == {"users": 0}
    assert metrics_of({}, (1, 2)) == {"users": 0}


def test_under_a_plan_it_is_refused_with_the_reason_by_server_and_node():
    with pytest.raises(ValueError, match=r"\[evaluation\] on_devices would send sums of people's last events, and these are no sum that the plan accounts for"):
        small_config(PLAN, {"evaluation": {"on_devices": 1}})
    config = small_config(EVERY_2)
    recipe = recipe_of(config, small_dataset())
    under_a_plan = recipe.model_copy(update={"privacy": small_config(PLAN).privacy})
    state = first_state(recipe)
    download = Download(Address("run", "evaluation", 1), under_a_plan, model_tensors(state.released(recipe), None))
    shard = deal(config, small_dataset(), PIECES)[1]
    with pytest.raises(ConfigError, match="not among those that the privacy plan accounts for; nothing may leave"):
        client_round(download, shard)
    with pytest.raises(ConfigError, match="phase 'evaluation' is not in the recipe"):
        client_round(replace(download, recipe=recipe.model_copy(update={"evaluation": None})), shard)


@pytest.mark.parametrize("spoil", [{"items": None}, {"more": np.zeros(1, np.float32)}, {"items": np.zeros((2, 2), np.float32)}])
def test_a_download_with_other_weights_than_its_recipes_is_refused(spoil: dict[str, Any]):
    recipe = recipe_of(small_config(EVERY_2), small_dataset())
    tensors = {**model_tensors(first_state(recipe).released(recipe), None), **spoil}
    download = Download(Address("run", "evaluation", 1), recipe, {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(WireError, match="other weights than its recipe"):
        client_round(download, deal(small_config(EVERY_2), small_dataset(), PIECES)[1])


def node_2_evaluates(answer: Any) -> Any:
    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            reply = handler(message, context)
            if context.node_id != 2 or message.metadata.message_type != "evaluate":
                return reply
            return Message(answer(wire.upload_from_record_dict(reply.content)), reply_to=message)

        return handle

    return tamper


LIES = {
    "more hits than users": (lambda sums: {**sums, "hits": sums["hits"] * 0 + 9}, "coordinates"),
    "gains beyond 1": (lambda sums: {**sums, "gains": sums["gains"] * 0 + 9 * 2**24}, "coordinates"),
    "less than nothing": (lambda sums: {**sums, "tested": -sums["tested"]}, "coordinates"),
    "a history": (lambda sums: {**sums, "last": np.array([17], np.int64)}, "names"),
    "an update": (lambda sums: {"update": np.zeros(5, np.int64)}, "names"),
}


@pytest.mark.parametrize("lie", LIES)
def test_sums_that_lie_are_refused_and_counted_and_the_others_are_evaluated(lie: str):
    change, kind = LIES[lie]
    config = small_config(EVERY_2, {"server": {"rounds": 2}})
    tamper = node_2_evaluates(lambda upload: wire.to_record_dict(replace(upload, sums=change(upload.sums))))
    _, facts = train(config, small_dataset(), shards=PIECES, tamper=tamper)
    found = facts[1].evaluation
    assert found is not None and (found["users"], found["nodes_used"], found["refused_for"]) == (16, 2, {kind: 1})


def test_where_no_node_evaluates_the_run_goes_on():
    config = small_config(EVERY_2, {"server": {"rounds": 3}})

    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            if message.metadata.message_type == "evaluate":
                return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "not agreed"), reply_to=message)
            return handler(message, context)

        return handle

    _, facts = train(config, small_dataset(), shards=PIECES, tamper=tamper)
    assert [fact.evaluation for fact in facts] == [None, *[{"users": 0, "nodes": 3, "nodes_used": 0, "refused_for": {"failed": 3}}] * 2]
    assert all(not fact.refused for fact in facts)


def test_a_recipe_without_it_is_the_text_that_it_was():
    assert "evaluation" not in recipe_of(small_config(), small_dataset()).canonical
    recipe = recipe_of(small_config(EVERY_2), small_dataset())
    assert '"evaluation":{"every":2,"ks":[1,5,10]}' in recipe.canonical


# ---- a person's device ----


def ask_device(folder: Path, recipe: Any) -> dict[str, Any]:
    state = first_state(recipe)
    download = replace(download_of(recipe), address=Address("a run", "evaluation", 1), tensors=model_tensors(state.released(recipe), None))
    return wire.upload_from_bytes(train_device(wire.to_bytes(download), folder, SERVER)).sums


def test_a_device_refuses_until_its_person_agrees_and_charges_nothing(tmp_path: Path):
    recipe = recipe_of_device(evaluation={"on_devices": 1, "ks": (5,)})
    folder = make_device(tmp_path / "device", recipe)
    with pytest.raises(OutsidePolicy, match=r"not agreed to evaluation \(\[consent\] evaluate\)"):
        ask_device(folder, recipe)
    assert (open_device(folder).ledger.joined(), open_device(folder).ledger.uploads()) == ({}, {})


def test_a_device_whose_person_agrees_sends_hits_gains_and_that_it_was_tested_and_nothing_else(tmp_path: Path):
    recipe = recipe_of_device(evaluation={"on_devices": 1, "ks": (5,)})
    folder = make_device(tmp_path / "device", recipe, consent={"train": True, "evaluate": True})
    sums = ask_device(folder, recipe)
    assert {name: value.shape for name, value in sums.items()} == {"hits": (2, 1), "gains": (2, 1), "tested": (1,)}
    assert sums["tested"].tolist() == [1] and sums["hits"].max() <= 1 and sums["gains"].max() <= 2**24
    with pytest.raises(OutsidePolicy, match="not agreed to training"):
        ask_device(make_device(tmp_path / "other", recipe, consent={"train": False, "evaluate": True}), recipe)


def test_over_the_client_app_a_server_writes_down_what_a_simulation_does(tmp_path: Path):
    config = small_config({"evaluation": {"on_devices": 1, "ks": (5,)}, "server": {"rounds": 1, "cohort": 24}, "system": {"shards": 2}})
    dataset = small_dataset()
    simulate(config, out=tmp_path / "simulated", dataset=dataset)
    stores, run = lay_out(config, dataset, tmp_path)
    nodes = {number: {"store": str(store)} for number, store in enumerate(stores, start=1)}
    with InProcessGrid(app, nodes) as grid:
        serve(grid, {number: np.array_split(np.arange(24), 2)[number - 1] for number in nodes}, run)
    here, there = (json.loads((folder / "metrics.jsonl").read_text())["evaluation"] for folder in (tmp_path / "simulated", run))
    assert here == there and here["users"] == 24 and here["nodes_used"] == 2
    assert_same(here, centrally(config, dataset, read_checkpoint(list_checkpoints(run / "checkpoints")[-1]).state), (5,))
