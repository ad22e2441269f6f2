"""Training without federation: centrally, with the recipe's late rounds, and each user alone."""

from __future__ import annotations

from typing import Any

import torch
from fedssl_simulations.central import each_alone, train_centrally
from small import recipe_of, small_config, small_dataset, train

from fedssl.parts import initial_weights, make_parts
from fedssl.weights import ITEMS, flatten


def trained(**server: Any) -> torch.Tensor:
    recipe = recipe_of(small_config({"server": {"schedule": "constant", **server}}), small_dataset())
    return flatten(train_centrally(recipe, small_dataset().histories)[0], make_parts(recipe).layout)


def test_where_the_recipe_averages_late_rounds_central_training_averages_late_batches():
    second, third, mean = trained(rounds=2), trained(rounds=3), trained(rounds=3, average_from=2)
    assert not torch.equal(second, third)
    torch.testing.assert_close(mean, (second + third) / 2)


def test_item_vectors_begin_where_those_of_the_federation_begin():
    config = small_config({"encoder": {"first_items": "counts"}, "counts": {"scale": 1.0, "top": 9}, "server": {"rounds": 1, "lr": 1e-30}})
    recipe, dataset = recipe_of(config, small_dataset()), small_dataset()
    central, _ = train_centrally(recipe, dataset.histories)
    federated, _ = train(config, dataset)
    assert torch.equal(central[ITEMS], federated.weights(recipe)[ITEMS])
    assert not torch.equal(central[ITEMS], initial_weights(recipe)[ITEMS])


def test_who_trains_alone_is_pulled_to_nobody():
    found = []
    for proximal in (0.0, 0.5):
        recipe = recipe_of(small_config({"local": {"steps": 3, "proximal": proximal}}), small_dataset())
        ranks, _ = each_alone(recipe, small_dataset().histories, users=4, steps=3)
        found.append(ranks["validation"].all["score"].tolist())
    assert found[0] == found[1]
