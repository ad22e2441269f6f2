"""What a federated run must be compared with: same data, same protocol, same table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.config import CountsConfig, RunConfig
from fedssl.counts import CountsScorer
from fedssl.data.dataset import Dataset
from fedssl.data.histories import Histories
from fedssl.evaluation import Scorer, evaluate
from fedssl.recipe import make_recipe
from fedssl.recommender import Recommender
from fedssl.workers import Workers
from fedssl_simulations.central import count_all, each_alone, train_centrally
from fedssl_simulations.scorers import co_occurrence, markov, popularity

LOG_LIFT = CountsConfig(lags=6, decay=0.8, context=6, context_decay=0.6, form="log-lift", scale=0.5, clip_norm=1.0)
"""The strongest recommender that only counts, of those tried; users of norm 1."""

NAMES = ("popularity", "markov", "co-occurrence", "log-lift counts", "each alone", "central")


def run_baselines(
    config: RunConfig, dataset: Dataset, *, names: tuple[str, ...] = NAMES, on_done: Callable[[str, dict[str, Any]], None] = lambda name, row: None
) -> dict[str, dict[str, Any]]:
    """The named baselines, each with `test`, `validation` and `seconds` as in report.json. Seen by nothing but training events."""
    rows: dict[str, dict[str, Any]] = {}
    for name, make in _makers(config, dataset):
        if name in names:
            began = time.perf_counter()
            rows[name] = make()
            rows[name].setdefault("seconds", time.perf_counter() - began)
            on_done(name, rows[name])
    return rows


def _makers(config: RunConfig, dataset: Dataset) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    histories, num_items = dataset.histories, dataset.catalogue.num_items
    recipe = make_recipe(config, num_items=num_items, catalogue=dataset.catalogue.hash)
    ks = config.evaluation.ks

    def measured(scorer: Scorer) -> dict[str, Any]:
        return {split: evaluate(scorer, histories, split, ks=ks).summary() for split in ("validation", "test")}

    def alone() -> dict[str, Any]:
        ranks, about = each_alone(recipe, histories, ks=ks)
        return {**{split: found.summary() for split, found in ranks.items()}, "about": about}

    def central() -> dict[str, Any]:
        torch.set_num_threads(Workers(config.system.workers).number)
        weights, seconds = train_centrally(recipe, histories)
        torch.set_num_threads(1)
        return {**measured(Recommender(recipe, weights)), "seconds": seconds}

    yield "popularity", lambda: measured(popularity(histories, num_items))
    yield "markov", lambda: measured(markov(histories, num_items))
    yield "co-occurrence", lambda: measured(co_occurrence(histories, num_items))
    yield "log-lift counts", lambda: measured(counts_alone(histories, num_items, LOG_LIFT))
    yield "each alone", alone
    yield "central", central


def counts_alone(histories: Histories, num_items: int, config: CountsConfig) -> Scorer:
    """A recommender that only counts: everybody's transitions, summed without noise."""
    scorer = CountsScorer(count_all(histories, config, num_items=num_items), config)

    def score(past: Sequence[NDArray[np.int32]], users: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(scorer(past))

    return score
