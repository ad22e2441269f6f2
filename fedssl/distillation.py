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


def distil(recipe: Recipe, table: LiftTable, *, on_step: Callable[[int, float], None] | None = None) -> Weights:
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
        if on_step is not None:
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
    """What the table says after each step of a walk, as `fedssl.lift.LiftScorer` would, and walks that follow it."""

    def __init__(self, table: LiftTable, config: CountsConfig):
        # A place where nothing was counted yet says nothing: the last row.
        self._lift = torch.from_numpy(np.pad(table.lift, ((0, 1), (0, 0))))
        self._columns = torch.from_numpy(table.rows - 1)
        self._place_I = torch.full((table.num_items,), len(table.rows))
        self._place_I[self._columns] = torch.arange(len(table.rows))
        self._prior = torch.from_numpy(config.prior * table.log_popularity[1:])
        self._popularity = torch.from_numpy(np.exp(table.log_popularity[1:]))
        self._log_repeat = config.returns * float(table.log_repeat[0])
        self._config = config

    def walk(self, config: DistillationConfig, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Walks in catalogue rows, (N, L), and what the table says after each step, probabilities (N, L, I).

        The first item is drawn by popularity, each other by what the table says after those before it. Items that were not counted
        are passed over: the newest that were counted stay what they are.
        """
        N, L, items, uncounted = config.walks, config.length, len(self._prior), len(self._columns)
        walks = torch.zeros(N, L, dtype=torch.long)
        said = torch.empty(N, L, items)
        repeat = torch.zeros(N, items)
        newest_NK = torch.full((N, self._config.context), uncounted)
        here = draw(self._popularity.expand(N, items), rng)
        for step in range(L):
            walks[:, step] = here
            repeat[torch.arange(N), here] = self._log_repeat
            place_N1 = self._place_I[here][:, None]
            newest_NK = torch.where(place_N1 < uncounted, torch.cat([place_N1, newest_NK[:, :-1]], 1), newest_NK)
            lifts = torch.zeros(N, uncounted)
            for back in range(self._config.context):
                lifts.add_(self._lift[newest_NK[:, back]], alpha=self._config.context_decay**back)
            scores = self._prior + repeat
            scores[:, self._columns] += lifts
            said[:, step] = torch.softmax(scores, -1)
            here = draw(said[:, step], rng)
        return walks + 1, said


def draw(share_NI: Tensor, rng: torch.Generator) -> Tensor:
    """A place of each row, by its shares: one number a row, where `torch.multinomial` draws one a cell. Shape: (N,)."""
    summed_NI = share_NI.double().cumsum(-1)
    height_N1 = torch.rand(len(share_NI), 1, dtype=torch.float64, generator=rng) * summed_NI[:, -1:]
    return torch.searchsorted(summed_NI, height_N1, right=True)[:, 0].clamp(max=share_NI.shape[1] - 1)
