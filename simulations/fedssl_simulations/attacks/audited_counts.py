"""Canaries through the counts that are released under a plan: each is one pair of items, so its counts are one cell of the matrix.

The attacker sees the noised transitions, from which everything else that is kept of them is made.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from fedssl_server.rounds import Run as ServerRun
from fedssl_server.rounds import owners, run_rounds
from numpy.typing import NDArray

from fedssl.checking import check
from fedssl.client_round import Shard
from fedssl.config import RunConfig
from fedssl.denoise import denoise
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.plan import make_plan
from fedssl.recipe import make_recipe
from fedssl.server_round import first_state
from fedssl_simulations.attacks.canaries import pair_histories
from fedssl_simulations.attacks.scenarios import Asked, Guess, Scenario, Seen, replaced
from fedssl_simulations.grids import InProcessGrid, handler_of

COUNTS_CLIP = 0.5
"""Half of what a canary's only pair counts, so that the clip shortens it."""


def see_counts(scenario: Scenario, asked: Asked) -> Seen:
    """Play both phases of counting with a square number of canaries, as many as fit."""
    items = math.isqrt(asked.canaries)
    asked = asked._replace(canaries=items**2)
    config = check(
        RunConfig,
        {
            "encoder": {"width": 8, "heads": 1, "blocks": 1, "hidden": 8, "window": 2},
            "counts": {"lags": 1, "clip_norm": COUNTS_CLIP, "items": items},
            "server": {"rounds": 0, "cohort": 1, "sampling": "poisson"},
            "privacy": {"clip_norm": 1.0, "epsilon": scenario.epsilon, "delta": asked.delta, **scenario.privacy},
        },
        where="audit",
    )
    plan = make_plan(config.privacy, config.server, config.counts, asked.canaries)
    assert plan is not None
    recipe = make_recipe(config, num_items=items, catalogue="canaries")
    took_part_N = asked.coins()
    members = np.flatnonzero(took_part_N)
    node_ids, owner_U = owners({1: members}, asked.canaries)
    run = ServerRun("audit", recipe, asked.canaries, node_ids, owner_U, plan, asked.own_keys(), Ledger(asked.folder / "ledger.jsonl"))
    shard = Shard(pair_histories(members, items), members)
    released: list[NDArray[np.float32]] = []

    def listen(noised: NDArray[np.float32], *others: Any, **named: Any) -> Any:
        released.append(noised.copy())
        return denoise(noised, *others, **named)

    with replaced("fedssl.server_round:denoise", listen), InProcessGrid(handler_of({0: shard}), {1: {"partition-id": 0}}) as grid:
        state = run_rounds(grid, run, first_state(recipe), on_round=lambda state, facts: None)
    (noised,) = released
    guess = Guess("cell", noised.reshape(-1).astype(np.float64) / COUNTS_CLIP, 0.5)
    return Seen(plan.epsilon(state.charged), plan.statement(), took_part_N, np.ones(asked.canaries, dtype=np.bool_), [guess])
