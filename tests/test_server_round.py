"""What the server makes of a round's mean update, beside the optimiser itself: what stays still, what shrinks, what is averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small import recipe_of, small_config, small_dataset, train

from fedssl.config import RunConfig
from fedssl.server_round import State, first_state
from fedssl.weights import ITEMS

FEW: dict[str, Any] = {"task": [{"name": "next-item", "negatives": 1}], "server": {"cohort": 2, "schedule": "constant"}}


def off_zero(config: RunConfig) -> State:
    """A first state whose padding row is not zero, so that it would show if it moved."""
    recipe = recipe_of(config, small_dataset())
    state = first_state(recipe)
    weights_P = state.weights_P.clone()
    moved = replace(state, weights_P=weights_P)
    moved.weights(recipe)[ITEMS][0] = 1.0
    return moved


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_decay_shrinks_every_weight_but_those_of_the_padding_row(decay: float):
    config = small_config(FEW, {"server": {"optimizer": "adamw", "weight_decay": decay, "lr": 0.2, "rounds": 1}})
    before = off_zero(config)
    after, _ = train(config, small_dataset(), state=before)
    old, new = (state.weights(recipe_of(config, small_dataset()))[ITEMS] for state in (before, after))
    is_untouched = (new == old * (1 - 0.2 * decay)).all(1)
    assert 5 < int(is_untouched[1:].sum()) < len(old) - 1, "a round of two users touches some rows and leaves others"
    assert (new[0] == 1.0).all()


def test_a_round_to_which_nobody_came_decays_nothing():
    config = small_config(FEW, {"server": {"optimizer": "adamw", "weight_decay": 0.5, "cohort": 1e-9, "sampling": "poisson", "rounds": 1}})
    before = off_zero(config)
    after, facts = train(config, small_dataset(), state=before)
    assert facts[0].users == 0 and torch.equal(after.weights_P, before.weights_P)


@pytest.mark.parametrize("name", ["adamw", "adagrad", "yogi"])
def test_an_optimiser_that_ships_learns_in_a_whole_run(name: str):
    lr = {"adamw": 0.01, "adagrad": 0.02, "yogi": 0.02}[name]
    config = small_config({"server": {"optimizer": name, "lr": lr, "epsilon": 1e-3, "rounds": 30, "cohort": 24, "schedule": "constant"}})
    after, facts = train(config, small_dataset())
    losses = [fact.loss for fact in facts if fact.loss is not None]
    assert len(losses) == 30 and losses[-1] < 0.9 * losses[0]
    assert bool(after.weights_P.isfinite().all())
