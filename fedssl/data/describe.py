"""A look at a data set: how many, how dense, how long, and what in it might surprise a learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedssl.config import DataConfig
from fedssl.data.dataset import Dataset, make_dataset, open_dataset
from fedssl.data.interactions import Interactions
from fedssl.data.paths import find_path
from fedssl.data.readers import read_interactions

_QUANTILES = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


def describe(source: Dataset | DataConfig | str | Path) -> dict[str, Any]:
    """Facts about a data set, ready for JSON.

    Keys: path, users, items (that occur), catalogue (items listed), events, density (distinct pairs / (users x items)), lengths
    (quantiles and mean of events a user), testable_users (three events or more), repeated_events (of a user and item that met
    before), equal_times (events at the time of the user's one before; None: no times), out_of_order (events that stand in the file
    after a later one of the same user; None: no times, or the file is not at hand), dropped (by the filter), fingerprint.

    A path is read with the defaults of `[data]`; a folder is opened as a store. Raises DataError as `load_dataset` does.
    """
    out_of_order = None
    if isinstance(source, Dataset):
        dataset = source
    else:
        config = source if isinstance(source, DataConfig) else DataConfig(path=str(source))
        path = find_path(config.path)
        if path.is_dir():
            dataset = open_dataset(path)
        else:
            interactions = read_interactions(path, config.format)
            out_of_order = _out_of_order(interactions)
            dataset = make_dataset(interactions, config)
    histories = dataset.histories
    owners = np.repeat(np.arange(histories.num_users), histories.lengths)
    pairs = len(np.unique(owners * (dataset.catalogue.num_items + 1) + histories.items))
    items = len(np.unique(histories.items))
    times = histories.times
    return {
        "path": dataset.path,
        "users": histories.num_users,
        "items": items,
        "catalogue": dataset.catalogue.num_items,
        "events": histories.num_events,
        "density": pairs / max(1, histories.num_users * items),
        "lengths": {
            **{name: float(np.quantile(histories.lengths, share)) for name, share in _QUANTILES.items()},
            "mean": float(histories.lengths.mean()),
        }
        if histories.num_users
        else {},
        "testable_users": int(histories.can_be_tested.sum()),
        "repeated_events": histories.num_events - pairs,
        "equal_times": None if times is None else int(((times[1:] == times[:-1]) & (owners[1:] == owners[:-1])).sum()),
        "out_of_order": out_of_order,
        "dropped": dict(dataset.dropped),
        "fingerprint": histories.fingerprint,
    }


def describe_text(facts: dict[str, Any]) -> str:
    """The facts of `describe` as lines for a person, without a line end at the end."""

    def share(count: int | None, unknown: str) -> str:
        return unknown if count is None else f"{count:,} ({count / max(1, facts['events']):.1%})"

    lengths = facts["lengths"]
    dropped = facts["dropped"]
    rows = {
        "users": f"{facts['users']:,}, {facts['testable_users']:,} of them with the three events that a test takes",
        "items": f"{facts['items']:,}" + ("" if facts["catalogue"] == facts["items"] else f" of {facts['catalogue']:,} in the catalogue"),
        "events": f"{facts['events']:,}",
        "density": f"{facts['density']:.3%} of all pairs of user and item",
        "events a user": ", ".join(f"{name} {value:,.4g}" for name, value in lengths.items()),
        "repeated": share(facts["repeated_events"], ""),
        "equal times": share(facts["equal_times"], "no times; file order"),
        "out of order": share(facts["out_of_order"], "not known (no times, or no file)"),
        "dropped": ", ".join(f"{count:,} {what}" for what, count in dropped.items()) or "not known",
        "fingerprint": facts["fingerprint"],
    }
    width = max(map(len, rows))
    return "\n".join([facts["path"] or "events in memory", *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def _out_of_order(interactions: Interactions) -> int | None:
    """Events of the file that come after an event of the same user with a later time."""
    if interactions.times is None:
        return None
    by_user = np.argsort(interactions.users, kind="stable")
    owners = interactions.users[by_user]
    # Ranks of times in place of times: adding one user's span a user keeps users apart, so one running maximum serves all.
    rank = np.unique(interactions.times[by_user], return_inverse=True)[1].astype(np.int64)
    lifted = rank + owners * (int(rank.max(initial=0)) + 1)
    return int((lifted < np.maximum.accumulate(lifted)).sum()) if len(lifted) else 0
