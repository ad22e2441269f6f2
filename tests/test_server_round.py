"""What the server makes of a round's mean update, beside the optimiser itself: what stays still, what shrinks, what is averaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import PLAN, recipe_of, small_config, small_dataset, train

from fedssl.checking import check
from fedssl.config import RunConfig, ServerConfig
from fedssl.counts import Counts
from fedssl.errors import ConfigError
from fedssl.parts import make_parts
from fedssl.server_optimizers import average_late
from fedssl.server_round import State, first_state
from fedssl.spectral import spectral_items
from fedssl.weights import ITEMS, flatten

FEW: dict[str, Any] = {"task": [{"name": "next-item", "negatives": 1}], "server": {"cohort": 2, "schedule": "constant"}}


def states_of(config: RunConfig, folder: Path | None = None) -> list[State]:
    """The state after each round."""
    states: list[State] = []
    train(config, small_dataset(), folder=folder, on_round=lambda state, facts: states.append(state))
    return states


@pytest.mark.parametrize("first", [1, 4, 7])
@pytest.mark.parametrize("parts", [{}, {"server": {"sampling": "poisson", "cohort": 0.5}}, PLAN], ids=["passes", "rounds without users", "plan"])
def test_the_average_is_the_mean_of_the_weights_after_late_rounds(parts: dict[str, Any], first: int, tmp_path: Path):
    config = small_config({"server": {"rounds": 7, "average_from": first}}, parts)
    states = states_of(config, tmp_path)
    recipe = recipe_of(config, small_dataset())
    for round, state in enumerate(states, start=1):
        if round < first:
            assert state.average_P is None and state.released(recipe)[ITEMS].equal(state.weights(recipe)[ITEMS])
            continue
        assert state.average_P is not None
        late = torch.stack([one.weights_P.double() for one in states[first - 1 : round]])
        torch.testing.assert_close(state.average_P.double(), late.mean(0), rtol=1e-6, atol=1e-7)
        assert flatten(state.released(recipe), make_parts(recipe).layout).equal(state.average_P)
    if first < 7:
        assert not states[-1].weights_P.equal(states[-1].average_P)  # type: ignore[arg-type]


def test_averaging_changes_nothing_of_the_training(tmp_path: Path):
    plain, averaged = (states_of(small_config({"server": {"rounds": 5, "average_from": first}})) for first in (0, 2))
    for one, other in zip(plain, averaged, strict=True):
        assert one.weights_P.equal(other.weights_P) and all(one.memory[name].equal(other.memory[name]) for name in one.memory)
    assert plain[-1].average_P is None


def test_an_average_of_many_rounds_keeps_its_digits():
    config = ServerConfig(rounds=3000, average_from=1)
    rng = torch.Generator().manual_seed(0)
    weights, average = torch.randn(3000, 20, generator=rng) + 5.0, None
    for round, row in enumerate(weights, start=1):
        average = average_late(config, average, row, round)
    assert average is not None
    torch.testing.assert_close(average.double(), weights.double().mean(0), rtol=1e-5, atol=0)


def test_an_average_that_would_begin_after_the_end_is_refused():
    with pytest.raises(ConfigError, match=r"average_from = 6 comes after the last of 5 rounds"):
        check(ServerConfig, {"rounds": 5, "average_from": 6}, where="run.toml")


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


@pytest.mark.parametrize("blocks", [1, 3])
def test_item_vectors_begin_with_the_counts_where_the_recipe_says_so(blocks: int):
    dataset = small_dataset()
    config = small_config({"encoder": {"first_items": "counts"}, "counts": {"blocks": blocks}, "server": {"rounds": 1}})
    before = first_state(recipe_of(config, dataset))
    states = states_of(config)
    recipe = recipe_of(config, dataset)
    counted = states[blocks - 1]
    assert isinstance(counted.counts, Counts)
    assert torch.equal(counted.weights(recipe)[ITEMS], spectral_items(counted.counts, before.weights(recipe)[ITEMS], seed=recipe.seed))
    for state in states[: blocks - 1]:
        assert torch.equal(state.weights_P, before.weights_P)
    random = states_of(small_config({"counts": {"blocks": blocks}, "server": {"rounds": 1}}))
    assert torch.equal(random[blocks - 1].weights_P, before.weights_P)


@pytest.mark.parametrize("has_plan", [False, True], ids=["no counts", "a plan"])
def test_first_items_of_counts_need_counts_without_a_plan(has_plan: bool):
    values = small_config(PLAN, {"counts": {"clip_norm": 1.0}, "privacy": {"counts_noise_multiplier": 1.0}}) if has_plan else small_config()
    with pytest.raises(ConfigError, match=r"first_items = 'counts' needs a \[counts\] section without a privacy plan; .*random.*distillation"):
        check(RunConfig, values.model_dump(exclude_unset=True) | {"encoder": {"first_items": "counts"}}, where="test")
