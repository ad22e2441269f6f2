"""Facts about the contrastive task, for encoders of either kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fedssl_simulations.diagnostics import contrast_facts, gradient_norms, spread_now
from small import recipe_of, small_config, small_dataset

from fedssl.collapse import spread
from fedssl.config import TaskConfig
from fedssl.parts import initial_weights
from fedssl.recommender import Recommender
from fedssl.weights import ITEMS


@pytest.mark.parametrize(("encoder", "usual"), [("sasrec", "next-item"), ("gru4rec", "next-item"), ("hgrn", "next-item"), ("bert4rec", "masked-item")])
def test_contrast_is_compared_with_the_task_that_suits_the_encoder(encoder: str, usual: str):
    dataset = small_dataset()
    config = small_config({"encoder": {"name": encoder}, "task": [{"name": usual, "keep": 0.5}, {"name": "contrastive", "negatives": 3}]})
    recipe = recipe_of(config, dataset)
    weights, users = initial_weights(recipe), np.arange(dataset.histories.num_users)
    facts = contrast_facts(recipe, weights, dataset.histories)
    assert facts is not None and facts["nonzero_share"] == 1.0
    contrast, other = (gradient_norms(recipe, weights, dataset.histories, users, task) for task in (config.task[1], TaskConfig(name=usual, keep=0.5)))
    assert facts["gradient_ratio"] == pytest.approx(float(np.median((contrast / other)[other > 0])), rel=1e-5)


def test_encodings_are_those_before_the_validation_target_and_infinite_ones_are_left_out():
    dataset = small_dataset()
    recipe, histories = recipe_of(small_config({}), dataset), dataset.histories
    weights, users = initial_weights(recipe), np.arange(dataset.histories.num_users)
    places = histories.target_places("validation")
    encoded = Recommender(recipe, weights).encode([histories.items[histories.cuts[user] : places[user]] for user in users])
    targets = histories.items[places].astype(np.int64)
    assert spread_now(recipe, weights, histories, users) == spread(encoded, weights[ITEMS][torch.from_numpy(targets)])
    broken = {**weights, ITEMS: weights[ITEMS].clone()}
    broken[ITEMS][targets[0]] = np.nan
    found = spread_now(recipe, broken, histories, users)
    assert found is None or np.isfinite(found.effective_rank)
    broken[ITEMS][1:] = np.nan
    assert spread_now(recipe, broken, histories, users) is None
