"""A trained model as a recommender: histories in, scores of all items out, the encoder's and the counts' together.

The same function ranks for an evaluation, recommends to a person, and checks what a device says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.counts import Counts, CountsScorer
from fedssl.heads.history import history_vectors
from fedssl.item_table import ItemTable
from fedssl.lift import LiftScorer, LiftTable
from fedssl.local_training import UsersModel
from fedssl.parts import make_parts
from fedssl.recipe import Recipe
from fedssl.weights import ITEMS, Weights

Heads = Callable[[NDArray[np.int64]], NDArray[np.float32]]
Scores = dict[str, Tensor]


class Recommender:
    """Scores (n, I + 1) of all items after histories (oldest first), and those of each part.

    The first name is the whole recommender. With counts it is ``encoder + strength * counts``, parts are "encoder" and
    "counts"; or the counts alone, where nothing taught the encoder. ``heads`` gives the vectors of users, (n, D), where the
    node at hand has them. Column 0 means nothing.
    """

    def __init__(self, recipe: Recipe, weights: Weights, counts: Counts | LiftTable | None = None, *, heads: Heads | None = None):
        self._recipe, self._weights, self._heads = recipe, weights, heads
        self._encoder = make_parts(recipe).plain_encoder
        self._counts: CountsScorer | LiftScorer | None = None
        if counts is not None and recipe.counts is not None:
            self._counts = LiftScorer(counts, recipe.counts) if isinstance(counts, LiftTable) else CountsScorer(counts, recipe.counts)

    def __call__(self, histories: Sequence[NDArray[np.integer[Any]]], users: NDArray[np.int64]) -> Scores:
        """Scores by name. ``users``: their numbers (n,), read by heads alone."""
        if self._counts is not None and not self._recipe.server.rounds and self._recipe.distillation is None:
            return {"score": torch.from_numpy(self._counts(histories))}
        encoded = self.encoder_scores(histories, users)
        if self._counts is None:
            return {"score": encoded}
        counted = torch.from_numpy(self._counts(histories))
        assert self._recipe.counts is not None
        return {"score": encoded + self._recipe.counts.strength * counted, "encoder": encoded, "counts": counted}

    @torch.no_grad()
    def encoder_scores(self, histories: Sequence[NDArray[np.integer[Any]]], users: NDArray[np.int64]) -> Tensor:
        """Scores of the encoder alone, with the heads where there are any. Shape: (n, I + 1)."""
        hidden_ND = self.encode(histories)
        if self._heads is not None:
            hidden_ND = hidden_ND + torch.from_numpy(self._heads(users))
        if self._recipe.head.history:
            hidden_ND = hidden_ND + self._recipe.head.history * history_vectors(histories, self._weights[ITEMS])
        return hidden_ND @ self._weights[ITEMS].T

    @torch.no_grad()
    def encode(self, histories: Sequence[NDArray[np.integer[Any]]]) -> Tensor:
        """The hidden state after each history, (n, D), without heads; zero after an empty one."""
        window = self._recipe.encoder.window
        widest = max(min(max((len(rows) for rows in histories), default=0), window), 1)
        rows_NL = np.zeros((len(histories), widest), dtype=np.int64)
        for place, rows in enumerate(histories):
            newest = rows[-widest:]
            rows_NL[place, widest - len(newest) :] = newest
        shared = {name: leaf[None] for name, leaf in self._weights.items() if name != ITEMS}
        model = UsersModel(self._encoder, shared, ItemTable(self._weights[ITEMS][None]), None, None)
        hidden_ND = model.after(torch.from_numpy(rows_NL)[None])[0]
        is_empty = torch.from_numpy(rows_NL[:, -1] == 0)
        return torch.where(is_empty[:, None], 0.0, hidden_ND)
