"""What comes to a device from files: a model, or a history that was kept elsewhere."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np

from fedssl.data.readers import read_interactions
from fedssl.device_model import copy_device_model
from fedssl.errors import DataError
from fedssl_client.device_folder import HISTORY, MODEL, heads_folder, opened_ledger
from fedssl_client.history import Event, HistoryStore
from fedssl_client.policy import read_policy
from fedssl_client.recommender import DeviceRecommender
from fedssl_client.store import locked


def import_model(folder: Path, model: Path) -> DeviceRecommender:
    """Take a model that `fedssl export` wrote in place of the one at hand; an agent that runs recommends with it from its next answer on.

    The history stays, whatever the new catalogue lists. Where the model comes from another run, what belongs to other runs goes: heads, and uploads
    kept for a retry, which is then refused. What was charged stays charged. Raises CheckpointError or CatalogueMismatch where it is not whole, and
    DiskError where there is no room, and changes nothing.
    """
    found = DeviceRecommender(model)
    with locked(folder), closing(HistoryStore(folder / HISTORY)) as history:
        copy_device_model(model, folder / MODEL)
        kept = heads_folder(folder, found.run)
        for other in kept.parent.glob("*"):
            if other != kept:
                shutil.rmtree(other)
        with opened_ledger(folder, history) as device:
            device.ledger.forget_answers(but_of=found.run)
    return DeviceRecommender(folder / MODEL)


def import_history(folder: Path, file: Path, *, format: str = "auto", columns: tuple[str, ...] = (), user: str | None = None) -> int:
    """Record the events of a file, of whatever format `fedssl data describe` reads; how many there are now. ``user``: whose, where the file has several.

    Without times events keep the order of the file. What retention does not cover is not kept. Raises DataError or DiskError, and then records nothing.
    """
    interactions = read_interactions(file, format, columns=columns)
    tokens = interactions.user_tokens
    if user is None and len(tokens) != 1:
        raise DataError(f"{file}: events of {len(tokens)} users, and a device holds one person's; name one with --user")
    if user is not None and user not in tokens:
        raise DataError(f"{file}: there is no user '{user}' in it; its {len(tokens)} users are like '{tokens[0][:40]}', and --user names one")
    wanted = np.flatnonzero(interactions.users == (0 if user is None else tokens.index(user)))
    times = np.arange(len(wanted), dtype=np.float64) if interactions.times is None else interactions.times[wanted]
    items = interactions.items[wanted]
    events = [Event(interactions.item_tokens[item], float(when), 1.0) for item, when in zip(items.tolist(), times.tolist(), strict=True)]
    with closing(HistoryStore(folder / HISTORY)) as history:
        history.add(events, read_policy(folder).retention)
        return len(history.items())
