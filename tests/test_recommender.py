"""A recommender: scores of encoder and counts that add up, for any history."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles.loop_over_users import encode as encode_plainly
from torch import Tensor

from fedssl.config import CountsConfig, EncoderConfig, HeadConfig, RunConfig
from fedssl.counts import Counts, CountsScorer, from_cells
from fedssl.parts import initial_weights
from fedssl.recipe import Recipe, make_recipe
from fedssl.recommender import Recommender
from fedssl.weights import ITEMS, Weights

NUM_ITEMS, D, WINDOW = 12, 8, 5
HISTORIES = [np.array(rows, dtype=np.int32) for rows in ([3, 1, 4], [], [7], list(range(1, 12)), [2, 2, 2, 2, 2])]
USERS = np.array([10, 3, 7, 8, 0])


def recipe_with(counts: CountsConfig | None = None) -> Recipe:
    encoder = EncoderConfig(width=D, window=WINDOW, hidden=8, blocks=1)
    return make_recipe(RunConfig(encoder=encoder, counts=counts), num_items=NUM_ITEMS, catalogue="")


def weights_of(recipe: Recipe) -> Weights:
    rng = torch.Generator().manual_seed(0)
    return {name: leaf + 0.3 * torch.randn(leaf.shape, generator=rng) for name, leaf in initial_weights(recipe).items()}


def some_counts() -> Counts:
    rows, columns = np.array([1, 3, 3, 4, 7, 11]), np.array([4, 1, 2, 9, 3, 12])
    return from_cells(rows, columns, np.array([2.0, 1.0, 0.5, 3.0, 1.0, 0.25]), num_items=NUM_ITEMS)


def heads(users: np.ndarray) -> np.ndarray:
    return np.outer(users, np.arange(D)).astype(np.float32) / 100


def test_scores_are_those_of_a_plain_transformer_on_the_newest_window():
    recipe = recipe_with()
    weights = weights_of(recipe)
    scores = Recommender(recipe, weights)(HISTORIES, USERS)["score"]
    assert scores.shape == (5, NUM_ITEMS + 1)
    for history, found in zip(HISTORIES, scores, strict=True):
        if len(history) == 0:
            assert not found.any()
            continue
        hidden_LD = encode_plainly(weights, weights[ITEMS], torch.from_numpy(history[-WINDOW:].astype(np.int64)), recipe.encoder)
        torch.testing.assert_close(found, weights[ITEMS] @ hidden_LD[-1], rtol=1e-4, atol=1e-5)


def test_a_history_scores_alike_alone_and_in_company():
    recommender = Recommender(recipe_with(CountsConfig()), weights_of(recipe_with()), some_counts(), heads=heads)
    together = recommender(HISTORIES, USERS)
    for place, history in enumerate(HISTORIES):
        for name, alone in recommender([history], USERS[place : place + 1]).items():
            torch.testing.assert_close(alone[0], together[name][place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("form", ["log1p", "log-lift"])
def test_the_parts_add_up(strength: float, form: str):
    config = CountsConfig(strength=strength, form=form)  # type: ignore[arg-type]
    recipe = recipe_with(config)
    scores = Recommender(recipe, weights_of(recipe), some_counts())(HISTORIES, USERS)
    assert list(scores) == ["score", "encoder", "counts"]
    assert torch.equal(scores["score"], scores["encoder"] + strength * scores["counts"])
    assert torch.equal(scores["counts"], torch.from_numpy(CountsScorer(some_counts(), config)(HISTORIES)))
    assert torch.equal(scores["encoder"], Recommender(recipe, weights_of(recipe))(HISTORIES, USERS)["score"])


@pytest.mark.parametrize("form", ["log1p", "log-lift"])
def test_counts_of_strength_0_leave_the_encoder_alone(form: str):
    recipe = recipe_with(CountsConfig(strength=0.0, form=form))  # type: ignore[arg-type]
    scores = Recommender(recipe, weights_of(recipe), some_counts())(HISTORIES, USERS)
    assert torch.equal(scores["score"], scores["encoder"])
    assert scores["counts"].any()


def test_without_counts_in_the_recipe_or_at_hand_the_encoder_is_all():
    with_them, without = recipe_with(CountsConfig()), recipe_with()
    assert list(Recommender(with_them, weights_of(with_them))(HISTORIES, USERS)) == ["score"]
    assert list(Recommender(without, weights_of(without), some_counts())(HISTORIES, USERS)) == ["score"]


def test_a_head_is_added_to_its_own_users_hidden_state():
    recipe = recipe_with()
    weights = weights_of(recipe)
    plain, personal = Recommender(recipe, weights)(HISTORIES, USERS), Recommender(recipe, weights, heads=heads)(HISTORIES, USERS)
    wanted: Tensor = plain["score"] + torch.from_numpy(heads(USERS)) @ weights[ITEMS].T
    torch.testing.assert_close(personal["score"], wanted, rtol=1e-5, atol=1e-5)
    assert personal["score"][1].any()


def test_empty_histories_and_no_history_at_all_score_without_a_crash():
    recommender = Recommender(recipe_with(CountsConfig()), weights_of(recipe_with()), some_counts())
    empty = np.zeros(0, dtype=np.int32)
    assert recommender([empty, empty], np.array([0, 1]))["score"].tolist() == [[0.0] * (NUM_ITEMS + 1)] * 2
    assert recommender([], np.zeros(0, dtype=np.int64))["score"].shape == (0, NUM_ITEMS + 1)


def test_the_mean_of_the_whole_history_is_added_and_not_that_of_the_window():
    plain = recipe_with()
    recipe = plain.model_copy(update={"head": HeadConfig(history=2.0)})
    weights = weights_of(plain)
    without, found = (Recommender(one, weights)(HISTORIES, USERS)["score"] for one in (plain, recipe))
    for place, history in enumerate(HISTORIES):
        mean_D = weights[ITEMS][history.astype(np.int64)].mean(0) if len(history) else torch.zeros(D)
        torch.testing.assert_close(found[place], without[place] + 2.0 * weights[ITEMS] @ mean_D, rtol=1e-4, atol=1e-5)
