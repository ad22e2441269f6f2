"""An encoder taught by a released lift table: walks are drawn from the table, and the encoder learns what the table says after each step.

No history is read, so nothing is charged: whatever is made of a release is post-processing (Dwork and Roth 2014,
https://doi.org/10.1561/0400000042, proposition 2.1). The slopes are those of cross entropy against the table's whole distribution
(Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedssl import seeds
from fedssl.config import CountsConfig, DistillationConfig, ServerConfig
from fedssl.item_table import ItemTable
from fedssl.lift import LiftTable
from fedssl.local_training import UsersModel
from fedssl.parts import initial_weights, make_parts
from fedssl.recipe import Recipe
from fedssl.server_optimizers import adam, learning_rate
from fedssl.weights import ITEMS, Weights, flatten, unflatten


def distil(recipe: Recipe, table: LiftTable, *, on_step: Callable[[int, float], None] = lambda step, loss: None) -> Weights:
    """Weights of the recipe's encoder after `[distillation] steps` batches of walks. A function of the recipe and the table.

    ``on_step`` gets the step, from 1, and the loss beyond the table's own entropy: the Kullback-Leibler divergence, in nats.
    """
    config, counts = recipe.distillation, recipe.counts
    assert config is not None and counts is not None
    parts = make_parts(recipe)
    schedule = ServerConfig(rounds=config.steps, lr=config.lr, schedule="cosine", warmup=min(20, config.steps))
    optimizer = adam(schedule)
    weights = {**initial_weights(recipe), ITEMS: first_items(table, recipe.encoder.width, seed=recipe.seed)}
    flat_P = flatten(weights, parts.layout)
    memory = optimizer.init(len(flat_P))
    teacher = Teacher(table, counts)
    rng = torch.Generator().manual_seed(seeds.key(recipe.seed, "distillation"))
    for step in range(1, config.steps + 1):
        walks_NL, wanted_NLI = teacher.walk(config, rng)
        weights = {name: leaf.detach().clone().requires_grad_() for name, leaf in unflatten(flat_P, parts.layout).items()}
        looked_up = ItemTable(weights[ITEMS].detach()[None])
        shared = {name: leaf[None] for name, leaf in weights.items() if name != ITEMS}
        hidden_NLD = UsersModel(parts.encoder, shared, looked_up, None, None).encode(walks_NL[None])[0]
        said_NLI = torch.log_softmax(hidden_NLD @ weights[ITEMS][1:].T, -1)
        loss = -(wanted_NLI * said_NLI).sum(-1).mean()
        slopes = torch.autograd.grad(loss, [*weights.values(), looked_up.anchor], allow_unused=True)
        downhill = {name: torch.zeros_like(leaf) if slope is None else -slope for (name, leaf), slope in zip(weights.items(), slopes, strict=False)}
        downhill[ITEMS] -= looked_up.finish()[0]
        flat_P, memory = optimizer.step(flat_P, flatten(downhill, parts.layout), memory, learning_rate(schedule, step), step)
        entropy = torch.special.entr(wanted_NLI).sum(-1).mean()
        on_step(step, float(loss.detach() - entropy))
    return {name: leaf.detach() for name, leaf in unflatten(flat_P, parts.layout).items()}


def first_items(table: LiftTable, width: int, *, seed: int) -> Tensor:
    """Item vectors whose products are close to the lifts, the columns' side: a singular value decomposition weighted by popularity. Shape: (I + 1, D)."""
    rng = torch.Generator().manual_seed(seeds.key(seed, "first items"))
    weight_N = torch.from_numpy(np.exp(0.5 * table.log_popularity[table.rows])) * table.num_items**0.5
    rank = min(width, len(table.rows))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.key(seed, "first items"))
        _, values, right = torch.svd_lowrank(weight_N[:, None] * torch.from_numpy(table.lift) * weight_N, q=rank, niter=3)
    items = right * values.sqrt() / weight_N[:, None].clamp(min=0.3)
    items = items * (0.4 / items.square().sum(1).mean().sqrt().clamp(min=1e-6))
    result = torch.randn(table.num_items + 1, width, generator=rng) * 0.01
    result[torch.from_numpy(table.rows), :rank] += items
    result[0] = 0.0
    return result


class Teacher:
    """What the table says after each step of a walk, and walks that follow it."""

    def __init__(self, table: LiftTable, config: CountsConfig):
        # An item that was not counted says nothing: the last row.
        self._lift = torch.from_numpy(np.pad(table.lift, ((0, 1), (0, 0))))
        self._columns = torch.from_numpy(table.rows - 1)
        self._place_I = torch.full((table.num_items,), len(table.rows))
        self._place_I[self._columns] = torch.arange(len(table.rows))
        self._prior = torch.from_numpy(config.prior * table.log_popularity[1:])
        self._start = torch.from_numpy(np.exp(table.log_popularity[1:].astype(np.float64)))
        self._log_repeat = config.returns * float(table.log_repeat[0])
        self._config = config

    def walk(self, config: DistillationConfig, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Walks in catalogue rows, (N, L), and what the table says after each step, probabilities (N, L, I).

        The first item is drawn by popularity, each other by what the table says after those before it.
        """
        N, L, items = config.walks, config.length, len(self._start)
        walks = torch.zeros(N, L, dtype=torch.long)
        said = torch.empty(N, L, items)
        repeat = torch.zeros(N, items)
        here = torch.multinomial(self._start, N, replacement=True, generator=rng)
        for place in range(L):
            walks[:, place] = here
            repeat[torch.arange(N), here] = self._log_repeat
            lifts = torch.zeros(N, len(self._columns))
            for back in range(min(self._config.context, place + 1)):
                lifts.add_(self._lift[self._place_I[walks[:, place - back]]], alpha=self._config.context_decay**back)
            scores = self._prior + repeat
            scores[:, self._columns] += lifts
            said[:, place] = torch.softmax(scores, -1)
            here = torch.multinomial(said[:, place], 1, generator=rng)[:, 0]
        return walks + 1, said
