"""A device for tests: a folder with a policy, a model of a small recipe, some events; and a machine whose gates a test opens and closes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from fedssl_client.device_folder import make_device_folder
from fedssl_client.gates import Readings
from fedssl_client.history import Event, HistoryStore
from fedssl_client.policy import Retention

from fedssl.catalogue import Catalogue
from fedssl.config import RunConfig
from fedssl.device_model import write_device_model
from fedssl.parts import initial_weights
from fedssl.recipe import Recipe, make_recipe
from fedssl.records import Address, Download
from fedssl.server_round import first_state, phases_of
from fedssl.weights import to_numpy

SERVER, USER, RUN = "home", 5, "a run"
CATALOGUE = Catalogue(tuple(f"i{row}" for row in range(1, 31)))
ENCODER = {"width": 8, "blocks": 1, "heads": 1, "hidden": 8, "window": 10}
EVENTS = ["i3", "i7", "i1", "i30", "i7", "i2", "i9", "i4"]


class Machine:
    """Readings that a test sets; a callable that gives this object is a platform."""

    def __init__(self) -> None:
        self.now = Readings(on_power=True, unmetered=True, busy=0.0, free_disk=10**12, free_memory=10**12)

    def __call__(self, folder: Path, training: object) -> Readings:
        return self.now


def good_machine() -> Callable[..., Readings]:
    return Machine()


def recipe_of(catalogue: Catalogue = CATALOGUE, **sections: Any) -> Recipe:
    config = RunConfig.model_validate({"encoder": ENCODER, **sections})
    return make_recipe(config, num_items=catalogue.num_items, catalogue=catalogue.hash)


def download_of(recipe: Recipe, *, round: int = 1, run: str = RUN, phase: str = "training", **changes: Any) -> Download:
    tensors = next(one for one in phases_of(recipe) if one.name == phase).tensors(first_state(recipe))
    return Download(Address(run, phase, round), recipe, tensors, users=np.array([USER]), **changes)


def write_policy(folder: Path, *, user: int = USER, **sections: Any) -> None:
    """A policy that allows much, with these sections changed."""
    values: dict[str, Any] = {
        "user": user,
        "consent": {"train": True},
        "allow": {"servers": [SERVER], "most_epsilon": float("inf")},
        "gates": {"platform": "device:good_machine"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    (folder / "device.toml").write_text(tomli_w.dumps(values))


def make_device(folder: Path, recipe: Recipe | None = None, *, catalogue: Catalogue = CATALOGUE, events: list[str] | None = None, **policy: Any) -> Path:
    """The folder of a device that joined `SERVER`."""
    recipe = recipe or recipe_of(catalogue)
    make_device_folder(folder, user=USER)
    write_policy(folder, **policy)
    write_device_model(folder / "model", recipe, to_numpy(initial_weights(recipe)), catalogue, None, run=RUN, round=0)
    history = HistoryStore(folder / "history.sqlite")
    history.join(SERVER)
    history.add([Event(item, float(number), 1.0) for number, item in enumerate(EVENTS if events is None else events)], Retention())
    history.close()
    return folder
