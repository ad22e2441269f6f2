"""What comes next after a history of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedssl.checkpoints import Checkpoint
from fedssl.recommender import Recommender


def recommend(checkpoint: Checkpoint, tokens: Sequence[str], *, k: int = 10, include_seen: bool = False) -> list[dict[str, Any]]:
    """The ``k`` best items after ``tokens`` (oldest first): item, title and score each, best first.

    Items of the history are left out unless asked for. Raises CatalogueMismatch for a token that the catalogue does not list.
    """
    catalogue = checkpoint.catalogue
    rows = np.array([catalogue.row(token) for token in tokens], dtype=np.int64)
    model = Recommender(checkpoint.recipe, checkpoint.state.released(checkpoint.recipe), checkpoint.state.counts)
    scores = next(iter(model([rows], np.zeros(1, dtype=np.int64)).values()))[0].clone()
    scores[0] = -torch.inf
    if not include_seen:
        scores[torch.from_numpy(rows)] = -torch.inf
    best = torch.topk(scores, min(k, catalogue.num_items))
    return [
        {"item": catalogue.tokens[row - 1], "title": catalogue.title(row), "score": score}
        for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if score > -torch.inf
    ]
