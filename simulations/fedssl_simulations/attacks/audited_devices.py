"""Canaries on devices that add their own noise: whole users who send one upload a round, or the training windows of one device.

Whoever receives an upload is the attacker, so what is played is a device: `client_round` with its key and its ledger of uploads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedssl.checking import check
from fedssl.client_round import Shard, client_round
from fedssl.config import RunConfig
from fedssl.parts import make_parts
from fedssl.privacy.accounting import epsilon
from fedssl.privacy.manifest import declared_sums
from fedssl.privacy.plan import Plan, make_plan
from fedssl.privacy.uploads import Device, UploadLedger
from fedssl.recipe import Recipe, make_recipe
from fedssl.records import Address, Download
from fedssl.server_round import first_state
from fedssl.weights import ITEMS, to_numpy
from fedssl_simulations.attacks.audited_training import sampled_guesses
from fedssl_simulations.attacks.canaries import WINDOW, opposite_histories, window_histories
from fedssl_simulations.attacks.scenarios import CLIP_NORM, PARTS, Asked, Floats, Guess, Scenario, Seen


def see_users(scenario: Scenario, asked: Asked) -> Seen:
    """Every canary is a device of its own that met one of two items, by the auditor's coin, which move one coordinate in opposite directions.

    The attacker sees each upload alone. A device has a run of its own, because here all of them share a key and a ledger.
    """
    met_first_N = asked.coins()
    plan, recipe = _plan(scenario, asked, task="opposite_task", users=asked.canaries, items=2)
    shard = Shard(opposite_histories(met_first_N), np.arange(asked.canaries), device=_device(asked))
    asker = _Asker(recipe, shard)
    total_N = np.array([sum(asker.ask(user, round)[0] for round in range(1, scenario.releases + 1)) for user in range(asked.canaries)])
    ledger = shard.own().ledger
    assert set(ledger.uploads().values()) == {scenario.releases}
    return Seen(ledger.spent(0, asked.delta), plan.statement(), met_first_N, np.ones(asked.canaries, dtype=np.bool_), [Guess("sum", total_N, 0.0)])


def see_windows(scenario: Scenario, asked: Asked) -> Seen:
    """Every canary is a window of one device, there or not by the auditor's coin. The attacker sees all uploads of the device."""
    is_there_N = asked.coins()
    plan, recipe = _plan(scenario, asked, task="canary_task", users=1, items=asked.canaries)
    shard = Shard(window_histories(np.flatnonzero(is_there_N)), np.zeros(1, dtype=np.int64), device=_device(asked))
    asker = _Asker(recipe, shard)
    released_TN = np.stack([asker.ask(0, round) for round in range(1, scenario.releases + 1)])
    z = plan.phase("training").noise_multiplier
    if scenario.rate == 1:
        guesses = [Guess("sum", released_TN.sum(0), scenario.releases / 2)]
    else:
        guesses = sampled_guesses(scenario.rate, released_TN, z, int((~is_there_N).sum()))
    claimed = epsilon(shard.own().ledger.window_events(0), asked.delta)
    return Seen(claimed, plan.statement(), is_there_N, np.ones(asked.canaries, dtype=np.bool_), guesses)


def _plan(scenario: Scenario, asked: Asked, *, task: str, users: int, items: int) -> tuple[Plan, Recipe]:
    """One local step an upload, so that an upload is the noised sum itself."""
    values: dict[str, Any] = {
        "encoder": {"name": f"{PARTS}:canary_encoder", "width": 1, "heads": 1, "window": WINDOW},
        "task": [{"name": f"{PARTS}:{task}"}],
        "local": {"lr": 1.0, "steps": 1},
        "server": {"rounds": scenario.releases, "cohort": users, "sampling": "passes"},
        "privacy": {"clip_norm": CLIP_NORM, "epsilon": scenario.epsilon, "delta": asked.delta, "window_rate": scenario.rate, **scenario.privacy},
    }
    config = check(RunConfig, values, where="audit")
    plan = make_plan(config.privacy, config.server, None, users, local=config.local)
    assert plan is not None
    return plan, make_recipe(config, num_items=items, catalogue="canaries", privacy=plan.told_to_nodes(config.privacy))


def _device(asked: Asked) -> Device:
    key = asked.own_keys().noise
    return Device(key, UploadLedger(asked.folder / "uploads.sqlite", key, may_be_new=True))


class _Asker:
    """Whoever asks the devices, and sees what each sends."""

    def __init__(self, recipe: Recipe, shard: Shard):
        layout = make_parts(recipe).layout
        self._recipe, self._shard, self._weights = recipe, shard, to_numpy(first_state(recipe).weights(recipe))
        self._step = declared_sums(recipe, "training", num_weights=layout.num_weights)["update"].step
        self._items = layout.slice_of(ITEMS)

    def ask(self, user: int, round: int) -> Floats:
        """What a device sends of the items' coordinates, in clip norms. Shape: (I,)."""
        address = Address(f"audit {user}", "training", round)
        update = client_round(Download(address, self._recipe, self._weights, np.array([user])), self._shard).sums["update"]
        assert isinstance(update, np.ndarray)
        return update[self._items][1:].astype(np.float64) * (self._step / CLIP_NORM)
