"""Numbers as a table's cells have them: NDCG@10, and the least and the most of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def mean_pair(found: list[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    return " / ".join(f"{sum(one[which]['ndcg@10'] for one in found) / len(found):.4f}" for which in ("all", "unseen"))


def spread(found: list[Mapping[str, float]]) -> str:
    values = [one["ndcg@10"] for one in found]
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"
