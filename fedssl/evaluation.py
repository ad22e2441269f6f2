"""Evaluation: the rank of each user's held-out item among the whole catalogue, and metrics of those ranks.

Targets are those of the histories' split: a user's last event is the test target, the one before it the validation target
(leave-one-out), or the first event of a period that is held out from everybody (global time). No candidates are sampled: a
target is ranked against every item (Krichene and Rendle 2020, https://dl.acm.org/doi/10.1145/3394486.3403226, show how
sampling misleads). Every number is reported twice: `all` (any item may be recommended) and `unseen` (the user's earlier
items are left out, never the target).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.beyond_accuracy import best_items, of_lists
from fedssl.data.histories import Histories
from fedssl.data.watch import unchanged
from fedssl.errors import DataError
from fedssl.intervals import bootstrap_interval

Split = Literal["validation", "test"]
Floats = NDArray[np.float64]

SHORT_HISTORY = 10
"""A user with fewer training events than this, and at least one, has a short history."""

SCORES_AT_ONCE = 1 << 25
"""Of a large catalogue fewer users are scored at a time: a matrix of float32 scores takes at most about 128 MiB."""

Scorer = Callable[[Sequence[NDArray[np.int32]], NDArray[np.int64]], Tensor | Mapping[str, Tensor]]
"""Histories (oldest event first) and numbers of n users -> scores (n, I+1), column 0 padding; or several such, by name.

The first name of a dict is the recommender itself, the others are its parts; a lone tensor is called `score`.
"""


def ranks(scores_UI: Tensor, targets_U: NDArray[np.integer[Any]], seen: tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]) -> tuple[Floats, Floats]:
    """The rank of each user's target among all items, and among those the user has not met.

    Guarantees:
      - rank = 1 + items that score strictly higher + half of the other items that score the same;
      - the padding column 0 is no item: its scores are not looked at;
      - for the second rank every pair of ``seen`` is left out, listed once or often, but never the target itself;
      - a NaN is worse than everything, -inf included; a target that scores NaN ranks last, behind all that are not left out;
      - infinities are numbers like others, and two of one sign are a tie.

    Shapes: scores (U, I+1); targets (U,) rows from 1; ``seen``: two arrays (pairs,), the user's index from 0 to U-1 and
    the item's row -> two (U,) float64. Works where the scores lie; the ranks come back as numpy arrays.
    """
    users, width = scores_UI.shape
    device = scores_UI.device
    targets = torch.from_numpy(np.asarray(targets_U, dtype=np.int64)).to(device)
    target_U1 = scores_UI.gather(1, targets[:, None])
    higher_U = (scores_UI > target_U1)[:, 1:].sum(1, dtype=torch.int32)
    equal_U = (scores_UI == target_U1)[:, 1:].sum(1, dtype=torch.int32)

    owner, item = (np.asarray(side, dtype=np.int64) for side in seen)
    pairs = np.unique(owner * width + item)
    owner, item = np.divmod(pairs, width)
    others = (item > 0) & (item != np.asarray(targets_U)[owner])
    flat, owner = torch.from_numpy(pairs[others]).to(device), owner[others]
    # Reading the few seen cells is much cheaper than masking a copy of the block.
    seen_scores, their_target = scores_UI.reshape(-1)[flat], target_U1[:, 0][torch.from_numpy(owner).to(device)]

    def count(is_one: Tensor) -> NDArray[np.int64]:
        return np.bincount(owner[is_one.cpu().numpy()], minlength=users)

    higher, equal = higher_U.cpu().numpy().astype(np.int64), equal_U.cpu().numpy().astype(np.int64)
    higher_unseen, equal_unseen = higher - count(seen_scores > their_target), equal - count(seen_scores == their_target)
    is_nan = target_U1[:, 0].isnan().cpu().numpy()
    last = np.full(users, width - 1)
    last_unseen = last - np.bincount(owner, minlength=users)
    # The target equals itself, hence the -1.
    rank_all = np.where(is_nan, last, 1 + higher + (equal - 1) / 2)
    rank_unseen = np.where(is_nan, last_unseen, 1 + higher_unseen + (equal_unseen - 1) / 2)
    return rank_all.astype(np.float64), rank_unseen.astype(np.float64)


def metrics(ranks_U: Floats, ks: Sequence[int]) -> dict[str, float]:
    """Means over users of `hr@k` (rank <= k), `ndcg@k` (1 / log2(1 + rank) where rank <= k, else 0) and `mrr` (1 / rank).

    Needs at least one user. With one relevant item the ideal DCG is 1, so this is NDCG as others define it.
    """
    assert len(ranks_U), "a mean over no users"
    result: dict[str, float] = {}
    for k in ks:
        result[f"hr@{k}"] = float((ranks_U <= k).mean())
        result[f"ndcg@{k}"] = float(gains(ranks_U, k).mean())
    result["mrr"] = float((1.0 / ranks_U).mean())
    return result


def gains(ranks_U: Floats, k: int) -> Floats:
    """Each user's NDCG@k: with one relevant item the ideal DCG is 1."""
    return np.where(ranks_U <= k, 1.0 / np.log2(1.0 + ranks_U), 0.0)


@dataclass(frozen=True)
class Ranks:
    """The rank of every user's target, for a recommender and its parts.

    Shapes: ``users`` and ``targets`` are (n,), users ascending and each once; ``all`` and ``unseen`` map the name of a
    part to its ranks (n,). The first name is the recommender itself. ``lists``: its best k items for each user, over `all` and
    over `unseen`, (n, k) filled up with 0; empty where none were asked for.
    """

    users: NDArray[np.int64]
    targets: NDArray[np.int64]
    all: dict[str, Floats]
    unseen: dict[str, Floats]
    ks: tuple[int, ...]
    split: Split
    lists: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """As in `report.json`: {"all": metrics, "unseen": metrics}, and "parts": the same by name where there are parts."""
        first, *parts = self.all
        result = self._of(first, slice(None))
        if parts:
            result["parts"] = {name: self._of(name, slice(None)) for name in parts}
        return result

    def groups(self, histories: Histories) -> dict[str, dict[str, dict[str, Any]]]:
        """The recommender's metrics by how active a user is, by how popular the target is in training, and by how well a user is served.

        `activity`: `few`, `middle`, `many`: thirds of these users by training events; users with equally many stay
        together, so thirds may be uneven. `popularity`: `head`, `middle`, `tail`: items in order of training events, each
        third of which holds a third of all training events; equally popular items stay together, and items that nobody
        trains on are tail. `new`: `new item`: targets that nobody trains on; `new user`: users without a training event; `short history`: users with 1 to 9.
        `served`: `worst tenth`: in each column the tenth of users (rounded up) whose targets rank last.

        A group has `users`, `all` and `unseen`, and but for the last kind `from` and `to` (training events of its users or items, both included)
        and `interval`: {"of": the NDCG at the last cut-off, "all": [low, high], "unseen": [low, high]}, the 95 % interval of that mean over users
        drawn anew. Empty groups and kinds are left out.
        """
        length_n = histories.training_lengths[self.users]
        first, second = np.quantile(length_n, (1 / 3, 2 / 3), method="inverted_cdf")
        activity_n = (length_n > first).astype(int) + (length_n > second)
        events_I = training_counts(histories, num_items=max(int(self.targets.max()), int(histories.items.max(initial=0))))
        popularity_n = _third_by_popularity(events_I)[self.targets]
        events_n = events_I[self.targets]
        new = self._by_group(np.where(events_n == 0, 0, -1), ("new item",), events_n)
        new |= self._by_group(np.where(length_n == 0, 0, np.where(length_n < SHORT_HISTORY, 1, -1)), ("new user", "short history"), length_n)
        return {
            "activity": self._by_group(activity_n, ("few", "middle", "many"), length_n),
            "popularity": self._by_group(popularity_n, ("head", "middle", "tail"), events_n),
            **({"new": new} if new else {}),
            "served": {"worst tenth": self._worst_tenth()},
        }

    def beyond_accuracy(self, histories: Histories, num_items: int) -> dict[str, dict[str, Any]]:
        """What the lists hold (`fedssl.beyond_accuracy.of_lists`): `all` and `unseen`, and `held_out`: the items that people took instead, one each."""
        events_I = training_counts(histories, num_items)
        own_n = np.array([events_I[read].mean() for read in self._read(histories)])
        rows = {**self.lists, "held_out": self.targets[:, None]}
        return {name: of_lists(lists_NK, events_I, own_n) for name, lists_NK in rows.items()}

    def _read(self, histories: Histories) -> Iterator[NDArray[np.int32]]:
        """What each user had met before the target."""
        ends = histories.target_places(self.split)
        return (histories.items[histories.cuts[user] : ends[user]] for user in self.users)

    def _worst_tenth(self) -> dict[str, Any]:
        part, number = next(iter(self.all)), -(-len(self.users) // 10)
        return {"users": number, **{name: metrics(np.sort(ranks_n[part])[-number:], self.ks) for name, ranks_n in self._columns}}

    def _by_group(self, group_n: NDArray[Any], names: Sequence[str], size_n: NDArray[np.int64]) -> dict[str, dict[str, Any]]:
        part = next(iter(self.all))
        result = {}
        for number, name in enumerate(names):
            chosen = np.flatnonzero(group_n == number)
            if len(chosen):
                sizes = {"from": int(size_n[chosen].min()), "to": int(size_n[chosen].max())}
                interval: dict[str, Any] = {"of": f"ndcg@{self.ks[-1]}"}
                interval |= {column: list(bootstrap_interval(gains(found[part][chosen], self.ks[-1]))) for column, found in self._columns}
                result[name] = {"users": len(chosen), **sizes, **self._of(part, chosen), "interval": interval}
        return result

    @property
    def _columns(self) -> tuple[tuple[str, dict[str, Floats]], ...]:
        return ("all", self.all), ("unseen", self.unseen)

    def _of(self, part: str, chosen: NDArray[np.int64] | slice) -> dict[str, Any]:
        return {"all": metrics(self.all[part][chosen], self.ks), "unseen": metrics(self.unseen[part][chosen], self.ks)}


def evaluate(
    scorer: Scorer,
    histories: Histories,
    split: Split,
    *,
    users: NDArray[np.integer[Any]] | None = None,
    ks: Sequence[int] = (5, 10),
    block: int = 256,
    list_length: int = 0,
) -> Ranks:
    """Rank the held-out item of every user (or of ``users``) against the whole catalogue, ``block`` users at a time, or `SCORES_AT_ONCE` scores.

    Guarantees:
      - a user counts once, however often listed, and only if they have a target: with leave-one-out those with three events, with
        a split by time those with an event in the period and one before it;
      - the scorer reads everything before the target and nothing later: of a validation target that is the training part;
      - users of a block have histories of nearly the same length, so that a scorer pads little;
      - the block size and the order of ``users`` change nothing beyond the scorer's own rounding.

    ``list_length``: so many of the recommender's best items are kept for each user (`Ranks.lists`), 0: none. The scorer runs without
    gradients. Raises DataError where nobody can be tested, and where the histories' store was changed meanwhile.
    """
    places = histories.target_places(split)
    tested = places >= 0
    chosen = np.flatnonzero(tested) if users is None else np.unique(np.asarray(users, dtype=np.int64))
    chosen = chosen[tested[chosen]]
    if not len(chosen):
        needed = "the three events that leave-one-out needs" if histories.held_from is None else "an event in this period and one before it"
        raise DataError(f"{split}: none of {len(tested) if users is None else len(users)} users has {needed}; give longer histories")
    starts = histories.cuts[chosen]
    ends = places[chosen]
    targets = histories.items[ends].astype(np.int64)
    of_all: dict[str, Floats] = {}
    of_unseen: dict[str, Floats] = {}
    lists = {name: np.zeros((len(chosen), list_length), dtype=np.int64) for name in ("all", "unseen")} if list_length else {}
    order = np.argsort(ends - starts, kind="stable")
    block = min(block, max(SCORES_AT_ONCE // int(histories.items.max()), 1))
    with torch.no_grad(), unchanged(histories):
        for at in range(0, len(order), block):
            here = order[at : at + block]
            past = [np.asarray(histories.items[starts[user] : ends[user]]) for user in here]
            seen = (np.repeat(np.arange(len(here)), ends[here] - starts[here]), np.concatenate(past))
            scored = scorer(past, chosen[here])
            named = scored if isinstance(scored, Mapping) else {"score": scored}
            for name, scores in named.items():
                for ranks_n, found in zip((of_all, of_unseen), ranks(scores, targets[here], seen), strict=True):
                    ranks_n.setdefault(name, np.empty(len(chosen)))[here] = found
            for kept_nk, found_nk in zip(lists.values(), best_items(next(iter(named.values())), list_length, seen) if lists else (), strict=True):
                kept_nk[here] = found_nk
    return Ranks(chosen, targets, of_all, of_unseen, tuple(ks), split, lists)


def training_counts(histories: Histories, num_items: int) -> NDArray[np.int64]:
    """How often each item stands in the training parts. Shape: (I+1,), the padding's count is 0."""
    is_training = np.arange(histories.num_events) < np.repeat(histories.training_ends, histories.lengths)
    return np.bincount(histories.items[is_training], minlength=num_items + 1)


def _third_by_popularity(events_I: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2 for each item, by the share of all events that strictly more popular items hold."""
    counts, inverse, how_many = np.unique(events_I, return_inverse=True, return_counts=True)
    events = counts * how_many
    above = events.sum() - np.cumsum(events)
    third = np.minimum(3 * above // max(int(events.sum()), 1), 2)
    return np.where(events_I > 0, third[inverse], 2)
