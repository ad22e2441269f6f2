"""From a recipe's words to the parts they name: the only place with look-ups by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fedssl import seeds
from fedssl.config import EncoderConfig, ServerConfig, TaskConfig
from fedssl.encoders import Encoder
from fedssl.encoders.sasrec import sasrec
from fedssl.errors import ConfigError
from fedssl.recipe import Recipe
from fedssl.server_optimizers import ServerOptimizer, adagrad, adam, adamw, sgd, yogi
from fedssl.tasks import Task
from fedssl.tasks.contrastive import contrastive
from fedssl.tasks.next_item import next_item
from fedssl.weights import ITEMS, Layout, Weights, layout_of

ENCODERS: dict[str, Callable[[EncoderConfig], Encoder]] = {"sasrec": sasrec}
TASKS: dict[str, Callable[..., Task]] = {"next-item": next_item, "contrastive": contrastive}
SERVER_OPTIMIZERS: dict[str, Callable[[ServerConfig], ServerOptimizer]] = {"sgd": sgd, "adam": adam, "adamw": adamw, "adagrad": adagrad, "yogi": yogi}


class Parts(NamedTuple):
    """What a recipe names, made."""

    encoder: Encoder
    tasks: tuple[tuple[Task, float], ...]
    optimizer: ServerOptimizer
    layout: Layout


@lru_cache(maxsize=8)
def make_parts(recipe: Recipe) -> Parts:
    """The parts of a recipe. Tasks of weight 0 are left out. Raises ConfigError for a name nobody knows."""
    return Parts(
        encoder=find(ENCODERS, recipe.encoder.name, what="encoder")(recipe.encoder),
        tasks=tuple((make_task(config, num_items=recipe.num_items), config.weight) for config in recipe.task if config.weight > 0),
        optimizer=find(SERVER_OPTIMIZERS, recipe.server.optimizer, what="server optimiser")(recipe.server),
        layout=layout_of(initial_weights(recipe)),
    )


def make_task(config: TaskConfig, *, num_items: int) -> Task:
    """The pretext task that ``config`` names."""
    task: Task = find(TASKS, config.name, what="task")(config, num_items=num_items)
    return task


def initial_weights(recipe: Recipe) -> Weights:
    """The encoder's and the item table's first weights: a function of the recipe's seed. Row 0 of the table is zero."""
    rng = torch.Generator().manual_seed(seeds.key(recipe.seed, "initial weights"))
    weights: Weights = find(ENCODERS, recipe.encoder.name, what="encoder")(recipe.encoder).init(rng)
    items = torch.randn(recipe.num_items + 1, recipe.encoder.width, generator=rng) * 0.05
    items[0] = 0.0
    return weights | {ITEMS: items}


def foreign_names(recipe: Recipe) -> list[str]:
    """Parts of a recipe that do not ship but are named as ``package.module:name``."""
    return [name for name in (recipe.encoder.name, *(task.name for task in recipe.task), recipe.server.optimizer) if ":" in name]


def find(known: Mapping[str, Any], name: str, *, what: str) -> Any:
    """A part by its name, or by ``package.module:name``. Raises ConfigError that lists what there is."""
    if name in known:
        return known[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{what} '{name}' cannot be loaded ({error}); write package.module:name of something that can be imported") from None
    raise ConfigError(f"there is no {what} '{name}'; there is {', '.join(sorted(known))}, or package.module:name of your own")
