"""The recipe: all that a node must know to train, as canonical JSON with a hash. It travels in every Download.

No paths, keys or random states: a recipe may be printed in public. What a person allows is the device's own policy, and
a recipe outside it is refused there.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property

from pydantic import Field

from fedssl.checking import check
from fedssl.config import (
    CountsConfig,
    DeviceEvaluation,
    DistillationConfig,
    EncoderConfig,
    HeadConfig,
    LocalConfig,
    PrivacyConfig,
    RunConfig,
    ServerConfig,
    Settings,
    TaskConfig,
)
from fedssl.errors import WireError

RECIPE_FORMAT = 1


class Recipe(Settings):
    """What is trained, on which catalogue, under which promise."""

    format: int = Field(RECIPE_FORMAT, description="Format number; another one is refused")
    seed: int = Field(description="Chance of windows, views, negatives and dropout; harmless under a clip")
    num_items: int = Field(ge=1, description="Items of the catalogue, without the padding row 0")
    catalogue: str = Field(description="Hash of the catalogue's tokens in order")
    features: str = Field("", description="Hash of what is known of the items, where the server learns a projection of it; empty: nothing")
    encoder: EncoderConfig
    task: tuple[TaskConfig, ...]
    counts: CountsConfig | None
    distillation: DistillationConfig | None = None
    head: HeadConfig
    local: LocalConfig
    server: ServerConfig
    privacy: PrivacyConfig
    evaluation: DeviceEvaluation | None = None

    @cached_property
    def canonical(self) -> str:
        """JSON with sorted keys and no spaces: equal recipes are equal text."""
        values = self.model_dump(mode="json")
        # A recipe without what came later is the text that it was before.
        if self.evaluation is None:
            del values["evaluation"]
        if not self.head.adapt:
            del values["head"]["adapt"]
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical text, in hexadecimal."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()


def make_recipe(run: RunConfig, *, num_items: int, catalogue: str, privacy: PrivacyConfig | None = None, features: str = "") -> Recipe:
    """The recipe of a run over a catalogue of ``num_items`` items with that hash. ``features``: `fedssl.data.features_file.hash_of` those at hand.

    ``privacy``: what nodes are told of it, where that is more than the settings say (`Plan.told_to_nodes`).
    """
    return Recipe(
        seed=run.seed,
        num_items=num_items,
        catalogue=catalogue,
        features=features,
        encoder=run.encoder,
        task=run.task,
        counts=run.counts,
        distillation=run.distillation,
        head=run.head,
        local=run.local,
        server=run.server,
        privacy=privacy if privacy is not None else run.privacy,
        evaluation=DeviceEvaluation(every=run.evaluation.on_devices, ks=run.evaluation.ks) if run.evaluation.on_devices else None,
    )


def read_recipe(text: str, *, where: str) -> Recipe:
    """A recipe from its canonical text. Raises WireError for another format number, ConfigError for anything else."""
    try:
        values = json.loads(text)
        number = values["format"]
    except (ValueError, KeyError, TypeError):
        raise WireError(f"{where}: the recipe is not JSON with a format number; was it written by fedssl?") from None
    if number != RECIPE_FORMAT:
        raise WireError(f"{where}: recipe format {number}, this version reads {RECIPE_FORMAT}; install the fedssl that wrote it")
    return check(Recipe, values, where=where)
