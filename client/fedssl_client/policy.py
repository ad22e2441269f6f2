"""What the person allows: device.toml, read and held against a recipe. Consent is off until they write otherwise."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field

from fedssl.checking import check_file
from fedssl.config import Settings
from fedssl.errors import FedSSLError
from fedssl.privacy import accounting
from fedssl.recipe import Recipe

FILE = "device.toml"


class OutsidePolicy(FedSSLError):
    """A recipe asks for more than the person allows. Its words say what, and may leave the device."""


class Consent(Settings):
    """Whether anything that was learned here may leave."""

    train: bool = Field(False, description="Take part in training; false: the device recommends, and nothing leaves")
    evaluate: bool = Field(
        False, description="Where a run without a plan asks, also say how well its model ranks the newest event: hits and NDCG, which together say the rank"
    )


class Allow(Settings):
    """The most that a recipe may ask for."""

    servers: tuple[str, ...] = Field((), description="Names of servers, as the SuperNode's config gives them; empty: none")
    tasks: tuple[str, ...] = Field(("next-item", "previous-item", "masked-item", "contrastive"), description="Tasks that may be trained")
    parts: tuple[str, ...] = Field((), description="Parts of other packages (`module:name`) that a recipe may name; empty: none")
    most_steps: int = Field(16, ge=1, description="Local steps of a round")
    most_bytes: int = Field(64_000_000, ge=1, description="Bytes of one download, and of one upload")
    least_noise: float = Field(0.0, ge=0.0, description="Least noise multiplier of the plan; 0: whatever epsilon is promised")
    most_epsilon: float = Field(
        8.0,
        gt=0.0,
        allow_inf_nan=True,
        description="Most epsilon over all runs together; a run without a plan is refused. inf: no bound, a run without a plan may join",
    )
    window_plans: bool = Field(False, description="A plan may promise single training windows, which is less than it would promise the person")
    most_delta: float = Field(1e-4, gt=0.0, description="Most delta of a run's plan")


class Retention(Settings):
    """How much of the history is kept. What is beyond it is deleted when something is recorded."""

    most_events: int = Field(10_000, ge=1, description="Newest events that are kept")
    most_days: float = Field(0.0, ge=0.0, description="Days before the newest event beyond which events are deleted; 0: none for their age")


class GateSettings(Settings):
    """When training may run. Gates are asked before and all through it."""

    charging: bool = Field(True, description="Only on mains power; a device without a battery is")
    unmetered: bool = Field(True, description="Only while the way out of the device is not a mobile one")
    most_busy: float = Field(0.5, gt=0.0, le=1.0, description="Only while others use at most this share of the processor; 1: always")
    least_disk_mb: int = Field(500, ge=0, description="Only with so much free disk")
    least_memory_mb: int = Field(700, ge=0, description="Only with so much free memory when training begins, and a fifth of it all through")
    rounds_a_day: int = Field(24, ge=0, description="Trainings begun in 24 hours; 0: none")
    platform: str = Field("", description="`module:name` of a function that gives readings on a platform of your own; empty: psutil and Linux' sysfs")


class AgentSettings(Settings):
    """The agent's own doors."""

    port: int = Field(0, ge=0, le=65535, description="Also listen on 127.0.0.1 at this port, for who shows the token; 0: the Unix socket alone")
    training_socket: str = Field("", description="Path of the socket that the ClientApp asks for training; empty: training/train.sock in the folder")


class Policy(Settings):
    """A whole device.toml. ``user``: the number under which the server knows this device; the server's operator gives it."""

    user: int = Field(0, ge=0, description="The number under which the server knows this device")
    consent: Consent = Consent()
    allow: Allow = Allow()
    retention: Retention = Retention()
    gates: GateSettings = GateSettings()
    agent: AgentSettings = AgentSettings()


def read_policy(folder: Path) -> Policy:
    """The policy of a device's folder. Raises ConfigError where there is none, or it cannot be read."""
    path = folder / FILE
    return check_file(Policy, path, missing=f"{path} is missing, so nothing is allowed; make the folder of a device with `fedssl device init {folder}`")


def promised_epsilon(recipe: Recipe) -> float:
    """Epsilon of a whole run for one who takes part, as the recipe says it; inf without a plan.

    Where it says the noise alone, as if this device were asked in every round: it cannot know by what chance it is.
    """
    privacy = recipe.privacy
    if not privacy.has_plan:
        return math.inf
    if privacy.epsilon is not None:
        return privacy.epsilon
    squares = recipe.server.rounds * privacy.noise_multiplier**-2 if recipe.server.rounds else 0.0
    if recipe.counts is not None:
        squares += privacy.counts_noise_multiplier**-2
    return accounting.gaussian_epsilon(squares**-0.5, 1, privacy.delta)


def refusals(policy: Policy, recipe: Recipe, server: str, *, spent: float = 0.0) -> list[str]:
    """Why this recipe of that server is outside the policy: one sentence a reason; empty where it is inside.

    ``spent``: epsilon of the runs that were joined before.
    """
    allow, privacy, found = policy.allow, recipe.privacy, []
    if not policy.consent.train:
        found.append("the person has not agreed to training ([consent] train)")
    if server not in allow.servers:
        found.append(f"server '{server}' is not one of [allow] servers")
    for task in recipe.task:
        if task.weight > 0 and task.name not in (*allow.tasks, *allow.parts):
            found.append(f"task '{task.name}' is not one of [allow] tasks")
    for name in (recipe.encoder.name, recipe.server.optimizer):
        if ":" in name and name not in allow.parts:
            found.append(f"'{name}' is no part of fedssl, nor one of [allow] parts")
    if recipe.local.steps > allow.most_steps:
        found.append(f"{recipe.local.steps} local steps, and [allow] most_steps is {allow.most_steps}")
    most = least_upload_bytes(recipe)
    if most > allow.most_bytes:
        found.append(f"an upload of {most} bytes or more, and [allow] most_bytes is {allow.most_bytes}")
    if privacy.fleet_users:
        found.append("its noise is that of a larger fleet and too little for this one; only a simulation may ask that")
    if privacy.has_plan and allow.least_noise and privacy.noise_multiplier < allow.least_noise:
        told = f"noise {privacy.noise_multiplier:g}" if privacy.noise_multiplier else "noise that the recipe does not say"
        found.append(f"{told}, and [allow] least_noise is {allow.least_noise:g}")
    if privacy.is_by_window and not allow.window_plans:
        found.append("its plan protects single training windows, and [allow] window_plans is false")
    if privacy.has_plan and privacy.delta > allow.most_delta:
        found.append(f"delta {privacy.delta:g}, and [allow] most_delta is {allow.most_delta:g}")
    if not math.isinf(allow.most_epsilon):
        epsilon = promised_epsilon(recipe)
        if math.isinf(epsilon):
            found.append(f"no privacy plan, and [allow] most_epsilon is {allow.most_epsilon:g}")
        elif spent + epsilon > allow.most_epsilon * (1 + 1e-9):
            before = f" beside {spent:.3g} of runs before" if spent else ""
            found.append(f"epsilon {epsilon:.3g}{before}, and [allow] most_epsilon is {allow.most_epsilon:g}")
    return found


def least_upload_bytes(recipe: Recipe) -> int:
    """A bound from below on the largest upload: dense sums of 4 bytes a coordinate."""
    training = 4 * (recipe.num_items + 1) * recipe.encoder.width if recipe.server.rounds else 0
    counts = 4 * min(recipe.counts.items, recipe.num_items) ** 2 if recipe.counts is not None and recipe.privacy.has_plan else 0
    return max(training, counts)


def check_evaluation(policy: Policy) -> None:
    """Raises OutsidePolicy where the person has not agreed to it."""
    if not policy.consent.evaluate:
        raise OutsidePolicy("this device's policy refuses: the person has not agreed to evaluation ([consent] evaluate)")


def check_policy(policy: Policy, recipe: Recipe, server: str, *, spent: float = 0.0) -> None:
    """Raises OutsidePolicy with all reasons, in words that may leave."""
    found = refusals(policy, recipe, server, spent=spent)
    if found:
        raise OutsidePolicy(f"this device's policy refuses the recipe: {'; '.join(found)}")
