"""Item vectors with a frozen part: an item's vector is its learned row, and a learned projection of what is known of the item.

The parts are the server's alone. Devices hold the sum of both, train its rows and send what they always send; the server gives every
row's mean update to the row, and through the features to the projection. So an item that nobody has met yet has a vector too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedssl import seeds
from fedssl.weights import ITEMS, Layout


def with_projection(weights_P: Tensor, features_IF: Tensor, layout: Layout) -> Tensor:
    """Weights in parts: the flat vector, behind it a projection that says nothing yet. Shape: (P + F * D,)."""
    return torch.cat([weights_P, torch.zeros(features_IF.shape[1] * _width(layout))])


def left_out_rows(features_IF: Tensor, share: float, *, seed: int, round: int) -> Tensor:
    """Which items are without their row in a round, of those that features are known of: about ``share`` of them, by keyed chance. Shape: (I + 1,).

    Items whose row is missing now and then teach the projection to speak for items that have none yet
    (DropoutNet: Volkovs et al. 2017, https://papers.nips.cc/paper/7081-dropoutnet-addressing-cold-start-in-recommender-systems).
    """
    drawn_I = seeds.uniform(np.array([seeds.key(seed, "rows left out", round)], dtype=np.uint64), len(features_IF))[0]
    return torch.from_numpy(drawn_I < share) & features_IF.any(1)


def folded(parts_Q: Tensor, features_IF: Tensor, layout: Layout, is_left_out_I: Tensor | None = None) -> Tensor:
    """The flat weights that devices and evaluations see: rows plus projected features. Shapes: (P + F * D,), (I + 1, F), (I + 1,) -> (P,).

    Row 0 of ``features_IF`` is zero, so that the padding stays what it is.
    """
    weights_P = parts_Q[: layout.num_weights].clone()
    items_ID = weights_P[layout.slice_of(ITEMS)].view(-1, _width(layout))
    if is_left_out_I is not None:
        items_ID[is_left_out_I] = 0.0
    items_ID.addmm_(features_IF, projection_of(parts_Q, layout))
    return weights_P


def slope_of_parts(update_P: Tensor, features_IF: Tensor, layout: Layout, is_left_out_I: Tensor | None = None) -> Tensor:
    """What a mean update of the flat weights says to the parts: the chain rule through `folded`. Shapes: (P,) -> (P + F * D,).

    Exactly the projection's own gradient where users take one local step; of several it is that of the move they made together.
    """
    items = layout.slice_of(ITEMS)
    slope_Q = torch.cat([update_P, (features_IF.T @ update_P[items].view(-1, _width(layout))).flatten()])
    if is_left_out_I is not None:
        slope_Q[items].view(-1, _width(layout))[is_left_out_I] = 0.0
    return slope_Q


def projection_of(parts_Q: Tensor, layout: Layout) -> Tensor:
    """The projection, a view. Shape: (F, D)."""
    return parts_Q[layout.num_weights :].view(-1, _width(layout))


def _width(layout: Layout) -> int:
    return layout.shapes[layout.names.index(ITEMS)][1]
