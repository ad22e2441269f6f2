"""Central training follows the recipe's late rounds too."""

from __future__ import annotations

from typing import Any

import torch
from fedssl_simulations.central import train_centrally
from small import recipe_of, small_config, small_dataset

from fedssl.parts import make_parts
from fedssl.weights import flatten


def trained(**server: Any) -> torch.Tensor:
    recipe = recipe_of(small_config({"server": {"schedule": "constant", **server}}), small_dataset())
    return flatten(train_centrally(recipe, small_dataset().histories)[0], make_parts(recipe).layout)


def test_where_the_recipe_averages_late_rounds_central_training_averages_late_batches():
    second, third, mean = trained(rounds=2), trained(rounds=3), trained(rounds=3, average_from=2)
    assert not torch.equal(second, third)
    torch.testing.assert_close(mean, (second + third) / 2)
