"""What recommended lists are made of, slow and obvious: loops over users, places and pairs of items."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence


def slow_best(scores: Sequence[float], k: int, left_out: Collection[int] = ()) -> list[int]:
    """The best k items in order; ``scores[0]`` is padding. No scores may be equal."""
    items = [item for item in range(1, len(scores)) if item not in left_out and not math.isnan(scores[item]) and scores[item] > -math.inf]
    best = sorted(items, key=lambda item: -scores[item])[:k]
    return best + [0] * (k - len(best))


def slow_gini(amounts: Sequence[int]) -> float:
    total = sum(amounts)
    return sum(abs(one - other) for one in amounts for other in amounts) / (2 * len(amounts) * total) if total else 0.0


def slow_of_lists(lists: Sequence[Sequence[int]], popularity: Sequence[int], own: Sequence[float]) -> dict[str, float | None]:
    """``popularity[0]`` is padding."""
    items = range(1, len(popularity))
    times = {item: sum(row.count(item) for row in map(list, lists)) for item in items}
    events = sum(popularity[item] + 1 for item in items)
    bits = [-math.log2((popularity[item] + 1) / events) for row in lists for item in row if item]
    theirs, mine = [], []
    for row, value in zip(lists, own, strict=True):
        real = [popularity[item] for item in row if item]
        if real:
            theirs.append(sum(real) / len(real))
            mine.append(value)
    return {
        "coverage": sum(times[item] > 0 for item in items) / len(items),
        "gini": slow_gini([times[item] for item in items]),
        "novelty": sum(bits) / len(bits) if bits else 0.0,
        "popularity_lift": (sum(theirs) / len(theirs)) / (sum(mine) / len(mine)) - 1 if sum(mine) else None,
    }


def slow_interval(values: Sequence[float], draws: int) -> tuple[float, float]:
    """Users drawn one by one, with replacement."""
    chance = random.Random(1)
    means = sorted(sum(chance.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]
