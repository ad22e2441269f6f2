"""The audit: canaries through the shipped rounds, and a lower bound of epsilon beside the claim.

Each canary takes part or not by the auditor's coin. Rounds are those of a run: `client_round` behind a Grid, the loop with its ledger,
cohorts from the cohort key, clip, noise, mean. The attacker sees every released model, knows each canary's update, and
names those who took part. What it looks at and from where on it names somebody is fixed before anything is released. If it is right
more often than the claimed epsilon allows, with 99.9 % confidence, then the claim is wrong.

Canaries are orthogonal and noise is independent between coordinates, so one run gives as many independent trials as there are
canaries (Steinke et al. 2023, https://arxiv.org/abs/2305.08846, have bounds for runs where it is not).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fedssl_server.rounds import RoundFacts, owners, run_rounds
from fedssl_server.rounds import Run as ServerRun
from numpy.typing import NDArray
from scipy.stats import norm

from fedssl.client_round import Shard
from fedssl.config import RunConfig, check
from fedssl.privacy.keys import Keys, cohort_by_coins, make_keys
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.plan import Plan, make_plan
from fedssl.recipe import make_recipe
from fedssl.server_round import State, first_state
from fedssl.weights import ITEMS
from fedssl_simulations.attacks import bounds
from fedssl_simulations.attacks.canaries import WINDOW, canary_histories
from fedssl_simulations.attacks.result import Figure, Found, statement_line
from fedssl_simulations.grids import InProcessGrid, handler_of

CLIP_NORM = 1.0
CONFIDENCE = 0.999
_UNRELIABLE = 4
"""One canary of so many is not asked about, and is offline every second time that a round is played again, so that its totals are others."""


@dataclass(frozen=True)
class Scenario:
    """A way to run rounds. ``rate``: each user's chance to take part in a release; ``releases``: how many.

    ``falls_back``: all releases are of round 1; between them the server falls back to the state before it, as after a crash, and other
    users answer, so that another attempt is charged. Otherwise they are rounds one after the other.
    """

    name: str
    rate: float
    releases: int
    epsilon: float
    falls_back: bool = False


EVERYBODY = Scenario("everybody, every round", rate=1.0, releases=2, epsilon=4.0)
SAMPLED = Scenario("secret cohorts", rate=0.05, releases=32, epsilon=2.0)
FALLS_BACK = Scenario("secret cohorts, a round released again", rate=0.05, releases=16, epsilon=2.0, falls_back=True)
SCENARIOS = (EVERYBODY, SAMPLED, FALLS_BACK)


@dataclass(frozen=True)
class Audit:
    """What one audit found. ``named_in`` of ``members`` who took part were named, and ``named_out`` of ``others`` who did not, where the
    attacker's score was above ``threshold``; ``attack`` is the one of several that proves most, and their number is paid for in confidence.
    """

    scenario: Scenario
    claimed: float
    at_least: float
    attack: str
    threshold: float
    named_in: int
    members: int
    named_out: int
    others: int
    seconds: float
    statement: dict[str, Any]

    @property
    def is_refuted(self) -> bool:
        """Whether the claim is wrong, with the confidence of the audit."""
        return self.at_least > self.claimed


def audit(scenario: Scenario, folder: Path, *, canaries: int = 100_000, delta: float = 1e-5, seed: int = 0, keys: Keys | None = None) -> Audit:
    """Run ``scenario`` with a fresh ledger and fresh keys under ``folder``, and bound its epsilon from below.

    ``seed``: the auditor's coins. ``keys``: known ones, for tests alone. Whatever epsilon is claimed comes from the plan and from what the ledger charged.
    """
    began = time.perf_counter()
    folder.mkdir(parents=True)
    config = _config(scenario, canaries, delta)
    plan = make_plan(config.privacy, config.server, config.counts, canaries)
    assert plan is not None
    took_part_N = np.random.default_rng(seed).random(canaries) < 0.5
    released_TN, state = _releases(scenario, config, plan, keys or make_keys(folder), folder, took_part_N)
    claimed = plan.epsilon(state.charged)

    is_judged_N = np.arange(canaries) % _UNRELIABLE != 0 if scenario.falls_back else np.ones(canaries, dtype=np.bool_)
    members_N, others_N = took_part_N & is_judged_N, ~took_part_N & is_judged_N
    z = plan.phase("training").noise_multiplier
    attacks = _attacks(scenario, config, released_TN, z, int(others_N.sum()))
    found = []
    for name, score_N, threshold in attacks:
        hits, alarms = int((score_N[members_N] > threshold).sum()), int((score_N[others_N] > threshold).sum())
        bound = bounds.gaussian_epsilon_at_least if scenario.rate == 1 else bounds.epsilon_at_least
        confidence = 1 - (1 - CONFIDENCE) / len(attacks)
        found.append((bound(hits, int(members_N.sum()), alarms, int(others_N.sum()), delta=delta, confidence=confidence), name, threshold, hits, alarms))
    best, name, threshold, hits, alarms = max(found)
    return Audit(
        scenario=scenario,
        claimed=claimed,
        at_least=best,
        attack=name,
        threshold=threshold,
        named_in=hits,
        members=int(members_N.sum()),
        named_out=alarms,
        others=int(others_N.sum()),
        seconds=time.perf_counter() - began,
        statement={**plan.statement(), "epsilon": claimed},
    )


def _config(scenario: Scenario, canaries: int, delta: float) -> RunConfig:
    """A run whose released weights are the sum of all that was released: plain SGD on the server with a step of 1."""
    parts = "fedssl_simulations.attacks.canaries"
    values = {
        "encoder": {"name": f"{parts}:canary_encoder", "width": 1, "heads": 1, "window": WINDOW},
        "task": [{"name": f"{parts}:canary_task"}],
        "local": {"lr": 1.0},
        "server": {
            "rounds": scenario.releases,
            "cohort": scenario.rate * canaries,
            "sampling": "poisson",
            "optimizer": "sgd",
            "momentum": 0.0,
            "lr": 1.0,
            "schedule": "constant",
        },
        "privacy": {"clip_norm": CLIP_NORM, "epsilon": scenario.epsilon, "delta": delta},
    }
    return check(RunConfig, values, where="audit")


def _releases(scenario: Scenario, config: RunConfig, plan: Plan, keys: Keys, folder: Path, took_part_N: NDArray[np.bool_]) -> tuple[NDArray[np.float64], State]:
    """What was released of each canary's coordinate, in clip norms on the sum, a row a release; and the last state."""
    members = np.flatnonzero(took_part_N)
    recipe = make_recipe(config, num_items=len(took_part_N), catalogue="canaries")
    shard = Shard(canary_histories(members), members, users_per_chunk=4096)
    node_ids, owner_U = owners({1: members}, len(took_part_N))
    run = ServerRun("audit", recipe, len(took_part_N), node_ids, owner_U, plan, keys, Ledger(folder / "ledger.jsonl"))
    is_unreliable_U = np.arange(len(took_part_N)) % _UNRELIABLE == 0
    fewer = replace(run, owner_U=np.where(is_unreliable_U, -1, owner_U).astype(np.int32))
    released: list[NDArray[np.float64]] = []

    def items_of(state: State) -> NDArray[np.float64]:
        return state.released(recipe)[ITEMS][1:, 0].double().numpy()

    before = start = first_state(recipe)

    def on_round(state: State, facts: RoundFacts) -> None:
        nonlocal before
        released.append((items_of(state) - items_of(before)) * plan.expected_cohort("training") / CLIP_NORM)
        before = state

    with InProcessGrid(handler_of({0: shard}), {1: {"partition-id": 0}}) as grid:
        if not scenario.falls_back:
            state = run_rounds(grid, run, start, on_round=on_round)
            return np.stack(released), state
        for number in range(scenario.releases):
            before = start
            state = run_rounds(grid, fewer if number % 2 else run, start, on_round=on_round, should_stop=lambda: len(released) > number)  # noqa: B023
    return np.stack(released), state


def _attacks(
    scenario: Scenario, config: RunConfig, released_TN: NDArray[np.float64], z: float, others: int
) -> Sequence[tuple[str, NDArray[np.float64], float]]:
    """Name, score of every canary, and the score from which on it is named, fixed by the scenario and by how many there are.

    - sum: what was released of a canary, added up. Where all take part, half of what a member adds; else so high that five of those who did
      not take part are expected there: a member who took part far more often than chance allows stands out.
    - likelihood: the log likelihood ratio of "a member, by secret coins", the best there is where nothing is wrong.
    - seed's cohort: the same of "a member, in just the releases for which the PUBLIC seed would choose it".
    """
    T = len(released_TN)
    total_N = released_TN.sum(0)
    if scenario.rate == 1:
        return [("sum", total_N, T / 2)]
    rounds = [1] * T if scenario.falls_back else range(1, T + 1)
    guess_TN = np.zeros(released_TN.shape, dtype=np.bool_)
    for place, number in enumerate(rounds):
        guess_TN[place, cohort_by_coins(config.seed, scenario.rate, released_TN.shape[1], number, "training")] = True
    # Log of how much likelier a release is with the canary in it than without.
    ratio_TN = (released_TN - 0.5) / z**2
    return [
        ("sum", total_N, float(z * T**0.5 * norm.ppf(1 - 5 / others))),
        ("likelihood", np.log1p(scenario.rate * np.expm1(ratio_TN)).sum(0), 1.0),
        ("seed's cohort", (ratio_TN * guess_TN).sum(0), 3.5),
    ]


def audit_all(
    folder: Path,
    *,
    canaries: int = 100_000,
    repeats: int = 1,
    delta: float = 1e-5,
    seed: int = 0,
    on_done: Callable[[Audit], None] = lambda done: None,
) -> Found:
    """Every scenario, ``repeats`` times each with fresh keys, as one table. Ledgers and keys lie under ``folder`` until it returns."""
    groups: list[tuple[str, list[Audit]]] = []
    with tempfile.TemporaryDirectory(dir=folder) as ledgers:
        for scenario in SCENARIOS:
            done: list[Audit] = []
            for number in range(repeats):
                done.append(audit(scenario, Path(ledgers) / f"{len(groups)}-{number}", canaries=canaries, delta=delta, seed=seed + number))
                on_done(done[-1])
            groups.append((scenario.name, done))
    return found_of(groups)


def found_of(groups: Sequence[tuple[str, Sequence[Audit]]], *, first_column: str = "rounds") -> Found:
    """Audits, those of like kind together, as a table: the largest bound of each kind beside the claim."""
    rows: list[dict[str, Figure | float | int | str]] = []
    notes = [
        f"A bound above the claim would refute it with {CONFIDENCE:.1%} confidence (one-sided; Clopper-Pearson; threshold and attacks fixed beforehand). "
        "Where all take part the bound takes the release for one Gaussian; else it holds for releases of any kind, and is loose."
    ]
    for name, done in groups:
        most = max(done, key=lambda one: one.at_least)
        shares = [one.at_least / one.claimed for one in (min(done, key=lambda one: one.at_least), most)]
        rows.append(
            {
                first_column: name,
                "claimed": most.claimed,
                "at least": most.at_least,
                "of the claim": f"{shares[1]:.2f}" if len(done) == 1 else f"{shares[0]:.2f} to {shares[1]:.2f}",
                "refuted": f"{sum(one.is_refuted for one in done)} of {len(done)}",
                "attack": most.attack,
                "hits": _rate(most.named_in, most.members),
                "false alarms": _rate(most.named_out, most.others),
                "seconds": most.seconds,
            }
        )
        notes.append(f"{name}: {statement_line(most.statement)}.")
    example = groups[0][1][0]
    about = {"canaries": example.members + example.others, "confidence": CONFIDENCE, "delta": example.statement["delta"], "repeats": len(groups[0][1])}
    return Found("audit", f"Epsilon from below, by {about['canaries']:,} canaries through the shipped rounds", rows, notes, about)


def _rate(named: int, of: int) -> Figure:
    each_side = (1 + CONFIDENCE) / 2
    return Figure(named / of, bounds.at_least(named, of, each_side), bounds.at_most(named, of, each_side))
