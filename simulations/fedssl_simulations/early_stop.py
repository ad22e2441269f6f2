"""Early stop: which round was the best so far, and when it is time to stop; read from the lines of metrics.jsonl alone.

So a run that was killed and resumed, whose lines are those of a run that was not, stops after the same round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Validations = list[tuple[int, float]]
"""Rounds in order, each with its NDCG@10 over unseen items."""


def validations(lines: Sequence[Mapping[str, Any]]) -> Validations:
    """The validations among the lines of metrics.jsonl."""
    return [(line["round"], line["validation"]["unseen"]["ndcg@10"]) for line in lines if "validation" in line]


def best_round(seen: Validations) -> int:
    """The round whose validation was the best, the earliest of equal ones; 0 before the first."""
    return max(seen, key=lambda pair: (pair[1], -pair[0]), default=(0, 0.0))[0]


def is_over(seen: Validations, patience: int) -> bool:
    """Whether the last ``patience`` validations were all no better than one before them. Never with a patience of 0."""
    best = best_round(seen)
    return patience > 0 and sum(round > best for round, _ in seen) >= patience
