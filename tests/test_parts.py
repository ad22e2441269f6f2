"""Parts by name: those that ship, one's own, and plain words for a name nobody knows."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fedssl.config import RunConfig
from fedssl.errors import ConfigError
from fedssl.parts import initial_weights, make_parts
from fedssl.recipe import Recipe, make_recipe
from fedssl.weights import ITEMS


def recipe(*, num_items: int = 20, **sections: Any) -> Recipe:
    return make_recipe(RunConfig.model_validate({"encoder": {"width": 8, "hidden": 8, "window": 5}, **sections}), num_items=num_items, catalogue="")


def test_a_recipe_becomes_its_parts():
    parts = make_parts(recipe(task=[{"name": "next-item", "weight": 0.5}, {"name": "contrastive", "weight": 2.0}]))
    assert [weight for _, weight in parts.tasks] == [0.5, 2.0]
    assert parts.encoder.dropout_sites == 5
    assert parts.layout.names[-1] == ITEMS and parts.layout.shapes[-1] == (21, 8)


def test_a_task_of_weight_0_is_left_out():
    parts = make_parts(recipe(task=[{"name": "contrastive", "weight": 0.0}, {"name": "next-item"}]))
    assert [weight for _, weight in parts.tasks] == [1.0]
    assert "read" in parts.tasks[0][0].draw(torch.ones(1, 1, 1, 3, dtype=torch.int64).numpy(), None).sequences  # type: ignore[arg-type]


def test_first_weights_are_a_function_of_the_seed_and_row_0_is_zero():
    one, again, other = (initial_weights(recipe(seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one[ITEMS], other[ITEMS]) and not torch.equal(one["block0.qkv"], other["block0.qkv"])
    assert not one[ITEMS][0].any() and one[ITEMS][1:].all()
    assert all(leaf.isfinite().all() and leaf.dtype == torch.float32 for leaf in one.values())


def test_the_random_state_of_torch_is_neither_read_nor_moved():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = initial_weights(recipe())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert all(torch.equal(leaf, first[name]) for name, leaf in initial_weights(recipe()).items())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"encoder": {"name": "sasrek"}}, "there is no encoder 'sasrek'; there is bert4rec, gru4rec, hgrn, sasrec, or package.module:name of your own"),
        ({"task": [{"name": "next"}]}, "there is no task 'next'; there is contrastive, masked-item, next-item, previous-item, or"),
        ({"server": {"optimizer": "lion"}}, "there is no server optimiser 'lion'; there is adagrad, adam, adamw, sgd, yogi, or"),
        ({"task": [{"name": "no.such.module:task"}]}, "task 'no.such.module:task' cannot be loaded (No module named 'no'"),
        ({"task": [{"name": "fedssl.tasks.next_item:task"}]}, "cannot be loaded (module 'fedssl.tasks.next_item' has no attribute 'task')"),
        ({"task": [{"name": ":task"}]}, "task ':task' cannot be loaded (Empty module name)"),
    ],
)
def test_a_name_nobody_knows_is_refused_with_those_there_are(sections: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_parts(recipe(**sections))


@pytest.mark.parametrize(
    ("encoder", "task", "message"),
    [
        (
            "bert4rec",
            "next-item",
            "task 'next-item' cannot train 'bert4rec': an encoder that reads both ways sees the next items it should foretell; use the task masked",
        ),
        (
            "sasrec",
            "masked-item",
            "task 'masked-item' cannot train 'sasrec': a causal encoder has no mask and reads nothing behind a hidden item; use the task next-",
        ),
        ("gru4rec", "masked-item", "task 'masked-item' cannot train 'gru4rec'"),
    ],
)
def test_a_task_that_cannot_train_the_encoder_is_refused_with_what_to_use(encoder: str, task: str, message: str):
    widths = {"width": 8, "hidden": 8, "window": 5}
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_parts(recipe(encoder={"name": encoder, **widths}, task=[{"name": task}]))
    # A task that is not computed is not asked; contrast trains any encoder.
    suitable = "masked-item" if encoder == "bert4rec" else "next-item"
    parts = make_parts(recipe(encoder={"name": encoder, **widths}, task=[{"name": task, "weight": 0.0}, {"name": suitable}, {"name": "contrastive"}]))
    assert len(parts.tasks) == 2


def test_the_mean_of_a_history_is_refused_for_an_encoder_that_reads_both_ways():
    both_ways = {"encoder": {"name": "bert4rec"}, "task": [{"name": "masked-item"}]}
    with pytest.raises(ConfigError, match=r"\[head\] history = 2 is the mean of what came before, and 'bert4rec' reads both ways; set it to 0"):
        make_parts(recipe(head={"history": 2.0}, **both_ways))
    parts = make_parts(recipe(head={"history": 2.0}))
    assert parts.encoder is not parts.plain_encoder and make_parts(recipe()).encoder is make_parts(recipe()).plain_encoder
