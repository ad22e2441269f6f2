"""From a recipe's words to the parts they name."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from fedssl import seeds
from fedssl.config import EncoderConfig, ServerConfig, TaskConfig
from fedssl.encoders import Encoder
from fedssl.encoders.bert4rec import bert4rec
from fedssl.encoders.gru4rec import gru4rec
from fedssl.encoders.hgrn import hgrn
from fedssl.encoders.sasrec import sasrec
from fedssl.errors import ConfigError
from fedssl.heads.history import with_history
from fedssl.names import find
from fedssl.recipe import Recipe
from fedssl.server_optimizers import ServerOptimizer, adagrad, adam, adamw, sgd, yogi
from fedssl.tasks import Task
from fedssl.tasks.contrastive import contrastive
from fedssl.tasks.masked_item import masked_item
from fedssl.tasks.next_item import next_item
from fedssl.tasks.previous_item import previous_item
from fedssl.weights import ITEMS, Layout, Weights, layout_of

ENCODERS: dict[str, Callable[[EncoderConfig], Encoder]] = {"sasrec": sasrec, "gru4rec": gru4rec, "bert4rec": bert4rec, "hgrn": hgrn}
TASKS: dict[str, Callable[..., Task]] = {"next-item": next_item, "previous-item": previous_item, "contrastive": contrastive, "masked-item": masked_item}
SERVER_OPTIMIZERS: dict[str, Callable[[ServerConfig], ServerOptimizer]] = {"sgd": sgd, "adam": adam, "adamw": adamw, "adagrad": adagrad, "yogi": yogi}


class Parts(NamedTuple):
    """What a recipe names, made. ``plain_encoder``: without what `[head] history` adds to hidden states."""

    encoder: Encoder
    plain_encoder: Encoder
    tasks: tuple[tuple[Task, float], ...]
    optimizer: ServerOptimizer
    layout: Layout


@lru_cache(maxsize=8)
def make_parts(recipe: Recipe) -> Parts:
    """The parts of a recipe. Tasks of weight 0 are left out. Raises ConfigError for a name nobody knows, for a task that cannot train
    the encoder, and under window-level privacy for one that couples windows.
    """
    encoder = find(ENCODERS, recipe.encoder.name, what="encoder")(recipe.encoder)
    tasks = [(config, make_task(config, num_items=recipe.num_items)) for config in recipe.task if config.weight > 0]
    for config, task in tasks:
        _check_pair(config.name, task, recipe.encoder.name, encoder)
        if recipe.privacy.is_by_window and not task.is_by_window:
            raise ConfigError(
                f"task '{config.name}' reads several windows of a user in one loss, so no window can be clipped alone; under privacy.mode = 'window' "
                "use a task that declares is_by_window (next-item, previous-item, masked-item), or protect the whole user with mode = 'central' or 'local'"
            )
    if recipe.head.history and not encoder.is_causal:
        raise ConfigError(
            f"[head] history = {recipe.head.history:g} is the mean of what came before, and '{recipe.encoder.name}' reads both ways; "
            "set it to 0, or use a causal encoder such as sasrec"
        )
    return Parts(
        encoder=with_history(encoder, recipe.head.history) if recipe.head.history else encoder,
        plain_encoder=encoder,
        tasks=tuple((task, config.weight) for config, task in tasks),
        optimizer=find(SERVER_OPTIMIZERS, recipe.server.optimizer, what="server optimiser")(recipe.server),
        layout=layout_of(initial_weights(recipe)),
    )


def make_task(config: TaskConfig, *, num_items: int) -> Task:
    """The pretext task that ``config`` names."""
    task: Task = find(TASKS, config.name, what="task")(config, num_items=num_items)
    return task


def _check_pair(task_name: str, task: Task, encoder_name: str, encoder: Encoder) -> None:
    """Refuse a task whose answers would lie open to the encoder, or whose question it cannot read."""
    if task.encoder == "causal" and not encoder.is_causal:
        raise ConfigError(
            f"task '{task_name}' cannot train '{encoder_name}': an encoder that reads both ways sees the next items it should foretell; "
            "use the task masked-item, or a causal encoder such as sasrec"
        )
    if task.encoder == "bidirectional" and encoder.is_causal:
        raise ConfigError(
            f"task '{task_name}' cannot train '{encoder_name}': a causal encoder has no mask and reads nothing behind a hidden item; "
            "use the task next-item, or the encoder bert4rec"
        )


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
