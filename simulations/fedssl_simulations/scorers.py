"""Reference recommenders that only count, made from training events: what any learned recommender has to beat.

Each function reads the training parts once and returns a scorer for `fedssl.evaluation.evaluate`. They pool everybody's
histories in one place, so they are yardsticks, not federated methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.data.histories import Histories
from fedssl.evaluation import Scorer, training_counts

# Popularity in [0, 0.5): orders items that nothing else tells apart, and never outweighs one counted transition.
_BACKOFF = 0.5


def popularity(histories: Histories, num_items: int) -> Scorer:
    """Every user gets the items with the most training events."""
    events_I = torch.from_numpy(training_counts(histories, num_items).astype(np.float32))

    def scorer(past: Sequence[NDArray[np.int32]], users: NDArray[np.int64]) -> Tensor:
        return events_I.expand(len(past), -1)

    return scorer


def markov(histories: Histories, num_items: int, *, context: int = 3, decay: float = 0.5) -> Scorer:
    """What followed the last items: transitions from one event to the next, read from the ``context`` newest events.

    The j-th newest event weighs decay^(j-1); context 1 is the plain first-order Markov chain. Popularity, scaled below half
    a transition, orders what no transition reaches; a user without history gets popularity.
    """
    owner, item = _training_events(histories)
    follows = owner[1:] == owner[:-1]
    transitions = _counted(item[:-1][follows], item[1:][follows], (num_items + 1, num_items + 1))
    backoff_I = _backoff(histories, num_items)

    def scorer(past: Sequence[NDArray[np.int32]], users: NDArray[np.int64]) -> Tensor:
        newest = [row[-context:][::-1] for row in past]
        weights = np.concatenate([decay ** np.arange(len(row), dtype=np.float32) for row in newest])
        read = _counted(np.repeat(np.arange(len(past)), [len(row) for row in newest]), np.concatenate(newest), (len(past), num_items + 1), weights)
        return torch.from_numpy((read @ transitions).toarray() + backoff_I)

    return scorer


def co_occurrence(histories: Histories, num_items: int) -> Scorer:
    """Items met by the same people, in whatever order: cosine between items' sets of users, summed over the user's distinct items.

    What it reaches shows how much of a result came from taste alone, without order. Source: Sarwar et al. 2001,
    https://doi.org/10.1145/371920.372071 (item-based neighbours), here without a cut of the neighbourhood.
    """
    owner, item = _training_events(histories)
    met = _counted(owner, item, (histories.num_users, num_items + 1))
    met.data[:] = 1.0
    users_of_I = np.asarray(met.sum(0)).ravel()
    by_item = met @ sp.diags(1.0 / np.sqrt(np.maximum(users_of_I, 1.0)))
    cosine = (by_item.T @ by_item).tocsr().astype(np.float32)
    cosine.setdiag(0.0)
    # On a small, dense catalogue (MovieLens) a dense table is several times faster than a sparse product.
    table: Any = cosine.toarray() if cosine.nnz > 0.1 * (num_items + 1) ** 2 else cosine
    backoff_I = _backoff(histories, num_items) * 1e-6

    def scorer(past: Sequence[NDArray[np.int32]], users: NDArray[np.int64]) -> Tensor:
        read = _counted(np.repeat(np.arange(len(past)), [len(row) for row in past]), np.concatenate(past), (len(past), num_items + 1))
        read.data[:] = 1.0
        scores = read @ table
        return torch.from_numpy((scores.toarray() if sp.issparse(scores) else scores) + backoff_I)

    return scorer


def _training_events(histories: Histories) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """User and item of every training event, users together and in order of time. Shapes: two (events,)."""
    owner = np.repeat(np.arange(histories.num_users), histories.lengths)
    is_training = np.arange(histories.num_events) < histories.training_ends[owner]
    return owner[is_training], histories.items[is_training]


def _counted(rows: NDArray[Any], columns: NDArray[Any], shape: tuple[int, int], weights: NDArray[np.float32] | None = None) -> Any:
    """A sparse float32 matrix that sums ``weights`` (1 each where None) by cell."""
    data = np.ones(len(rows), dtype=np.float32) if weights is None else weights
    return sp.csr_matrix((data, (rows, columns)), shape=shape)


def _backoff(histories: Histories, num_items: int) -> NDArray[np.float32]:
    events_I = training_counts(histories, num_items).astype(np.float32)
    return events_I * np.float32(_BACKOFF / (events_I.max() + 1))
