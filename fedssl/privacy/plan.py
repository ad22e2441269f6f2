"""The plan: one object that owns clip, noise, sampling and epsilon of every sum that leaves, so they cannot disagree.

Unit: the user, all that is on one device. Central: neighbours have one user more or less; the server sees each node's
clipped sum; whoever sees the models sees only noised ones. Every exchange of a phase draws its cohort anew with a secret coin a
user; its sums are one Gaussian with 1/z^2 = sum of 1/z_i^2; phases compose. Local: neighbours replace one user's data;
the user's own uploads compose, and nobody sees one without noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from fedssl.config import CountsConfig, LocalConfig, PrivacyConfig, ServerConfig
from fedssl.errors import BudgetSpent, ConfigError
from fedssl.privacy import accounting
from fedssl.privacy.adaptive_clip import WITHIN, WITHIN_CLIP
from fedssl.privacy.grid import grid_step
from fedssl.privacy.keys import users_per_round

LOCAL_SENSITIVITY = 2.0
"""Over the clip: two updates within it are at most that far apart."""


@dataclass(frozen=True)
class SumPlan:
    """One named sum of an upload. ``noise_multiplier``: deviation of the noise on the cohort's sum, over ``clip_norm``."""

    name: str
    clip_norm: float | None
    step: float
    noise_multiplier: float


@dataclass(frozen=True)
class PhasePlan:
    """Rounds alike: ``rate`` is every user's chance to take part in one. ``expected_cohort`` = rate * users, the fixed denominator."""

    phase: str
    rounds: int
    rate: float
    expected_cohort: float
    sums: tuple[SumPlan, ...]

    @property
    def noise_multiplier(self) -> float:
        """That of all its sums together, as one Gaussian."""
        return accounting.combined_noise([one.noise_multiplier for one in self.sums])


@dataclass(frozen=True)
class Plan:
    """What a run promises each user, and all it takes to keep it. ``target``: the epsilon that the noise was solved for; None: noise was given.

    ``fleet_users``: the promise is one to a fleet of so many, of whom these users are a part; rate and noise multiplier are
    the fleet's, and so is the noise on a mean. The users at hand are then promised nothing.

    By window, a phase's ``rate`` is a window's chance to be read in one of the ``steps`` local steps of an upload.
    """

    phases: tuple[PhasePlan, ...]
    delta: float
    num_users: int
    target: float | None = None
    unit: str = "user"
    neighbours: str = "add/remove one user"
    trust: str = "central"
    accountant: str = "PLD (dp-accounting)"
    fleet_users: int | None = None
    steps: int = 1

    @property
    def is_by_window(self) -> bool:
        """Whether the promise is about one training window, and not about a user."""
        return self.unit == "training window"

    def phase(self, name: str) -> PhasePlan:
        """The phase of that name. Raises ConfigError when the plan has none."""
        for phase in self.phases:
            if phase.phase == name:
                return phase
        known = ", ".join(phase.phase for phase in self.phases)
        raise ConfigError(f"the privacy plan has no phase {name!r}, only {known}; nothing may leave in a phase that is not accounted for")

    def sum(self, phase: str, name: str) -> SumPlan:
        """The sum of that name. Raises ConfigError when the phase has none."""
        for one in self.phase(phase).sums:
            if one.name == name:
                return one
        raise ConfigError(f"the privacy plan has no sum {name!r} in phase {phase!r}; nothing may leave that is not accounted for")

    def epsilon(self, charged: Mapping[str, int]) -> float:
        """Epsilon at ``delta`` of so many charged attempts a phase. A phase that is not named was not charged. Local: of the user who uploaded most."""
        if self.trust == "local":
            ((phase, count),) = self._events(charged)
            if self.is_by_window:
                return accounting.epsilon(self.window_events(count), self.delta)
            return accounting.gaussian_epsilon(phase.noise_multiplier / LOCAL_SENSITIVITY, self.uploads(count), self.delta)
        return accounting.epsilon([(phase.rate, phase.noise_multiplier, count) for phase, count in self._events(charged)], self.delta)

    def window_events(self, rounds: int) -> list[tuple[float, float, int]]:
        """By window: (rate, noise multiplier, steps) of the user who was asked most in the first ``rounds`` rounds."""
        (phase,) = self.phases
        return [(phase.rate, phase.noise_multiplier, self.uploads(rounds) * self.steps)]

    def event_epsilon(self, rounds: int) -> float:
        """By window: epsilon of one event whose item is replaced, after ``rounds`` rounds. Windows share no event, so one window changes."""
        ((rate, noise, steps),) = self.window_events(rounds)
        return accounting.event_epsilon(rate, noise, steps, self.delta, windows=1)

    def uploads(self, rounds: int) -> int:
        """Local: how often the user who was asked most uploads in the first ``rounds`` rounds. A pass asks each user once."""
        ((phase, _),) = self._events({})
        return -(-rounds // -(-self.num_users // users_per_round(phase.expected_cohort, self.num_users)))

    def told_to_nodes(self, privacy: PrivacyConfig) -> PrivacyConfig:
        """The settings as a recipe has them. Local: both noise and promise, so that a node adds the one and refuses to exceed the other."""
        if self.trust != "local":
            return privacy
        # Up to six digits, so that another machine's last bits make the same recipe.
        told = {"noise_multiplier": self.sum("training", "update").noise_multiplier, "epsilon": accounting.round_up(self.promised, 6)}
        return privacy.model_copy(update=told)

    @cached_property
    def promised(self) -> float:
        """The target, or else epsilon of the planned rounds."""
        return self.target if self.target is not None else self.epsilon({phase.phase: phase.rounds for phase in self.phases})

    def check_affordable(self, charged: Mapping[str, int], phase: str, round_number: int) -> None:
        """Raises BudgetSpent when one more attempt of ``phase`` would exceed the promise: ask before charging it."""
        after = {**charged, self.phase(phase).phase: charged.get(phase, 0) + 1}
        if all(count <= planned.rounds for planned, count in self._events(after)):
            return  # Part of what was promised.
        spent = self.epsilon(after)
        if spent > self.promised:
            raise BudgetSpent(spent=spent, promised=self.promised, round_number=round_number)

    def noise_std_in_steps(self, phase: str, name: str, *, clip_norm: float | None = None) -> float:
        """Deviation of the noise on the cohort's sum of that name, in steps of its grid: z * C / step. ``clip_norm``: the round's, where it is adaptive.

        For a fleet it is users / fleet_users of that: the mean over the users at hand has the noise of the fleet's mean.
        """
        one = self.sum(phase, name)
        clip, step = (one.clip_norm, one.step) if clip_norm is None else (clip_norm, grid_step(clip_norm))
        assert clip is not None
        share = 1.0 if self.fleet_users is None else self.num_users / self.fleet_users
        return one.noise_multiplier * clip / step * share

    def expected_cohort(self, phase: str) -> float:
        """What a mean divides by, whoever came: the actual size of the cohort is private."""
        return self.phase(phase).expected_cohort

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the whole plan: a run's ledger is bound to it, so that noise and rates never change under the same charges."""
        values = asdict(self)
        if self.fleet_users is None:
            del values["fleet_users"]
        if self.steps == 1:
            del values["steps"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def statement(self) -> dict[str, Any]:
        """The promise as plain values, for a report: JSON in public."""
        return {
            "unit": self.unit,
            "neighbours": self.neighbours,
            "trust": self.trust,
            "sampling": {phase.phase: self._sampling(phase) for phase in self.phases},
            "accountant": self.accountant,
            "delta": self.delta,
            "epsilon": self.promised,
            "rounds": {phase.phase: phase.rounds for phase in self.phases},
            "noise_multiplier": {one.name: one.noise_multiplier for phase in self.phases for one in phase.sums},
            "clip_norm": {one.name: one.clip_norm for phase in self.phases for one in phase.sums},
            "warnings": self.warnings(),
            "caveats": self._caveats(),
            **({} if self.fleet_users is None else {"fleet_users": self.fleet_users}),
            **({"uploads_of_worst_user": self.uploads(self.phases[0].rounds)} if self.trust == "local" else {}),
            **({"local_steps": self.steps, "epsilon_of_a_replaced_event": self.event_epsilon(self.phases[0].rounds)} if self.is_by_window else {}),
        }

    def warnings(self) -> list[str]:
        """What a person must not miss: that the promise is only a question, or that delta is too large. A sentence each."""
        found = []
        if self.fleet_users is not None:
            found.append(
                f"A question, not a promise: this epsilon is what a fleet of {self.fleet_users:,} users would be promised. The {self.num_users:,} users "
                f"at hand got {self.fleet_users / self.num_users:.4g} times less noise than that takes, and are promised nothing."
            )
        users = self.num_users if self.fleet_users is None else self.fleet_users
        if self.delta * users >= 1:
            found.append(f"delta {self.delta:g} is not below 1 / users ({1 / users:.2g}): it allows a mechanism that gives one user away entirely.")
        return found

    def _sampling(self, phase: PhasePlan) -> str:
        if self.is_by_window:
            return (
                f"Poisson over windows, rate {phase.rate:.6g} in each of {self.steps} local step(s), by the device's own key; each user once a pass, "
                f"at most {self.uploads(phase.rounds)} times, as anybody may know"
            )
        if self.trust == "local":
            return f"each user once a pass, at most {self.uploads(phase.rounds)} times, as anybody may know"
        return f"Poisson, rate {phase.rate:.6g}, from a secret cohort key" if phase.rate < 1 else "every user"

    def _events(self, charged: Mapping[str, int]) -> list[tuple[PhasePlan, int]]:
        for name in charged:
            self.phase(name)  # A charge that the plan does not know would be forgotten.
        return [(phase, charged.get(phase.phase, 0)) for phase in self.phases]

    def _caveats(self) -> list[str]:
        if self.trust == "local":
            caveats = ["Nobody is trusted with an update; the server and the network see who takes part, and when."]
        else:
            caveats = ["The server is trusted: it sees each node's clipped sums before noise is added."]
        if self.trust == "central" and any(phase.rate < 1 for phase in self.phases):
            caveats.append("Amplification by sampling holds against whoever sees the models, not against the server or the network, which see who takes part.")
        if self.is_by_window:
            caveats.append(
                "One window is a fixed piece of a history, cut from its first event on, and shares no event with another. A user of many is promised less, "
                "and nothing is said of an event that is deleted or inserted, because all later windows are cut elsewhere. Of an event whose item is replaced "
                f"epsilon is {self.event_epsilon(self.phases[0].rounds):.3g}."
            )
        caveats.append(
            "A catalogue and a k-core filter made from private data are outside epsilon (give a public catalogue), and so are the data set's fingerprint and "
            "its numbers of users and events, which a report names."
        )
        caveats.append("Hyper-parameters chosen by looking at private data are outside epsilon; take them from a preset.")
        return caveats


def make_plan(privacy: PrivacyConfig, server: ServerConfig, counts: CountsConfig | None, num_users: int, *, local: LocalConfig | None = None) -> Plan | None:
    """The plan that these settings make over ``num_users`` users; None when they ask for none.

    A target epsilon is solved for noise: the counts get ``counts.share`` of it (their 1/z^2 is that share of the one
    Gaussian's that spends the whole target; all of it where nothing is trained), the training all that is then left, and the
    whole composes to at most the target. ``local``: needed where each of a device's local steps is a release (mode = "window").

    Raises ConfigError for settings that no plan can keep: a cohort larger than the users, passes, unequal weights, a
    sum without clip or noise.
    """
    if not privacy.has_plan:
        return None
    if num_users < 1:
        raise ConfigError("a privacy plan needs users; the data set has none")
    if server.sampling != "poisson" and not privacy.is_local:
        raise ConfigError(f"[server] sampling = {server.sampling!r} has no secret coins to account; under a plan set sampling = 'poisson'")
    if server.weighting != "equal":
        raise ConfigError(f"[server] weighting = {server.weighting!r} lets a user weigh more than the clip; under a plan set weighting = 'equal'")
    rate = server.cohort / num_users
    if server.rounds and rate > 1:
        raise ConfigError(f"[server] cohort = {server.cohort:g} is more than the {num_users} users there are; under a plan set it to at most {num_users}")
    if privacy.fleet_users and privacy.fleet_users < num_users:
        raise ConfigError(f"[privacy] fleet_users = {privacy.fleet_users} is fewer than the {num_users} users at hand; ask for a larger fleet, or set it to 0")
    if server.rounds and privacy.clip_norm is None:
        raise ConfigError("[privacy] has no clip_norm; noise without a clip promises nothing")
    if counts is not None and counts.clip_norm is None:
        raise ConfigError("[counts] has no clip_norm; under a plan every sum needs one")

    if privacy.is_by_window:
        if local is None:
            raise ConfigError("[privacy] mode = 'window' accounts for every local step; a plan for it needs the [local] settings too")
        return _window_plan(privacy, server, counts, num_users, local.steps)
    if privacy.is_local:
        return _local_plan(privacy, server, counts, num_users)
    noise, counts_noise = _noise(privacy, server, counts, rate)
    phases = []
    if counts is not None:
        # Two phases of everybody: which items are met at all, then transitions between those met most. Together one Gaussian of that noise.
        shares = {"popularity": counts.popularity_share, "counts": 1 - counts.popularity_share}
        for name, share in shares.items():
            noise_of_one = accounting.round_up(counts_noise / share**0.5)
            phases.append(PhasePlan(name, 1, 1.0, float(num_users), (_sum(name, counts.clip_norm, noise_of_one),)))
    if server.rounds:
        phases.append(PhasePlan("training", server.rounds, rate, float(server.cohort), training_sums(privacy, noise)))
    return Plan(phases=tuple(phases), delta=privacy.delta, num_users=num_users, target=privacy.epsilon, fleet_users=privacy.fleet_users or None)


def _noise(privacy: PrivacyConfig, server: ServerConfig, counts: CountsConfig | None, rate: float) -> tuple[float, float]:
    """Noise multipliers of the training and of the counts (of popularity and transitions together), as given or as solved for."""
    if privacy.epsilon is None:
        if counts is not None and privacy.counts_noise_multiplier == 0:
            raise ConfigError("[privacy] counts_noise_multiplier is 0 while [counts] is on; set it, or give a target epsilon")
        return privacy.noise_multiplier, privacy.counts_noise_multiplier
    if counts is None:
        return _of_update(privacy, accounting.solve_noise(privacy.epsilon, privacy.delta, rate, server.rounds)), 0.0
    whole = accounting.solve_noise(privacy.epsilon, privacy.delta, 1.0, 1)
    if not server.rounds:
        return 0.0, whole
    counts_noise = float(whole / counts.share**0.5)
    both = accounting.solve_noise(privacy.epsilon, privacy.delta, rate, server.rounds, ((1.0, counts_noise, 1),))
    return _of_update(privacy, both), counts_noise


def _local_plan(privacy: PrivacyConfig, server: ServerConfig, counts: CountsConfig | None, num_users: int) -> Plan:
    """Every user adds noise to each of their own uploads. Neighbours replace a user's data, so an update changes by up to twice the clip."""
    _check_own_noise(privacy, server, counts)
    sums = training_sums(privacy, privacy.noise_multiplier or 1.0)
    made = Plan(
        phases=(PhasePlan("training", server.rounds, server.cohort / num_users, float(server.cohort), sums),),
        delta=privacy.delta,
        num_users=num_users,
        target=privacy.epsilon,
        neighbours="replace all that is on one device by anything else",
        trust="local",
        accountant="Gaussian, in closed form (Balle and Wang 2018)",
    )
    if privacy.epsilon is None:
        return made
    both = LOCAL_SENSITIVITY * accounting.solve_gaussian_noise(privacy.epsilon, privacy.delta, made.uploads(server.rounds))
    return replace(made, phases=(replace(made.phases[0], sums=training_sums(privacy, _of_update(privacy, accounting.round_up(both)))),))


def _window_plan(privacy: PrivacyConfig, server: ServerConfig, counts: CountsConfig | None, num_users: int, steps: int) -> Plan:
    """Every local step of a device is one release of a sum over windows, each read with chance ``window_rate``; a window changes it by up to the clip."""
    _check_own_noise(privacy, server, counts)
    phase = PhasePlan("training", server.rounds, privacy.window_rate, float(server.cohort), training_sums(privacy, privacy.noise_multiplier or 1.0))
    made = Plan(
        phases=(phase,),
        delta=privacy.delta,
        num_users=num_users,
        target=privacy.epsilon,
        unit="training window",
        neighbours="add/remove one training window of one device",
        trust="local",
        steps=steps,
    )
    if privacy.epsilon is None:
        return made
    noise = accounting.solve_noise(privacy.epsilon, privacy.delta, privacy.window_rate, made.uploads(server.rounds) * steps)
    return replace(made, phases=(replace(phase, sums=training_sums(privacy, noise)),))


def _check_own_noise(privacy: PrivacyConfig, server: ServerConfig, counts: CountsConfig | None) -> None:
    if counts is not None:
        raise ConfigError(
            f"[counts] would be a whole matrix of noise from every user; under privacy.mode = '{privacy.mode}' take the section away (counts = none)"
        )
    if server.sampling != "passes":
        raise ConfigError(f"[server] sampling = 'poisson' does not say how often a user uploads; under privacy.mode = '{privacy.mode}' set sampling = 'passes'")


def training_sums(privacy: PrivacyConfig, noise: float) -> tuple[SumPlan, ...]:
    """The update with noise multiplier ``noise``; where its clip is adaptive also the bits, which take ``clip_share`` of both sums' 1/z^2."""
    update = _sum("update", privacy.clip_norm, noise)
    if privacy.clip == "fixed":
        return (update,)
    return update, _sum(WITHIN, WITHIN_CLIP, accounting.round_up(noise * ((1 - privacy.clip_share) / privacy.clip_share) ** 0.5))


def _of_update(privacy: PrivacyConfig, both: float) -> float:
    """The update's noise multiplier, where both sums of a round together may have ``both``."""
    return both if privacy.clip == "fixed" else accounting.round_up(both / (1 - privacy.clip_share) ** 0.5)


def _sum(name: str, clip_norm: float | None, noise: float) -> SumPlan:
    assert clip_norm is not None
    return SumPlan(name, clip_norm, grid_step(clip_norm), noise)
