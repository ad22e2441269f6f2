"""The person's policy: consent off by default, and every reason said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from fedssl_client.policy import Allow, Consent, OutsidePolicy, Policy, check_policy, least_upload_bytes, promised_epsilon, read_policy, refusals

from fedssl.config import RunConfig
from fedssl.errors import ConfigError
from fedssl.privacy import accounting
from fedssl.recipe import Recipe, make_recipe

PLAN = {"clip_norm": 1.0, "epsilon": 2.0}


def recipe_of(**sections: Any) -> Recipe:
    values = {"privacy": PLAN, "server": {"sampling": "poisson"}, **sections}
    return make_recipe(RunConfig.model_validate(values), num_items=100, catalogue="")


def policy_of(**allow: Any) -> Policy:
    return Policy(consent=Consent(train=True), allow=Allow(servers=("home",), **allow))


def test_nothing_is_allowed_until_the_person_says_so():
    assert refusals(Policy(), recipe_of(), "home") == [
        "the person has not agreed to training ([consent] train)",
        "server 'home' is not one of [allow] servers",
    ]


def test_a_recipe_inside_the_policy_is_followed():
    assert refusals(policy_of(), recipe_of(), "home") == []
    check_policy(policy_of(), recipe_of(), "home")


@pytest.mark.parametrize(
    ("allow", "sections", "reason"),
    [
        ({"tasks": ("masked-item",)}, {}, "task 'next-item' is not one of [allow] tasks"),
        ({}, {"server": {"optimizer": "os:system", "sampling": "poisson"}}, "'os:system' is no part of fedssl, nor one of [allow] parts"),
        ({}, {"encoder": {"name": "os:system"}}, "'os:system' is no part of fedssl, nor one of [allow] parts"),
        ({"most_steps": 2}, {"local": {"steps": 3}}, "3 local steps, and [allow] most_steps is 2"),
        ({"most_bytes": 1000}, {}, "an upload of 25856 bytes or more, and [allow] most_bytes is 1000"),
        ({}, {"privacy": {**PLAN, "fleet_users": 10}}, "its noise is that of a larger fleet and too little for this one; only a simulation may ask that"),
        ({"least_noise": 1.0}, {}, "noise that the recipe does not say, and [allow] least_noise is 1"),
        ({"least_noise": 9.0, "most_epsilon": 99}, {"privacy": {"clip_norm": 1.0, "noise_multiplier": 8.0}}, "noise 8, and [allow] least_noise is 9"),
        (
            {},
            {"privacy": {**PLAN, "mode": "window"}, "server": {"sampling": "passes"}},
            "its plan protects single training windows, and [allow] window_plans is false",
        ),
        ({}, {"privacy": {**PLAN, "delta": 0.001}}, "delta 0.001, and [allow] most_delta is 0.0001"),
        ({"most_epsilon": 1.5}, {}, "epsilon 2, and [allow] most_epsilon is 1.5"),
        ({}, {"privacy": {}}, "no privacy plan, and [allow] most_epsilon is 8"),
    ],
)
def test_what_is_outside_is_refused_with_the_reason(allow: dict[str, Any], sections: dict[str, Any], reason: str):
    assert refusals(policy_of(**allow), recipe_of(**sections), "home") == [reason]
    with pytest.raises(OutsidePolicy) as refused:
        check_policy(policy_of(**allow), recipe_of(**sections), "home")
    assert str(refused.value) == f"this device's policy refuses the recipe: {reason}"


def test_runs_that_were_joined_before_are_counted():
    assert refusals(policy_of(), recipe_of(), "home", spent=6.0) == []
    assert refusals(policy_of(), recipe_of(), "home", spent=6.5) == ["epsilon 2 beside 6.5 of runs before, and [allow] most_epsilon is 8"]


def test_a_person_may_join_a_run_without_a_plan_by_saying_inf(tmp_path: Path):
    (tmp_path / "device.toml").write_text('[consent]\ntrain = true\n[allow]\nservers = ["home"]\nmost_epsilon = inf\n')
    assert refusals(read_policy(tmp_path), recipe_of(privacy={}), "home") == []


def test_noise_without_an_epsilon_is_accounted_as_if_asked_every_round():
    counts = {"clip_norm": 1.0}
    privacy = {"clip_norm": 1.0, "noise_multiplier": 4.0, "counts_noise_multiplier": 2.0}
    recipe = recipe_of(privacy=privacy, counts=counts, server={"rounds": 8, "sampling": "poisson"})
    # 8 / 16 + 1 / 4 = 3 / 4
    assert promised_epsilon(recipe) == pytest.approx(accounting.gaussian_epsilon(math.sqrt(4 / 3), 1, 1e-6))
    assert least_upload_bytes(recipe) == max(4 * 101 * 64, 4 * 100 * 100)


def test_a_policy_that_is_missing_or_has_a_key_nobody_knows_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="is missing, so nothing is allowed"):
        read_policy(tmp_path)
    (tmp_path / "device.toml").write_text("[consent]\ntrian = true\n")
    with pytest.raises(ConfigError, match=r"\[consent\] has no key 'trian'; did you mean 'train'"):
        read_policy(tmp_path)
    (tmp_path / "device.toml").write_text("[consent\n")
    with pytest.raises(ConfigError, match="not TOML"):
        read_policy(tmp_path)
