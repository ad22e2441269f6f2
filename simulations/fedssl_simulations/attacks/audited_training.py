"""Canaries through training rounds under a central plan: clip, secret cohorts, noise, mean, attempts; with a fixed clip or one that follows the norms.

Canaries are orthogonal and noise is independent between coordinates, so one run gives as many independent trials as there are
canaries (Steinke et al. 2023, https://arxiv.org/abs/2305.08846, have bounds for runs where it is not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from fedssl_server.rounds import RoundFacts, owners, run_rounds
from fedssl_server.rounds import Run as ServerRun
from scipy.stats import norm

from fedssl.checking import check
from fedssl.client_round import Shard
from fedssl.config import RunConfig
from fedssl.privacy.keys import cohort_by_coins
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.plan import Plan, make_plan
from fedssl.recipe import make_recipe
from fedssl.server_round import State, first_state
from fedssl.weights import ITEMS
from fedssl_simulations.attacks.canaries import WINDOW, canary_histories
from fedssl_simulations.attacks.scenarios import CLIP_NORM, PARTS, Asked, Bools, Floats, Guess, Scenario, Seen
from fedssl_simulations.grids import InProcessGrid, handler_of

_UNRELIABLE = 4
"""One canary of so many is not asked about, and is offline every second time that a round is played again, so that its totals are others."""


def see_training(scenario: Scenario, asked: Asked) -> Seen:
    """Play the rounds; the attacker sees every released model."""
    config = config_of(scenario, asked.canaries, asked.delta)
    plan = make_plan(config.privacy, config.server, config.counts, asked.canaries)
    assert plan is not None
    took_part_N = asked.coins()
    released_TN, state = _releases(scenario, config, plan, asked, took_part_N)
    is_judged_N = np.arange(asked.canaries) % _UNRELIABLE != 0 if scenario.falls_back else np.ones(asked.canaries, dtype=np.bool_)
    z = plan.phase("training").noise_multiplier
    guesses = _guesses(scenario, config, released_TN, z, int((~took_part_N & is_judged_N).sum()))
    return Seen(plan.epsilon(state.charged), plan.statement(), took_part_N, is_judged_N, guesses)


def config_of(scenario: Scenario, canaries: int, delta: float) -> RunConfig:
    """A run whose released weights are the sum of all that was released: plain SGD on the server with a step of 1."""
    values = {
        "encoder": {"name": f"{PARTS}:canary_encoder", "width": 1, "heads": 1, "window": WINDOW},
        "task": [{"name": f"{PARTS}:canary_task"}],
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
        "privacy": {"clip_norm": CLIP_NORM, "epsilon": scenario.epsilon, "delta": delta, **scenario.privacy},
    }
    return check(RunConfig, values, where="audit")


def _releases(scenario: Scenario, config: RunConfig, plan: Plan, asked: Asked, took_part_N: Bools) -> tuple[Floats, State]:
    """What was released of each canary's coordinate, in the round's clip norms on the sum, a row a release; and the last state."""
    members = np.flatnonzero(took_part_N)
    recipe = make_recipe(config, num_items=len(took_part_N), catalogue="canaries")
    shard = Shard(canary_histories(members), members, users_per_chunk=4096)
    node_ids, owner_U = owners({1: members}, len(took_part_N))
    run = ServerRun("audit", recipe, len(took_part_N), node_ids, owner_U, plan, asked.own_keys(), Ledger(asked.folder / "ledger.jsonl"))
    is_unreliable_U = np.arange(len(took_part_N)) % _UNRELIABLE == 0
    fewer = replace(run, owner_U=np.where(is_unreliable_U, -1, owner_U).astype(np.int32))
    released: list[Floats] = []

    def items_of(state: State) -> Floats:
        return state.released(recipe)[ITEMS][1:, 0].double().numpy()

    before = start = first_state(recipe)

    def on_round(state: State, facts: RoundFacts) -> None:
        nonlocal before
        clip_norm = CLIP_NORM if facts.clip_norm is None else facts.clip_norm
        released.append((items_of(state) - items_of(before)) * plan.expected_cohort("training") / clip_norm)
        before = state

    with InProcessGrid(handler_of({0: shard}), {1: {"partition-id": 0}}) as grid:
        if not scenario.falls_back:
            state = run_rounds(grid, run, start, on_round=on_round)
            return np.stack(released), state
        for number in range(scenario.releases):
            before = start
            state = run_rounds(grid, fewer if number % 2 else run, start, on_round=on_round, should_stop=lambda: len(released) > number)  # noqa: B023
    return np.stack(released), state


def _guesses(scenario: Scenario, config: RunConfig, released_TN: Floats, z: float, others: int) -> Sequence[Guess]:
    """Attacks by what is looked at.

    - sum: what was released of a canary, added up. Where all take part, half of what a member adds; else so high that five of those who did
      not take part are expected there: a member who took part far more often than chance allows stands out.
    - likelihood: the log likelihood ratio of "a member, by secret coins", the best there is where nothing is wrong.
    - seed's cohort: the same of "a member, in just the releases for which the PUBLIC seed would choose it".
    """
    T = len(released_TN)
    total_N = released_TN.sum(0)
    if scenario.rate == 1:
        return [Guess("sum", total_N, T / 2)]
    rounds = [1] * T if scenario.falls_back else range(1, T + 1)
    guess_TN = np.zeros(released_TN.shape, dtype=np.bool_)
    for place, number in enumerate(rounds):
        guess_TN[place, cohort_by_coins(config.seed, scenario.rate, released_TN.shape[1], number, "training")] = True
    # Log of how much likelier a release is with the canary in it than without.
    ratio_TN = (released_TN - 0.5) / z**2
    return [*sampled_guesses(scenario.rate, released_TN, z, others), Guess("seed's cohort", (ratio_TN * guess_TN).sum(0), 3.5)]


def sampled_guesses(rate: float, released_TN: Floats, z: float, others: int) -> list[Guess]:
    """The first two, of releases in each of which a canary takes part with chance ``rate`` and adds 1 under noise of deviation ``z``."""
    ratio_TN = (released_TN - 0.5) / z**2
    return [
        Guess("sum", released_TN.sum(0), float(z * len(released_TN) ** 0.5 * norm.ppf(1 - 5 / others))),
        Guess("likelihood", np.log1p(rate * np.expm1(ratio_TN)).sum(0), 1.0),
    ]
