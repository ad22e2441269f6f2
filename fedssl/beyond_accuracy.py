"""Beyond accuracy: which items the recommended lists are made of, beside what people took by themselves.

A list holds k items, best first. How popular an item is, is how often it stands in training histories.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]


def best_items(scores_UI: Tensor, k: int, seen: tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]) -> tuple[Rows, Rows]:
    """The k items of each user that score highest: among all, and among those the user has not met.

    Shapes: scores (U, I+1), column 0 is no item; ``seen`` two arrays (pairs,), the user's index and the item's row -> two (U, k), filled
    up with 0 where fewer items can be recommended. An item that scores NaN or -inf is not; equal scores stand in any order.
    """
    open_UI = torch.where(scores_UI.isnan(), -torch.inf, scores_UI)
    open_UI[:, 0] = -torch.inf
    of_all = _best(open_UI, k)
    owner, item = (torch.from_numpy(np.asarray(side, dtype=np.int64)).to(scores_UI.device) for side in seen)
    open_UI[owner, item] = -torch.inf
    return of_all, _best(open_UI, k)


def _best(scores_UI: Tensor, k: int) -> Rows:
    found = scores_UI.topk(min(k, scores_UI.shape[1] - 1), dim=1)
    lists = np.zeros((len(scores_UI), k), dtype=np.int64)
    lists[:, : found.indices.shape[1]] = torch.where(found.values > -torch.inf, found.indices, 0).cpu().numpy()
    return lists


def of_lists(lists_NK: Rows, popularity_I: NDArray[np.int64], own_N: Floats) -> dict[str, Any]:
    """What is in N lists (0: an empty place) over a catalogue of I items.

    ``popularity_I``: (I+1,) training events of each item, the padding's aside. ``own_N``: mean popularity of the items in each user's own history.

      - `coverage`: share of the catalogue that stands in a list.
      - `gini`: of how often each of the I items is recommended; 0: all alike, near 1: a few items take all places
        (Fleder and Hosanagar 2009, https://doi.org/10.1287/mnsc.1080.0974, for recommendations).
      - `novelty`: mean over all places of -log2 of the item's share of training events, bits; every item counts one event
        more than it has, so that new ones are finite (self-information: Zhou et al. 2010, https://doi.org/10.1073/pnas.1000488107).
      - `popularity_lift`: by how much items of a list are more popular than those of the user's own history, as a share: the mean over users of a
        list's mean popularity, over the mean of ``own_N``, less 1 (Abdollahpouri et al. 2019, https://arxiv.org/abs/1907.13286). 0: as popular. None where
        own items have no training event at all.
    """
    is_item_NK = lists_NK > 0
    times_I = np.bincount(lists_NK[is_item_NK], minlength=len(popularity_I))[1:]
    share_I = (popularity_I[1:] + 1) / (popularity_I[1:] + 1).sum()
    has_items_N = is_item_NK.any(1)
    mean_N = (popularity_I[lists_NK] * is_item_NK).sum(1)[has_items_N] / is_item_NK.sum(1)[has_items_N]
    own = float(own_N[has_items_N].mean()) if has_items_N.any() else 0.0
    return {
        "coverage": float((times_I > 0).mean()),
        "gini": gini(times_I),
        "novelty": float(times_I @ -np.log2(share_I) / max(int(times_I.sum()), 1)),
        "popularity_lift": float(mean_N.mean()) / own - 1 if own else None,
    }


def gini(amounts_I: NDArray[np.int64]) -> float:
    """The Gini index of amounts, at least one of them: half the mean difference of two, over the mean. 0 where nothing was given out."""
    ordered = np.sort(amounts_I)
    total, number = int(ordered.sum()), len(ordered)
    return float((2 * np.arange(1, number + 1) - number - 1) @ ordered / (number * total)) if total else 0.0
