"""A look at a data set: how many, how dense, how long, and what in it might surprise a learner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedssl.config import DataConfig
from fedssl.data.dataset import Dataset, make_dataset, open_dataset
from fedssl.data.histories import Histories
from fedssl.data.interactions import Interactions
from fedssl.data.paths import find_path
from fedssl.data.readers import read_interactions
from fedssl.data.split import hold_out

_QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


def describe(source: Dataset | DataConfig | str | Path) -> dict[str, Any]:
    """Facts about a data set, ready for JSON.

    - path; users; items (that occur); catalogue (items listed); events; density (distinct pairs / (users x items)); fingerprint;
    - lengths: quantiles and mean of events a user;
    - bad_lines: lines that could not be read and were passed over; first_bad: file, line and reason of the first, or nothing;
    - dropped: users, items and events that the filter took away;
    - repeated_events: of a user and item that met before; duplicate_events: of a user and item at the very time of another (None: no
      times); duplicate_users: users of two events or more whose whole history, item by item, is that of another before them;
    - equal_times: events at the time of the user's one before (None: no times); out_of_order: events that stand in the file after a
      later one of the same user (None: no times, or the file is not at hand);
    - split: its name, and the times from which on events are held out (None with leave-one-out); testable_users: users with a test target;
    - training: users who have a training event, events, and untrained_items, listed items without any;
    - test, validation: users with a target, cold_items (targets that are items without a training event: no model can have learned
      them) and cold_users (of these users, those without a training event);
    - unseen_users: users who begin after the test does, so that there is nothing to read and they have no target (0 with leave-one-out).

    A path is read with the defaults of `[data]`; a folder is opened as a store, all of it verified. Raises DataError as `load_dataset` does, but for data
    where nobody has a target.
    """
    out_of_order = None
    if isinstance(source, Dataset):
        dataset = source
    else:
        config = source if isinstance(source, DataConfig) else DataConfig(path=str(source))
        path = find_path(config.path)
        if path.is_dir():
            dataset = open_dataset(path, verify="whole")
            dataset = replace(dataset, histories=hold_out(dataset.histories, config, str(path)))
        else:
            interactions = read_interactions(path, config.format, columns=config.columns, skip_bad_lines=config.skip_bad_lines)
            out_of_order = _out_of_order(interactions)
            dataset = make_dataset(interactions, config)
    histories = dataset.histories
    owners = np.repeat(np.arange(histories.num_users), histories.lengths)
    pair = owners * (dataset.catalogue.num_items + 1) + histories.items
    pairs = len(np.unique(pair))
    items = len(np.unique(histories.items))
    times, held_from = histories.times, histories.held_from
    is_training = np.arange(histories.num_events) < histories.training_ends[owners]
    is_trained_I = np.bincount(histories.items[is_training], minlength=dataset.catalogue.num_items + 1) > 0
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
        "bad_lines": dataset.bad_lines,
        "first_bad": dataset.first_bad,
        "dropped": dict(dataset.dropped),
        "repeated_events": histories.num_events - pairs,
        "duplicate_events": None if times is None else _duplicate_events(pair, times),
        "duplicate_users": _duplicate_users(histories),
        "equal_times": None if times is None else int(((times[1:] == times[:-1]) & (owners[1:] == owners[:-1])).sum()),
        "out_of_order": out_of_order,
        "split": {
            "name": "leave-one-out" if held_from is None else "global-time",
            "validation_from": None if held_from is None else held_from.validation,
            "test_from": None if held_from is None else held_from.test,
        },
        "testable_users": int(histories.can_be_tested.sum()),
        "training": {
            "users": int((histories.training_lengths > 0).sum()),
            "events": int(histories.training_lengths.sum()),
            "untrained_items": dataset.catalogue.num_items - int(is_trained_I[1:].sum()),
        },
        "validation": _targets(histories, histories.target_places("validation"), is_trained_I),
        "test": _targets(histories, histories.target_places("test"), is_trained_I),
        "unseen_users": 0 if held_from is None or times is None else _unseen_users(histories, held_from.test),
        "fingerprint": histories.fingerprint,
    }


def describe_text(facts: dict[str, Any]) -> str:
    """The facts of `describe` as lines for a person, without a line end at the end."""

    def share(count: int | None, unknown: str) -> str:
        return unknown if count is None else f"{count:,} ({count / max(1, facts['events']):.1%})"

    def targets(found: dict[str, int]) -> str:
        return f"{found['users']:,} users; {found['cold_items']:,} of the targets are cold items, {found['cold_users']:,} of the users have no training event"

    lengths, split, training = facts["lengths"], facts["split"], facts["training"]
    is_by_time = split["name"] == "global-time"
    cuts = f", validation from {split['validation_from']:.10g}, test from {split['test_from']:.10g}" if is_by_time else ""
    needs = "an event in the test's time and one before" if is_by_time else "the three events that a test takes"
    rows = {
        "users": f"{facts['users']:,}, {facts['testable_users']:,} of them with {needs}",
        "items": f"{facts['items']:,}" + ("" if facts["catalogue"] == facts["items"] else f" of {facts['catalogue']:,} in the catalogue"),
        "events": f"{facts['events']:,}",
        "density": f"{facts['density']:.3%} of all pairs of user and item",
        "events a user": ", ".join(f"{name} {value:,.4g}" for name, value in lengths.items()),
        "bad lines": f"{facts['bad_lines']:,}" + (f"; the first: {facts['first_bad']}" if facts["bad_lines"] else ""),
        "dropped": ", ".join(f"{count:,} {what}" for what, count in facts["dropped"].items()) or "not known",
        "repeated": share(facts["repeated_events"], ""),
        "duplicates": share(facts["duplicate_events"], "not known (no times)") + f"; {facts['duplicate_users']:,} users with the very history of another",
        "equal times": share(facts["equal_times"], "no times; file order"),
        "out of order": share(facts["out_of_order"], "not known (no times, or no file)"),
        "split": split["name"] + cuts,
        "training": f"{training['users']:,} users, {training['events']:,} events; {training['untrained_items']:,} items without any",
        "validation": targets(facts["validation"]),
        "test": targets(facts["test"]) + (f"; {facts['unseen_users']:,} more begin after the cut" if facts["unseen_users"] else ""),
        "fingerprint": facts["fingerprint"],
    }
    width = max(map(len, rows))
    return "\n".join([facts["path"] or "events in memory", *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def _targets(histories: Histories, places_U: NDArray[np.int64], is_trained_I: NDArray[np.bool_]) -> dict[str, int]:
    users = np.flatnonzero(places_U >= 0)
    return {
        "users": len(users),
        "cold_items": int((~is_trained_I[histories.items[places_U[users]]]).sum()),
        "cold_users": int((histories.training_lengths[users] == 0).sum()),
    }


def _unseen_users(histories: Histories, test_from: float) -> int:
    assert histories.times is not None
    first = histories.times[histories.cuts[:-1][histories.lengths > 0]]
    return int((first >= test_from).sum())


def _duplicate_events(pair: NDArray[np.int64], times: NDArray[np.float64]) -> int:
    order = np.lexsort((times, pair))
    pair, times = pair[order], times[order]
    return int(((pair[1:] == pair[:-1]) & (times[1:] == times[:-1])).sum())


def _duplicate_users(histories: Histories) -> int:
    whole = [histories.of(user).tobytes() for user in np.flatnonzero(histories.lengths >= 2).tolist()]
    return len(whole) - len(set(whole))


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
