"""Interactions: who met which item, when, as columns of equal length; what every reader returns.

Users and items are codes into their token tuples, events stand in file order. Nothing is sorted yet: `histories` does that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import DataError


@dataclass(frozen=True, eq=False)
class Interactions:
    """Events in file order: ``users[e]`` met ``items[e]`` at ``times[e]``.

    Shapes: the columns are (events,). ``times`` may be in any unit, and is None where the file knows only an order. ``bad_lines``: lines
    of the file that could not be read and were passed over; ``first_bad``: file, line and reason of the first.
    Raises DataError where columns differ in length, a code has no token, or a token is listed twice.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    times: NDArray[np.float64] | None
    user_tokens: tuple[str, ...]
    item_tokens: tuple[str, ...]
    bad_lines: int = 0
    first_bad: str = ""

    def __post_init__(self) -> None:
        lengths = {len(self.users), len(self.items), len(self.users) if self.times is None else len(self.times)}
        if len(lengths) > 1:
            raise DataError(f"interactions: columns of {sorted(lengths)} events; users, items and times must be equally long")
        for what, codes, tokens in (("user", self.users, self.user_tokens), ("item", self.items, self.item_tokens)):
            if len(codes) and not (codes.min() >= 0 and codes.max() < len(tokens)):
                raise DataError(f"interactions: {what} codes {codes.min()} to {codes.max()} for {len(tokens)} tokens; codes count from 0")
            if len(set(tokens)) != len(tokens):
                raise DataError(f"interactions: a {what} token is listed twice; tokens name {what}s and must differ")
        if self.times is not None and not np.isfinite(self.times).all():
            raise DataError("interactions: a time is nan or infinite; give every event a time, or none (times = None: file order)")

    @property
    def num_events(self) -> int:
        """Events, repeated pairs included."""
        return len(self.users)


def k_core(interactions: Interactions, min_events: int) -> Interactions:
    """Drop items, then users, with fewer than ``min_events`` events, until nothing changes.

    Guarantees:
      - every user and item that is left has at least ``min_events`` events, and it is the largest such set;
      - what is left keeps its order and its tokens; tokens without an event are gone;
      - ``min_events`` 1 keeps every event.

    Repeated pairs count as often as they occur. Source: Seidman 1983, https://doi.org/10.1016/0378-8733(83)90028-X.
    """
    users, items = interactions.users, interactions.items
    kept = np.arange(len(users))
    while True:
        before = len(kept)
        kept = kept[np.bincount(items[kept], minlength=1)[items[kept]] >= min_events]
        kept = kept[np.bincount(users[kept], minlength=1)[users[kept]] >= min_events]
        if len(kept) == before:
            break
    user_codes, new_users = np.unique(users[kept], return_inverse=True)
    item_codes, new_items = np.unique(items[kept], return_inverse=True)
    return Interactions(
        users=new_users.astype(np.int64),
        items=new_items.astype(np.int64),
        times=None if interactions.times is None else interactions.times[kept],
        user_tokens=tuple(interactions.user_tokens[code] for code in user_codes),
        item_tokens=tuple(interactions.item_tokens[code] for code in item_codes),
    )
