"""Slow, obvious scorers of invented histories: popularity, order-blind co-occurrence, transitions, and one that knows the process.

Each returns scores (users, items) of what comes after the given histories; items are codes from 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedssl.data.synthetic import World

Scores = NDArray[np.float64]


def popularity(histories: list[NDArray[np.int64]], num_items: int) -> Scores:
    counts = np.bincount(np.concatenate(histories), minlength=num_items).astype(np.float64)
    return np.tile(counts, (len(histories), 1))


def co_occurrence(histories: list[NDArray[np.int64]], num_items: int) -> Scores:
    """Cosine of who met what, summed over the history: any order gives the same scores."""
    met = np.zeros((len(histories), num_items))
    for user, items in enumerate(histories):
        met[user, items] = 1.0
    both = met.T @ met
    np.fill_diagonal(both, 0.0)
    size = np.sqrt(np.maximum(met.sum(0), 1.0))
    return met @ (both / size[:, None] / size[None, :])


def transitions(histories: list[NDArray[np.int64]], num_items: int, *, lags: int = 1, decay: float = 0.5) -> Scores:
    """log(1 + 10 counts) of pairs up to ``lags`` apart, read for as many of the newest events, both fading by ``decay``."""
    counts = np.zeros((num_items, num_items))
    for items in histories:
        for lag in range(1, min(lags, len(items) - 1) + 1):
            np.add.at(counts, (items[:-lag], items[lag:]), decay ** (lag - 1))
    table = np.log1p(10 * counts)
    scores = np.stack([sum((decay**back * table[items[-1 - back]] for back in range(min(lags, len(items)))), np.zeros(num_items)) for items in histories])
    return scores + 1e-9 * popularity(histories, num_items)


def knowing(histories: list[NDArray[np.int64]], world: World) -> Scores:
    """The chance of each item under the process itself: a forward filter over the topic a user is into, and the habits.

    That a met item is not met again is left to the ranking, which masks it.
    """
    topics, kinds = len(world.topic_shares_F), len(world.kind_shares_K)
    habits = np.zeros((kinds, kinds))
    for kind in range(kinds):
        habits[kind, world.successors_KN[kind]] = world.successor_shares_N
    all_items = np.arange(world.num_items)
    scores = np.zeros((len(histories), world.num_items))
    for user, items in enumerate(histories):
        belief = world.topic_shares_F
        for item in items:
            belief = (1 - world.drift) * belief + world.drift * world.topic_shares_F
            seen = item % topics
            belief = belief * ((1 - world.focus) * world.topic_shares_F[seen] + world.focus * (np.arange(topics) == seen))
            belief = belief / belief.sum()
        belief = (1 - world.drift) * belief + world.drift * world.topic_shares_F
        topic = world.focus * belief + (1 - world.focus) * world.topic_shares_F
        last, before = items[-1] // topics, items[max(-2, -len(items))] // topics
        habit = (1 - world.look_back) * habits[last] + world.look_back * habits[before]
        kind = world.habit * habit + (1 - world.habit) * world.kind_shares_K
        scores[user] = kind[all_items // topics] * topic[all_items % topics]
    return scores


def ndcg_at_10(scores: Scores, histories: list[NDArray[np.int64]], targets: NDArray[np.int64], *, mask: bool) -> float:
    """Mean NDCG@10 over the whole catalogue; ``mask`` leaves out what a user has met. Ties take half of their places."""
    total = 0.0
    for row, items, target in zip(scores, histories, targets, strict=True):
        row = row.copy()
        if mask:
            met = items[items != target]
            row[met] = -np.inf
        rank = 1 + (row > row[target]).sum() + 0.5 * ((row == row[target]).sum() - 1)
        total += 1 / np.log2(1 + rank) if rank <= 10 else 0.0
    return total / len(targets)
