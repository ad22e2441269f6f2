"""An encoder taught by a table: it learns what the table says, reads nothing else, and asks nobody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import PLAN, recipe_of, small_config, small_dataset, train

from fedssl.config import DistillationConfig
from fedssl.distillation import Teacher, distil, draw
from fedssl.errors import ConfigError
from fedssl.lift import LiftScorer, LiftTable
from fedssl.recommender import Recommender
from fedssl.server_round import first_state
from fedssl.weights import flatten

CONFIG = small_config(
    PLAN,
    {
        "counts": {"clip_norm": 0.5, "items": 30, "context": 2, "context_decay": 0.5, "returns": 2.0},
        "privacy": {"counts_noise_multiplier": 0.125},
        "server": {"rounds": 0},
        "distillation": {"steps": 60, "walks": 16, "length": 6, "lr": 0.03},
    },
)


def table_of(items: int = 36, rows: int = 30, seed: int = 0) -> LiftTable:
    chance = np.random.default_rng(seed)
    share = chance.dirichlet(np.ones(items))
    lift = chance.normal(0, 1.5, (rows, rows)).astype(np.float32)
    return LiftTable(np.arange(1, rows + 1), lift, np.pad(np.log(share), (1, 0)).astype(np.float32), np.array([-1.0], dtype=np.float32))


def test_what_the_teacher_says_after_each_step_is_what_the_table_scores():
    assert CONFIG.counts is not None and CONFIG.distillation is not None
    # Six of 36 items were not counted, and are passed over.
    table = table_of(rows=30)
    walks, said = Teacher(table, CONFIG.counts).walk(CONFIG.distillation, torch.Generator().manual_seed(1))
    assert walks.shape == (16, 6) and said.shape == (16, 6, 36) and int(walks.min()) >= 1
    assert 0.05 < (walks > 30).float().mean() < 0.5
    score = LiftScorer(table, CONFIG.counts)
    for step in range(6):
        expected = torch.softmax(torch.from_numpy(score([walk[: step + 1].numpy() for walk in walks])[:, 1:]), -1)
        torch.testing.assert_close(said[:, step], expected, rtol=1e-4, atol=1e-6)


def test_places_are_drawn_by_their_shares_and_never_where_there_is_none():
    share = torch.tensor([[0.0, 0.1, 0.0, 0.6, 0.3, 0.0]])
    drawn = draw(share.expand(20_000, 6), torch.Generator().manual_seed(3))
    torch.testing.assert_close(torch.bincount(drawn, minlength=6) / 20_000, share[0], rtol=0, atol=0.015)
    assert set(drawn.tolist()) == {1, 3, 4}


def test_walks_follow_what_the_table_says():
    assert CONFIG.counts is not None
    # After item 1 comes item 2, and nothing else is likely.
    table = replace(table_of(), lift=np.full((30, 30), -20.0, dtype=np.float32))
    table.lift[0, 1] = 20.0
    walks, _ = Teacher(table, CONFIG.counts).walk(DistillationConfig(walks=500, length=2), torch.Generator().manual_seed(2))
    after_one = walks[walks[:, 0] == 1, 1]
    assert len(after_one) > 3 and bool((after_one == 2).all())


def test_the_encoder_comes_close_to_the_table():
    recipe = recipe_of(small_config(CONFIG.model_dump(), {"distillation": {"steps": 200}}), small_dataset())
    seen: list[float] = []
    distil(recipe, table_of(), on_step=lambda step, loss: seen.append(loss))
    assert len(seen) == 200 and min(seen) > 0
    assert np.mean(seen[-5:]) < 0.4 * seen[0]


def test_the_same_table_teaches_the_same_weights():
    recipe = recipe_of(CONFIG, small_dataset())
    once, twice = distil(recipe, table_of()), distil(recipe, table_of())
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_run_that_distils_charges_its_counts_alone_and_recommends_with_both_parts(tmp_path: Path):
    state, facts = train(CONFIG, small_dataset(), folder=tmp_path)
    assert [fact.phase for fact in facts] == ["popularity", "counts", "distillation"]
    assert (facts[-1].users, facts[-1].upload_bytes, facts[-1].download_bytes) == (0, 0, 0)
    assert state.charged == {"popularity": 1, "counts": 1}
    recipe = recipe_of(CONFIG, small_dataset())
    assert isinstance(state.counts, LiftTable)
    expected = distil(recipe, state.counts)
    assert all(torch.equal(leaf, expected[name]) for name, leaf in state.weights(recipe).items())
    scores = Recommender(recipe, state.weights(recipe), state.counts)([np.array([1, 2])], np.array([0]))
    assert list(scores) == ["score", "encoder", "counts"]


def test_without_distillation_or_rounds_the_counts_recommend_alone(tmp_path: Path):
    config = CONFIG.model_copy(update={"distillation": None})
    state, facts = train(config, small_dataset(), folder=tmp_path)
    assert [fact.phase for fact in facts] == ["popularity", "counts"]
    recipe = recipe_of(config, small_dataset())
    assert torch.equal(state.weights_P, first_state(recipe).weights_P)
    scores = Recommender(recipe, state.weights(recipe), state.counts)([np.array([1, 2])], np.array([0]))
    assert list(scores) == ["score"] and config.counts is not None and isinstance(state.counts, LiftTable)
    assert np.array_equal(scores["score"].numpy(), LiftScorer(state.counts, config.counts)([np.array([1, 2])]))


def test_training_goes_on_from_what_was_distilled(tmp_path: Path):
    config = small_config(CONFIG.model_dump(), {"server": {"rounds": 2}})
    states: list[Any] = []
    train(config, small_dataset(), folder=tmp_path, on_round=lambda state, facts: states.append(state))
    recipe = recipe_of(config, small_dataset())
    assert [state.phase for state in states] == ["popularity", "counts", "distillation", "training", "training"]
    assert torch.equal(states[2].weights_P, flatten(distil(recipe, states[1].counts), _layout(recipe)))
    assert not torch.equal(states[3].weights_P, states[2].weights_P)
    assert states[-1].charged == {"popularity": 1, "counts": 1, "training": 2}


def _layout(recipe: Any) -> Any:
    from fedssl.parts import make_parts

    return make_parts(recipe).layout


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"distillation": {"steps": 1, "length": 5}}, "learns from counts released under a privacy plan"),
        ({**PLAN, "counts": {"clip_norm": 1.0}, "privacy": {**PLAN["privacy"], "counts_noise_multiplier": 1.0}, "distillation": {"length": 11}}, "window 10"),
        ({"server": {"rounds": 0}}, "leaves nothing to do"),
    ],
)
def test_settings_that_would_teach_nothing_are_refused(parts: dict[str, Any], message: str):
    from small import SMALL

    from fedssl.checking import check
    from fedssl.config import RunConfig

    with pytest.raises(ConfigError, match=message):
        check(RunConfig, {**SMALL, **{name: {**SMALL.get(name, {}), **part} for name, part in parts.items()}}, where="run.toml")
