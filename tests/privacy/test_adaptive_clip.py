"""The clip walks to a quantile of the users' norms; its bits are one more declared sum, noised and accounted with the update."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedssl_simulations.run import simulate
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from oracles.gaussian_privacy import gaussian_epsilon
from small import KEYS, PLAN, deal, learned, recipe_of, small_config, small_dataset, train

from fedssl import wire
from fedssl.checking import check
from fedssl.client_round import client_round
from fedssl.config import PrivacyConfig, ServerConfig
from fedssl.errors import AllUploadsRefused, ConfigError
from fedssl.privacy.adaptive_clip import LARGEST_CLIP, SMALLEST_CLIP, WITHIN, WITHIN_STEP, next_clip
from fedssl.privacy.grid import grid_step
from fedssl.privacy.keys import draw_cohort
from fedssl.privacy.noise import gaussian_steps
from fedssl.privacy.plan import Plan, make_plan
from fedssl.records import Address, Download
from fedssl.round_lines import read_lines
from fedssl.server_round import State, first_state
from fedssl.weights import to_numpy

ADAPTIVE: dict[str, Any] = {"privacy": {"clip_norm": 0.5, "clip": "adaptive", "clip_quantile": 0.7, "clip_rate": 0.3}}
ROUNDS: dict[str, Any] = {"server": {"rounds": 5, "cohort": 12}}
PRIVATE = small_config(PLAN, ADAPTIVE, ROUNDS)
PLAIN = small_config(ADAPTIVE, ROUNDS)


def plan_of(privacy: PrivacyConfig, users: int = 1000) -> Plan:
    plan = make_plan(privacy, ServerConfig(rounds=20, cohort=50, sampling="poisson"), None, users)
    assert plan is not None
    return plan


def states_of(config: Any, folder: Path | None = None, **changes: Any) -> list[State]:
    states = [first_state(recipe_of(config, small_dataset()))]
    train(config, small_dataset(), folder=folder, on_round=lambda state, facts: states.append(state), **changes)
    return states


# ---- the rule ----


def test_the_clip_is_multiplied_by_the_papers_factor():
    # 30 of 40 users were within: b = 3/4; exp(-0.2 * (0.75 - 0.5)).
    assert next_clip(2.0, 30 * 0.5 - 10 * 0.5, 40, quantile=0.5, rate=0.2) == pytest.approx(2.0 * math.exp(-0.05), rel=1e-15)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_it_walks_to_the_quantile_of_the_norms(quantile: float):
    norms, clip = np.random.default_rng(1).lognormal(1.0, 0.7, 4001), 0.01
    for _ in range(400):
        clip = next_clip(clip, float(np.where(norms <= clip, 0.5, -0.5).sum()), len(norms), quantile=quantile, rate=0.3)
    assert clip == pytest.approx(np.quantile(norms, quantile), rel=0.02)


@given(st.floats(SMALLEST_CLIP, LARGEST_CLIP), st.floats(-1e9, 1e9), st.floats(1e-3, 1e6), st.floats(0.01, 0.99), st.floats(1e-3, 10))
def test_whatever_the_noise_says_there_is_a_grid_for_the_next_clip(clip: float, within: float, users: float, quantile: float, rate: float):
    found = next_clip(clip, within, users, quantile=quantile, rate=rate)
    assert SMALLEST_CLIP <= found <= LARGEST_CLIP
    step = grid_step(found)
    assert math.frexp(step)[0] == 0.5 and found / step <= 2**24


# ---- the plan ----


def test_update_and_bits_are_accounted_together_as_one_gaussian():
    plan = plan_of(PrivacyConfig(clip_norm=1.5, clip="adaptive", clip_share=0.1, noise_multiplier=2.0, delta=1e-5))
    update, bits = plan.phase("training").sums
    assert (update.name, update.clip_norm, update.noise_multiplier) == ("update", 1.5, 2.0)
    assert (bits.name, bits.clip_norm) == (WITHIN, 0.5)
    assert bits.noise_multiplier == pytest.approx(2.0 * (0.9 / 0.1) ** 0.5, rel=1e-4)
    assert plan.phase("training").noise_multiplier == pytest.approx((1 / 2.0**2 + 1 / bits.noise_multiplier**2) ** -0.5)
    fixed = plan_of(PrivacyConfig(clip_norm=1.5, noise_multiplier=2.0, delta=1e-5))
    assert plan.promised > fixed.promised


def test_a_target_is_kept_by_both_together_and_the_bits_take_their_share():
    given_ = {"clip_norm": 1.0, "epsilon": 2.0, "delta": 1e-5}
    plan, fixed = plan_of(PrivacyConfig(**given_, clip="adaptive", clip_share=0.04)), plan_of(PrivacyConfig(**given_))
    update, bits = plan.phase("training").sums
    assert 2.0 * 0.998 < plan.epsilon({"training": 20}) <= 2.0
    assert (1 / bits.noise_multiplier**2) / (1 / bits.noise_multiplier**2 + 1 / update.noise_multiplier**2) == pytest.approx(0.04, rel=1e-3)
    assert update.noise_multiplier == pytest.approx(fixed.phase("training").sums[0].noise_multiplier / 0.96**0.5, rel=1e-4)


def test_without_sampling_its_epsilon_is_the_closed_form_of_the_joint_gaussian():
    privacy = PrivacyConfig(clip_norm=1.0, clip="adaptive", clip_share=0.2, noise_multiplier=30.0, delta=1e-5)
    plan = make_plan(privacy, ServerConfig(rounds=20, cohort=50, sampling="poisson"), None, 50)
    assert plan is not None
    exact = gaussian_epsilon(30.0 * 0.8**0.5, 20, 1e-5)
    assert -1e-9 < plan.promised - exact < 1e-3


def test_noise_follows_the_rounds_clip():
    plan = plan_of(PrivacyConfig(clip_norm=1.0, clip="adaptive", noise_multiplier=2.0))
    assert plan.noise_std_in_steps("training", "update", clip_norm=0.3) == 2.0 * 0.3 / grid_step(0.3)
    assert plan.noise_std_in_steps("training", "update") == 2.0 * 2**24
    assert plan.noise_std_in_steps("training", WITHIN) == plan.sum("training", WITHIN).noise_multiplier * 0.5 / WITHIN_STEP


def test_a_fixed_clip_has_the_plan_it_always_had():
    assert [one.name for one in plan_of(PrivacyConfig(clip_norm=1.0, noise_multiplier=2.0)).phase("training").sums] == ["update"]


def test_an_adaptive_clip_needs_one_to_begin_with():
    with pytest.raises(ConfigError, match="needs a clip for the first round"):
        check(PrivacyConfig, {"clip": "adaptive"}, where="run.toml")


# ---- rounds ----


def ask(config: Any, state: State, users: np.ndarray[Any, Any], clip_norm: float | None) -> Download:
    recipe = recipe_of(config, small_dataset())
    return Download(Address("any", "training", 1), recipe, to_numpy(state.weights(recipe)), users, clip_norm=clip_norm)


@pytest.mark.parametrize("config", [PLAIN, PRIVATE], ids=["without a plan", "under a plan"])
def test_each_user_says_one_bit_and_no_update_leaves_longer_than_the_rounds_clip(config: Any):
    shard = deal(config, small_dataset(), [np.arange(24)])[1]
    state = first_state(recipe_of(config, small_dataset()))
    upload = client_round(ask(config, state, np.arange(24), 0.5), shard)
    norms = np.sort(shard.notes.norms_U)
    clip = float((norms[9] + norms[10]) / 2)
    sums = client_round(ask(config, state, np.arange(24), clip), shard).sums
    assert sums[WITHIN].tolist() == [(10 - 14) * 2**24]
    assert (WITHIN in upload.sums) and ("loss" in upload.sums) == (config is PLAIN)
    for user in range(24):
        one = client_round(ask(config, state, np.array([user]), clip), shard).sums
        length = float(np.linalg.norm(np.asarray(one["update"], dtype=np.float64))) * grid_step(clip)
        assert length <= clip
        assert one[WITHIN].tolist() == [2**24 if shard.notes.norms_U[0] <= clip else -(2**24)]


def test_the_clip_follows_the_noised_bits_and_the_released_sum_has_noise_of_the_rounds_clip(tmp_path: Path):
    states = states_of(PRIVATE, tmp_path)
    plan = make_plan(PRIVATE.privacy, PRIVATE.server, None, 24)
    assert plan is not None
    shard = deal(PRIVATE, small_dataset(), [np.arange(24)])[1]
    recipe = recipe_of(PRIVATE, small_dataset())
    for number in range(1, 6):
        before, after = states[number - 1], states[number]
        assert before.clip_norm is not None
        cohort = draw_cohort(KEYS.cohort, "training", number, 0, 24, 0.5)
        download = Download(Address("any", "training", number), recipe, to_numpy(before.weights(recipe)), cohort, clip_norm=before.clip_norm)
        sums = client_round(download, shard).sums
        std = plan.noise_std_in_steps("training", WITHIN)
        noise = gaussian_steps(KEYS.noise, phase="training", round=number, attempt=0, name=WITHIN, count=1, std_in_steps=std)
        within = int(np.asarray(sums[WITHIN])[0] + noise[0]) * WITHIN_STEP
        assert after.clip_norm == next_clip(before.clip_norm, within, 12, quantile=0.7, rate=0.3)
    assert len({state.clip_norm for state in states}) == 6


def test_without_noise_it_comes_to_where_the_quantile_of_users_is_within():
    config = small_config(PLAIN.model_dump(), {"server": {"rounds": 60, "cohort": 24}, "local": {"lr": 0.01}, "privacy": {"clip_norm": 1e-3}})
    states = states_of(config)
    shard = deal(config, small_dataset(), [np.arange(24)])[1]
    client_round(ask(config, states[-1], np.arange(24), states[-1].clip_norm), shard)
    assert states[-1].clip_norm is not None
    assert 0.55 < (shard.notes.norms_U <= states[-1].clip_norm).mean() < 0.85


@pytest.mark.parametrize("config", [PLAIN, PRIVATE], ids=["without a plan", "under a plan"])
def test_one_user_nodes_reach_the_bytes_of_one_node(config: Any, tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    alone = config.model_copy(update={"system": config.system.model_copy(update={"users_per_chunk": 1})})
    one, many = states_of(alone, tmp_path / "one"), states_of(alone, tmp_path / "many", shards=24)
    assert [state.clip_norm for state in one] == [state.clip_norm for state in many]
    assert torch.equal(one[-1].weights_P, many[-1].weights_P)


def test_more_bits_than_users_were_asked_are_refused():
    def tamper(handler: Any) -> Any:
        def handle(message: Message, context: Any) -> Message:
            upload = wire.upload_from_record_dict(handler(message, context).content)
            return Message(wire.to_record_dict(replace(upload, sums={**upload.sums, WITHIN: np.array([13 * 2**24])})), reply_to=message)

        return handle

    with pytest.raises(AllUploadsRefused, match=WITHIN):
        states_of(PLAIN, tamper=tamper)


def test_a_download_whose_clip_contradicts_its_recipe_is_refused():
    state = first_state(recipe_of(PLAIN, small_dataset()))
    shard = deal(PLAIN, small_dataset(), [np.arange(24)])[1]
    with pytest.raises(ConfigError, match="contradict"):
        client_round(ask(PLAIN, state, np.arange(3), None), shard)
    fixed = small_config(PLAN, ROUNDS)
    with pytest.raises(ConfigError, match="contradict"):
        client_round(ask(fixed, first_state(recipe_of(fixed, small_dataset())), np.arange(3), 0.5), deal(fixed, small_dataset(), [np.arange(24)])[1])


# ---- whole runs ----


@pytest.mark.parametrize("parts", [{}, PLAN], ids=["without a plan", "under a plan"])
def test_stopped_and_resumed_a_run_ends_with_the_same_bytes_and_clips(parts: dict[str, Any], tmp_path: Path):
    config = small_config(parts, ADAPTIVE, ROUNDS, {"system": {"checkpoint_every": 2}})
    keys = KEYS if config.privacy.has_plan else None
    simulate(config, out=tmp_path / "whole", dataset=small_dataset(), keys=keys)
    asked = iter([False, False, False, True])
    simulate(config, out=tmp_path / "cut", dataset=small_dataset(), keys=keys, should_stop=lambda: next(asked))
    simulate(resume=tmp_path / "cut", dataset=small_dataset(), keys=keys)
    assert learned(tmp_path / "whole") == learned(tmp_path / "cut")
    clips = [[line["clip_norm"] for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")]
    assert clips[0] == clips[1] and clips[0][0] == 0.5 and len(set(clips[0])) == 5


def test_report_and_page_show_the_clip_over_the_rounds(tmp_path: Path):
    from fedssl_simulations.report import write_report

    run = simulate(small_config(PLAN, ADAPTIVE, ROUNDS), out=tmp_path / "run", dataset=small_dataset(), keys=KEYS)
    write_report([run.folder], tmp_path / "page.html", public=True)
    page = (tmp_path / "page.html").read_text()
    assert "Adaptive clip" in page
    stated = json.loads((run.folder / "report.json").read_text())["privacy"]
    assert stated["noise_multiplier"].keys() == {"update", WITHIN}
    assert "follows the 0.7 quantile" in stated["clip_rule"] and "follows the 0.7 quantile" in page
