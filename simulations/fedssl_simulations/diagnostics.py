"""Does a task teach, and what? How encodings lie, and the contrastive gradient beside that of the next item, user by user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedssl.collapse import Spread, effective_rank, spread
from fedssl.config import TaskConfig
from fedssl.data.histories import Histories
from fedssl.local_training import make_batch, train_users
from fedssl.parts import make_parts, make_task
from fedssl.privacy.clipping import squared_norms
from fedssl.recipe import Recipe
from fedssl.recommender import Recommender
from fedssl.tasks.contrastive import FORM, NEGATIVES
from fedssl.weights import ITEMS, Weights

USERS = 512
USERS_AT_ONCE = 64


def spread_now(recipe: Recipe, weights: Weights, histories: Histories, users: np.ndarray[Any, Any]) -> Spread | None:
    """How the encodings of up to 512 of the users lie, each of what came before the validation target; None where fewer than two are finite."""
    places = histories.target_places("validation")
    users = users[places[users] >= 0][:USERS]
    encoded = encodings(recipe, weights, [histories.items[histories.cuts[user] : places[user]] for user in users])
    following = weights[ITEMS][torch.from_numpy(histories.items[places[users]].astype(np.int64))]
    is_finite = encoded.isfinite().all(1) & following.isfinite().all(1)
    return spread(encoded[is_finite], following[is_finite]) if is_finite.sum() > 1 else None


def contrast_facts(recipe: Recipe, weights: Weights, histories: Histories) -> dict[str, Any] | None:
    """Facts about the contrastive task of a recipe at these weights; None where the recipe names none.

    `nonzero_share`: users whose contrastive gradient is not 0. `gradient_ratio`: median over users of its norm over that of
    the next item's (the masked item's, where the encoder reads both ways), both at weight 1. `effective_rank`: of the encodings of full
    histories (`fedssl.collapse`), out of `width`.
    """
    contrast = next((task for task in recipe.task if task.name == "contrastive"), None)
    if contrast is None:
        return None
    count = min(USERS, histories.num_users)
    users = np.linspace(0, histories.num_users - 1, count).astype(np.int64)
    name = "next-item" if make_parts(recipe).encoder.is_causal else "masked-item"
    usual = next((task for task in recipe.task if task.name == name), TaskConfig(name=name))
    norms = {config.name: gradient_norms(recipe, weights, histories, users, config) for config in (contrast, usual)}
    can_learn = histories.training_lengths[users] >= 1
    ratio = norms[contrast.name] / np.maximum(norms[usual.name], 1e-12)
    has_both = norms[usual.name] > 0
    past = [histories.items[histories.cuts[user] : histories.training_ends[user]] for user in users]
    return {
        "form": FORM,
        "negatives": NEGATIVES,
        "weight": contrast.weight,
        "users": int(can_learn.sum()),
        "nonzero_share": float((norms[contrast.name][can_learn] > 0).mean()),
        "gradient_ratio": float(np.median(ratio[has_both])) if has_both.any() else None,
        "effective_rank": effective_rank(encodings(recipe, weights, past)),
        "width": recipe.encoder.width,
    }


def encodings(recipe: Recipe, weights: Weights, past: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    """The hidden state after each history, (n, D), a few at a time: an encoder holds the states of all positions."""
    model = Recommender(recipe, weights)
    return torch.cat([model.encode(past[first : first + USERS_AT_ONCE]) for first in range(0, max(len(past), 1), USERS_AT_ONCE)])


def gradient_norms(recipe: Recipe, weights: Weights, histories: Histories, users: np.ndarray[Any, Any], config: TaskConfig) -> np.ndarray[Any, Any]:
    """Norm of each user's gradient of one task at weight 1, without dropout. Shape: (U,)."""
    parts = make_parts(recipe)
    local = recipe.local.model_copy(update={"steps": 1, "lr": 1.0, "weight_decay": 0.0, "reduction": "mean"})
    tasks = [(make_task(config, num_items=recipe.num_items), 1.0)]
    norms = []
    for first in range(0, len(users), 32):
        some = users[first : first + 32]
        base = (recipe.seed, "diagnostics", 0)
        batch = make_batch(tasks, histories, some, some, base=base, local=local, window=recipe.encoder.window, num_items=recipe.num_items)
        trained = train_users(parts.encoder, tasks, weights, batch, local=local, window=recipe.encoder.window)
        total = sum((squared_norms(leaf.flatten(1)) for leaf in trained.update.values()), squared_norms(trained.items.flatten(1)))
        norms.append(total.sqrt().numpy())
    return np.concatenate(norms)
