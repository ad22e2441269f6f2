"""The same encoder trained without federation: centrally on everybody's windows, and by each user alone.

Both use the code of the users axis: central training is one user who owns all windows of a batch, and a user alone is one
who takes many local steps and never meets anybody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.config import CountsConfig
from fedssl.counts import Counts, from_cells, keep_top, sum_transitions
from fedssl.data.histories import Histories
from fedssl.evaluation import Ranks, evaluate
from fedssl.local_training import Batch, make_batch, train_users
from fedssl.parts import initial_weights, make_parts
from fedssl.privacy.keys import cohort_of_pass
from fedssl.privacy.manifest import declared_sums
from fedssl.recipe import Recipe
from fedssl.recommender import Recommender
from fedssl.server_optimizers import average_late, learning_rate
from fedssl.spectral import spectral_items
from fedssl.weights import ITEMS, Weights, flatten, unflatten


def train_centrally(recipe: Recipe, histories: Histories, *, on_step: Callable[[int, float], None] = lambda step, loss: None) -> tuple[Weights, float]:
    """Weights after as many batches as the recipe has rounds, and the seconds that took.

    A batch holds one window of each of ``cohort`` users, every user once a pass; the loss is the mean over all positions of
    the batch; then one step of the recipe's optimiser. This is what central training of such a model is: no user is clipped,
    rounded or weighed. Late weights are averaged where the recipe averages late rounds, and item vectors begin as the recipe's do.
    """
    parts = make_parts(recipe)
    local = recipe.local.model_copy(update={"steps": 1, "lr": 1.0, "weight_decay": 0.0, "reduction": "mean"})
    weights = initial_weights(recipe)
    if recipe.encoder.first_items == "counts":
        assert recipe.counts is not None
        step = declared_sums(recipe, "counts", num_weights=0)["counts"].step
        counts = count_all(histories, recipe.counts, num_items=recipe.num_items, step=step)
        weights[ITEMS] = spectral_items(counts, weights[ITEMS], seed=recipe.seed)
    flat_P = flatten(weights, parts.layout)
    average_P: Tensor | None = None
    memory = parts.optimizer.init(parts.layout.num_weights)
    users_a_batch = max(1, min(round(recipe.server.cohort), histories.num_users))
    began = time.perf_counter()
    for step in range(1, recipe.server.rounds + 1):
        users = cohort_of_pass(recipe.seed, users_a_batch, histories.num_users, step)
        base = (recipe.seed, "central", step)
        batch = make_batch(parts.tasks, histories, users, users, base=base, local=local, window=recipe.encoder.window, num_items=recipe.num_items)
        trained = train_users(
            parts.encoder,
            parts.tasks,
            unflatten(flat_P, parts.layout),
            _as_one_user(batch),
            local=local,
            window=recipe.encoder.window,
            dropout=recipe.encoder.dropout,
            seed=recipe.seed,
        )
        # One user, and the whole catalogue as its rows: `_as_one_user`.
        assert trained.rows_UK is None
        assert trained.items.shape[:2] == (1, recipe.num_items + 1)
        update = {**{name: leaf[0] for name, leaf in trained.update.items()}, ITEMS: trained.items[0]}
        flat_P, memory = parts.optimizer.step(flat_P, flatten(update, parts.layout), memory, learning_rate(recipe.server, step), step)
        average_P = average_late(recipe.server, average_P, flat_P, step)
        on_step(step, float(trained.loss_U[0]))
    return unflatten(flat_P if average_P is None else average_P, parts.layout), time.perf_counter() - began


def _as_one_user(batch: Batch) -> Batch:
    """The windows of U users as those of one; drawn candidates become those of all, which needs rows of the catalogue."""
    sequences = []
    for named in batch.sequences:
        whole = {}
        for name, rows_USBL in named.items():
            U, S, B, L = rows_USBL.shape
            rows = rows_USBL
            if batch.rows_UK is not None:
                rows = batch.rows_UK.gather(1, rows.reshape(U, -1)).view(U, S, B, L)
            whole[name] = rows.transpose(0, 1).reshape(1, S, U * B, L)
        sequences.append(whole)
    return replace(
        batch,
        users_U=batch.users_U[:1],
        sequences=tuple(sequences),
        rows_UK=None,
        bias_UN=None,
        positions_U=batch.positions_U.sum(keepdims=True),
    )


def count_all(histories: Histories, config: CountsConfig, *, num_items: int, step: float = 2.0**-24) -> Counts:
    """Everybody's transitions, summed without noise."""
    sparse, _ = sum_transitions(histories, np.arange(histories.num_users), config, num_items=num_items, step=step)
    return keep_top(from_cells(sparse.rows, sparse.columns, sparse.values * step, num_items=num_items), config.top)


def each_alone(
    recipe: Recipe, histories: Histories, *, users: int = 128, steps: int = 10, lrs: tuple[float, ...] = (1.0, 3.0, 10.0), ks: tuple[int, ...] = (5, 10)
) -> tuple[dict[str, Ranks], dict[str, Any]]:
    """Every user trains the initial weights on their own history alone; ranks of validation and test, and what was chosen.

    A fixed sample of ``users`` people who have a target (all where there are fewer), ``steps`` local steps each, softmax over the
    whole catalogue; the step size is chosen on validation.
    """
    parts = make_parts(recipe)

    def sample(split: Literal["validation", "test"]) -> NDArray[np.int64]:
        tested = np.flatnonzero(histories.target_places(split) >= 0)
        return tested[np.unique(np.linspace(0, len(tested) - 1, min(users, len(tested))).astype(np.int64))]

    weights = initial_weights(recipe)
    best: tuple[float, dict[str, Ranks], float] | None = None
    for lr in lrs:
        local = recipe.local.model_copy(update={"steps": steps, "lr": lr, "windows": 1, "proximal": 0.0})

        def alone(past: Sequence[NDArray[np.int32]], mine: NDArray[np.int64], local: Any = local) -> Tensor:
            scores = []
            for first in range(0, len(mine), 8):
                some = slice(first, first + 8)
                base = (recipe.seed, "alone", 0)
                batch = make_batch(
                    parts.tasks, histories, mine[some], mine[some], base=base, local=local, window=recipe.encoder.window, num_items=recipe.num_items
                )
                with torch.enable_grad():
                    trained = train_users(parts.encoder, parts.tasks, weights, batch, local=local, window=recipe.encoder.window)
                for place, history in enumerate(past[some]):
                    own = {name: weights[name] + leaf[place] for name, leaf in trained.update.items()}
                    table = weights[ITEMS].clone()
                    if trained.rows_UK is None:
                        table += trained.items[place]
                    else:
                        table.index_add_(0, trained.rows_UK[place], trained.items[place])
                    scores.append(Recommender(recipe, {**own, ITEMS: table}).encoder_scores([history], mine[some][place : place + 1]))
            return torch.cat(scores)

        validation = evaluate(alone, histories, "validation", users=sample("validation"), ks=ks)
        quality = validation.summary()["unseen"]["ndcg@10"]
        if best is None or quality > best[0]:
            best = (quality, {"validation": validation, "test": evaluate(alone, histories, "test", users=sample("test"), ks=ks)}, lr)
    assert best is not None
    return best[1], {"users": len(best[1]["test"].users), "steps": steps, "lr": best[2]}
