"""Events written out as (user, item, time) in file order."""

from __future__ import annotations

import numpy as np

from fedssl.data.interactions import Interactions


def coded(triples: list[tuple[str, str, float]], with_times: bool = True) -> Interactions:
    users = tuple(dict.fromkeys(user for user, _, _ in triples))
    items = tuple(dict.fromkeys(item for _, item, _ in triples))
    return Interactions(
        users=np.array([users.index(user) for user, _, _ in triples], dtype=np.int64),
        items=np.array([items.index(item) for _, item, _ in triples], dtype=np.int64),
        times=np.array([time for _, _, time in triples]) if with_times else None,
        user_tokens=users,
        item_tokens=items,
    )
