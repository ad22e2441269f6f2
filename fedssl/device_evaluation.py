"""Evaluation where the events are: how a model ranks what each user met last, as sums of hits, gains and users. The events stay.

The ranks are those of `fedssl.evaluation`, of the same recommender, against the whole catalogue. A sum over one user is that user's rank in all but
name, so nothing of this leaves under a privacy plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedssl.counts import Counts
from fedssl.data.histories import Histories
from fedssl.errors import WireError
from fedssl.evaluation import Scorer, evaluate, gains
from fedssl.parts import make_parts
from fedssl.privacy.manifest import GAIN_STEP
from fedssl.recipe import Recipe
from fedssl.recommender import Heads, Recommender
from fedssl.weights import Weights, from_numpy, to_numpy

_COUNTS = ("starts", "columns", "values")
COLUMNS = ("all", "unseen")
"""The rows of the sums: any item may be recommended, and those alone that the user has not met."""


def model_tensors(weights: Weights, counts: Counts | None) -> dict[str, NDArray[Any]]:
    """A model as it goes down to be evaluated: its weights by name, and ``counts/...`` where it has counts."""
    more = {} if counts is None else {f"counts/{name}": getattr(counts, name) for name in _COUNTS}
    return to_numpy(weights) | more


def model_of(recipe: Recipe, tensors: Mapping[str, NDArray[Any]], heads: Heads | None) -> Recommender:
    """The recommender in a Download. Raises WireError where its tensors are not those of the recipe."""
    layout = make_parts(recipe).layout
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    counts = None
    if recipe.counts is not None:
        found = [tensors.get(f"counts/{name}") for name in _COUNTS]
        starts, columns, values = found
        if starts is None or columns is None or values is None or starts.shape != (recipe.num_items + 2,) or columns.shape != values.shape:
            raise WireError("an evaluation whose Download has no counts, or not those of its recipe; is the server of another version?")
        counts = Counts(starts, columns, values)
    if {name: tensors[name].shape for name in shapes if name in tensors} != shapes or len(tensors) != len(shapes) + 3 * (counts is not None):
        raise WireError("an evaluation whose Download has other weights than its recipe; is the server of another version?")
    return Recommender(recipe, from_numpy({name: tensors[name] for name in shapes}), counts, heads=heads)


def sums_of_ranks(model: Scorer, histories: Histories, places: NDArray[np.int64], ks: tuple[int, ...]) -> dict[str, NDArray[np.int64]]:
    """How the last event of the users at ``places`` is ranked: "hits" and "gains", (2, K) in the order of `COLUMNS` and ``ks``, and "tested", (1,).

    Gains are those of NDCG, each rounded to the nearest step. Users without a test target are in none of them.
    """
    tested = places[histories.target_places("test")[places] >= 0]
    if not len(tested):
        return {"hits": np.zeros((2, len(ks)), np.int64), "gains": np.zeros((2, len(ks)), np.int64), "tested": np.zeros(1, np.int64)}
    found = evaluate(model, histories, "test", users=tested, ks=ks)
    ranks = [next(iter(getattr(found, column).values())) for column in COLUMNS]
    return {
        "hits": np.array([[(ranks_n <= k).sum() for k in ks] for ranks_n in ranks], dtype=np.int64),
        "gains": np.array([[np.rint(gains(ranks_n, k) / GAIN_STEP).sum() for k in ks] for ranks_n in ranks], dtype=np.int64),
        "tested": np.array([len(tested)], dtype=np.int64),
    }


def metrics_of(totals: Mapping[str, Any], ks: tuple[int, ...]) -> dict[str, Any]:
    """The means over all who were tested: `users`, and for each of `COLUMNS` `hr@k` and `ndcg@k`; of nobody the number alone."""
    users = int(totals["tested"][0]) if totals else 0
    if not users:
        return {"users": 0}
    means: dict[str, Any] = {"users": users}
    for row, column in enumerate(COLUMNS):
        means[column] = {}
        for place, k in enumerate(ks):
            means[column][f"hr@{k}"] = int(totals["hits"][row, place]) / users
            means[column][f"ndcg@{k}"] = int(totals["gains"][row, place]) * GAIN_STEP / users
    return means
