"""The protocol of ranking, slow and obvious: a loop over users and items."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


def slow_rank(scores: Sequence[float], target: int, left_out: Collection[int] = ()) -> float:
    """Rank of item ``target``; ``scores[0]`` is padding, ``left_out`` are items that may not be recommended."""

    def worth(item: int) -> tuple[int, float]:
        return (0, 0.0) if math.isnan(scores[item]) else (1, scores[item])

    rank = 1.0
    for item in range(1, len(scores)):
        if item == target or item in left_out:
            continue
        if math.isnan(scores[target]) or worth(item) > worth(target):
            rank += 1
        elif worth(item) == worth(target):
            rank += 0.5
    return rank


def slow_ndcg(ranks: Sequence[float], k: int) -> float:
    return sum(1 / math.log2(1 + rank) for rank in ranks if rank <= k) / len(ranks)
