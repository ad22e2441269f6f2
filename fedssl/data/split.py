"""What is held out of histories, as `[data] split` says: a user's last two events, or what comes from one time on."""

from __future__ import annotations

import numpy as np

from fedssl.config import DataConfig
from fedssl.data.histories import HeldFrom, Histories, split_by
from fedssl.errors import DataError


def hold_out(histories: Histories, config: DataConfig, where: str) -> Histories:
    """The same histories, users and rows with the split of ``config``. ``where``: what an error calls them.

    global-time: a share q of the events becomes the time of event number floor(q n) (from 0, in order of time), and everything at
    that time or later is held out; so at most a share q is before it. Raises DataError for histories without times, and for cuts
    that are not one before the other.
    """
    if config.split == "leave-one-out":
        return histories if histories.held_from is None else split_by(histories, None)
    if histories.times is None or not len(histories.times):
        raise DataError(f"{where}: the events have no times, and [data] split = 'global-time' cuts by time; give a file with times, or set 'leave-one-out'")
    held_from = HeldFrom(_time(histories, config.validation_from), _time(histories, config.test_from))
    if held_from.validation >= held_from.test:
        raise DataError(
            f"{where}: [data] validation_from = {config.validation_from:g} is the time {held_from.validation:.17g} and test_from = {config.test_from:g} is "
            f"{held_from.test:.17g}; wanted an earlier validation_from"
        )
    return split_by(histories, held_from)


def check_has_targets(histories: Histories, where: str) -> None:
    """Raise DataError where nobody has a target of test, or of validation."""
    held_from = histories.held_from
    if held_from is None:
        if not histories.can_be_tested.any():
            raise DataError(
                f"{where}: none of the {histories.num_users} users has three events (training, validation, test), so nothing could be measured; "
                "give longer histories"
            )
        return
    for split, first, key in (("validation", held_from.validation, "validation_from"), ("test", held_from.test, "test_from")):
        if not (histories.target_places("test" if split == "test" else "validation") >= 0).any():
            raise DataError(
                f"{where}: none of the {histories.num_users} users has an event before and one from {first:.17g} on, where {split} begins, so nothing could "
                f"be measured; set another [data] {key}"
            )


def _time(histories: Histories, cut: float) -> float:
    if cut >= 1:
        return cut
    assert histories.times is not None
    at = int(cut * len(histories.times))
    return float(np.partition(histories.times, at)[at])
