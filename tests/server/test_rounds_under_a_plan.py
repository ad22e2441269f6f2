"""The promise kept by the loop: noise in whole steps once a round, charged before anything is drawn, over a fixed denominator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from numpy.typing import NDArray
from small import KEYS, PLAN, deal, recipe_of, small_config, small_dataset, train

from fedssl.client_round import client_round
from fedssl.config import RunConfig
from fedssl.counts import dense, sum_items, sum_transitions
from fedssl.denoise import denoise
from fedssl.errors import BudgetSpent, ConfigError
from fedssl.lift import LiftTable
from fedssl.privacy import accounting
from fedssl.privacy.grid import grid_step
from fedssl.privacy.keys import draw_cohort
from fedssl.privacy.ledger import Ledger, begin_attempt, hmac_of_totals
from fedssl.privacy.noise import gaussian_steps
from fedssl.privacy.plan import Plan, make_plan
from fedssl.records import Address, Download
from fedssl.server_round import ROWS_AT_ONCE, Release, State, finish_counts, first_state
from fedssl.weights import ITEMS, to_numpy

# The optimiser's memory is then the released mean itself. A cohort of a power of two keeps it exact in float32.
PLAIN: dict[str, Any] = {"server": {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "schedule": "constant", "rounds": 4, "cohort": 8}}
CONFIG = small_config(PLAN, PLAIN, {"system": {"users_per_chunk": 1}})
STEP = grid_step(0.5)
RATE = 8 / 24


def plan_of(config: RunConfig, users: int = 24) -> Plan:
    plan = make_plan(config.privacy, config.server, config.counts, users)
    assert plan is not None
    return plan


def true_total(config: RunConfig, before: State, round: int, attempt: int = 0) -> NDArray[np.int64]:
    """The cohort's sum without noise, from one call of the client's round."""
    recipe = recipe_of(config, small_dataset())
    cohort = draw_cohort(KEYS.cohort, "training", round, attempt, 24, config.server.cohort / 24)
    if not len(cohort):
        return np.zeros(before.weights_P.numel(), dtype=np.int64)
    download = Download(Address("any", "training", round, attempt), recipe, to_numpy(before.weights(recipe)), cohort)
    total = client_round(download, deal(config, small_dataset(), [np.arange(24)])[1]).sums["update"]
    assert isinstance(total, np.ndarray)
    return total.astype(np.int64)


def released(config: RunConfig, state: State) -> NDArray[np.float64]:
    """The released sum in whole steps, read back from the mean."""
    return state.memory["velocity"].double().numpy() * config.server.cohort / STEP


def is_noised(config: RunConfig) -> NDArray[np.bool_]:
    """All coordinates but those of the padding row."""
    recipe = recipe_of(config, small_dataset())
    state = first_state(recipe)
    padding = {name: torch.zeros_like(leaf, dtype=torch.bool) for name, leaf in state.weights(recipe).items()}
    padding[ITEMS][0] = True
    from fedssl.parts import make_parts
    from fedssl.weights import flatten

    return ~flatten(padding, make_parts(recipe).layout).numpy()


def trained(config: RunConfig, folder: Path, **changes: Any) -> tuple[list[State], list[Any]]:
    states = [first_state(recipe_of(config, small_dataset()))]
    _, facts = train(config, small_dataset(), folder=folder, on_round=lambda state, facts: states.append(state), **changes)
    return states, facts


def test_what_is_released_is_the_true_sum_and_one_draw_of_noise_in_whole_steps(tmp_path: Path):
    # So little noise that sums and noise stay below 2^24 steps, where float32 holds whole numbers.
    config = small_config(PLAN, PLAIN, {"system": {"users_per_chunk": 1}, "privacy": {"noise_multiplier": 0.01}, "local": {"lr": 0.001}})
    states, facts = trained(config, tmp_path)
    std = plan_of(config).noise_std_in_steps("training", "update")
    assert std == 0.01 * 0.5 / STEP
    where = is_noised(config)
    for number in (1, 2, 3, 4):
        noise = gaussian_steps(KEYS.noise, phase="training", round=number, attempt=0, name="update", count=where.size, std_in_steps=std)
        total = true_total(config, states[number - 1], number)
        assert np.abs(total + noise).max() < 2**24
        assert np.array_equal(released(config, states[number])[where], (total + noise)[where])
        assert total.any()
    assert len({fact.users for fact in facts}) > 1, "the denominator was fixed while cohorts differed"


def test_the_padding_row_is_not_moved_by_noise(tmp_path: Path):
    recipe = recipe_of(CONFIG, small_dataset())
    states, _ = trained(CONFIG, tmp_path)
    assert not states[-1].weights(recipe)[ITEMS][0].any()


@pytest.mark.parametrize("shards", [2, 5])
def test_noise_is_added_once_a_round_however_many_nodes_there_are(shards: int, tmp_path: Path):
    one, _ = trained(CONFIG, tmp_path / "one")
    many, _ = trained(CONFIG, tmp_path / "many", shards=shards)
    assert torch.equal(one[-1].weights_P, many[-1].weights_P)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for name in ("one", "many"):
        (tmp_path / name).mkdir()


def test_the_reported_epsilon_is_that_of_the_noise_that_was_added(tmp_path: Path):
    config = small_config(PLAN, PLAIN, {"encoder": {"width": 16, "hidden": 32}, "system": {"users_per_chunk": 1}})
    states, _ = trained(config, tmp_path)
    where = is_noised(config)
    noise = [released(config, states[number])[where] - true_total(config, states[number - 1], number)[where] for number in (1, 2, 3, 4)]
    added = np.concatenate(noise) * STEP / 0.5
    # Five standard errors of a deviation; the keys are fixed, so this passes always or never.
    error = 5 / np.sqrt(2 * added.size)
    assert error < 0.06
    measured = float(added.std())
    assert measured == pytest.approx(1.0, abs=error)
    assert abs(added.mean()) < 5 / np.sqrt(added.size)
    # Rounds share no noise, and coordinates of a round share none.
    for left, right in ((noise[0], noise[1]), (noise[2], noise[3]), (noise[0][:-1], noise[0][1:])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(left.size)
    reported = plan_of(config).epsilon(states[-1].charged)
    assert states[-1].charged == {"training": 4}
    below, above = (accounting.epsilon([(RATE, z, 4)], 1e-3) for z in (measured + error, measured - error))
    assert below < reported < above
    assert reported == pytest.approx(accounting.epsilon([(RATE, 1.0, 4)], 1e-3))


def test_an_empty_cohort_is_a_round_of_noise_alone_and_is_charged(tmp_path: Path):
    config = small_config(PLAN, PLAIN, {"server": {"cohort": 2.0**-20, "rounds": 2}})
    states, facts = trained(config, tmp_path)
    assert [fact.users for fact in facts] == [0, 0]
    assert states[-1].charged == {"training": 2}
    where = is_noised(config)
    std = plan_of(config).noise_std_in_steps("training", "update")
    for number in (1, 2):
        noise = gaussian_steps(KEYS.noise, phase="training", round=number, attempt=0, name="update", count=where.size, std_in_steps=std)
        assert np.allclose(released(config, states[number])[where], noise[where], rtol=1e-6)


def test_a_round_is_charged_before_its_cohort_is_asked_and_sealed_before_its_noise(tmp_path: Path):
    seen: list[tuple[dict[str, int], str | None]] = []

    def tamper(handler: Any) -> Any:
        def handle(message: Message, context: Context) -> Message:
            ledger = Ledger(tmp_path / "ledger.jsonl")
            seen.append((ledger.charged(), ledger.sealed("training", len(ledger.charged()), 0)))
            return handler(message, context)

        return handle

    states, _ = trained(small_config(PLAN, PLAIN, {"server": {"rounds": 1}}), tmp_path, tamper=tamper)
    assert seen == [({"training": 1}, None)]
    seal = Ledger(tmp_path / "ledger.jsonl").sealed("training", 1, 0)
    assert seal is not None


def test_the_seal_is_that_of_the_totals_without_noise(tmp_path: Path):
    states, _ = trained(CONFIG, tmp_path)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in (1, 2, 3, 4):
        assert ledger.sealed("training", number, 0) == hmac_of_totals(KEYS.noise, {"update": true_total(CONFIG, states[number - 1], number)})


def test_a_lost_round_played_again_gives_the_same_bytes_and_costs_nothing(tmp_path: Path):
    states, _ = trained(CONFIG, tmp_path)
    again: list[State] = []
    train(CONFIG, small_dataset(), folder=tmp_path, state=states[2], on_round=lambda state, facts: again.append(state))
    assert torch.equal(again[-1].weights_P, states[-1].weights_P)
    assert Ledger(tmp_path / "ledger.jsonl").charged() == {"training": 4}


def test_other_totals_under_a_sealed_attempt_are_a_new_attempt_with_new_coins_and_new_noise(tmp_path: Path):
    # Ten rounds were promised, so that the second attempt is affordable.
    config = small_config(PLAN, PLAIN, {"server": {"rounds": 10}, "system": {"users_per_chunk": 1}})
    before = first_state(recipe_of(config, small_dataset()))
    ledger, plan = Ledger(tmp_path / "ledger.jsonl"), plan_of(config)
    attempt, _ = begin_attempt(ledger, "training", 1, plan=plan)
    ledger.seal("training", 1, attempt, "ab" * 32)
    states: list[State] = []
    _, facts = train(config, small_dataset(), folder=tmp_path, on_round=lambda state, facts: states.append(state), should_stop=lambda: bool(states))
    assert facts[0].attempt == 1
    assert states[0].charged == {"training": 2}
    assert facts[0].users == len(draw_cohort(KEYS.cohort, "training", 1, 1, 24, RATE))
    where = is_noised(config)
    noise = gaussian_steps(KEYS.noise, phase="training", round=1, attempt=1, name="update", count=where.size, std_in_steps=0.5 / STEP)
    expected = true_total(config, before, 1, attempt=1) + noise
    assert np.allclose(released(config, states[0])[where], expected[where], rtol=1e-6)


def test_a_round_that_would_overspend_is_refused_and_nothing_is_asked_or_released(tmp_path: Path):
    ledger, plan = Ledger(tmp_path / "ledger.jsonl"), plan_of(CONFIG)
    begin_attempt(ledger, "training", 1, plan=plan)
    # Three attempts of round 1 were lost: of the four that were promised, one is left for round 2.
    for _ in range(2):
        ledger.charge("training", 1)
    asked: list[int] = []

    def tamper(handler: Any) -> Any:
        def handle(message: Message, context: Context) -> Message:
            asked.append(1)
            return handler(message, context)

        return handle

    done: list[State] = []
    with pytest.raises(BudgetSpent) as caught:
        train(CONFIG, small_dataset(), folder=tmp_path, tamper=tamper, on_round=lambda state, facts: done.append(state))
    assert [state.round for state in done] == [1, 2]
    assert len(asked) == 2
    assert (caught.value.round_number, caught.value.promised) == (3, pytest.approx(plan.epsilon({"training": 4})))
    assert caught.value.spent == pytest.approx(plan.epsilon({"training": 5}))
    assert Ledger(tmp_path / "ledger.jsonl").charged() == {"training": 4}


def test_a_phase_that_the_plan_does_not_account_for_cannot_run(tmp_path: Path):
    recipe = recipe_of(CONFIG, small_dataset())
    from fedssl.server_round import phases_of

    stranger = phases_of(recipe)[0]._replace(name="survey")
    with pytest.raises(ConfigError, match="no phase 'survey'"):
        train(CONFIG, small_dataset(), folder=tmp_path, phases=[stranger])


# ---- counts ----

COUNTING = small_config(PLAN, PLAIN, {"counts": {"clip_norm": 0.5, "lags": 2, "items": 30}, "privacy": {"counts_noise_multiplier": 0.125}})


def counting(num_items: int, items: int) -> tuple[Any, Release]:
    recipe = recipe_of(COUNTING, small_dataset()).model_copy(update={"num_items": num_items})
    assert recipe.counts is not None
    recipe = recipe.model_copy(update={"counts": recipe.counts.model_copy(update={"items": items})})
    return recipe, Release("counts", 1, 0, plan_of(COUNTING), KEYS.noise)


def seen_by_denoise(monkeypatch: pytest.MonkeyPatch, recipe: Any, release: Release, totals: Any, popularity: Any) -> tuple[Any, ...]:
    """What the server hands on of a counts round: the noised matrix first."""
    told: list[tuple[Any, ...]] = []

    def listen(*values: Any, **deviations: float) -> Any:
        told.append((*values, deviations))
        return denoise(*values, **deviations)

    monkeypatch.setattr("fedssl.server_round.denoise", listen)
    finish_counts(recipe, replace(first_state(recipe), popularity=popularity), totals, release)
    return told[0]


def test_every_cell_of_the_counts_carries_independent_noise_of_the_planned_deviation_empty_ones_too(monkeypatch: pytest.MonkeyPatch):
    items = 3 * ROWS_AT_ONCE
    recipe, release = counting(items, items)
    truth = np.zeros((items, items), dtype=np.int64)
    truth[::2] = 2**20
    noised, *_, deviations = seen_by_denoise(monkeypatch, recipe, release, {"counts": truth}, np.zeros(items + 1, dtype=np.float32))
    std = plan_of(COUNTING).noise_std_in_steps("counts", "counts") * STEP
    assert deviations["noise"] == std
    noise = (noised - truth * STEP) / std
    for rows in (noise[::2], noise[1::2]):
        assert rows.std() == pytest.approx(1.0, abs=5 / np.sqrt(2 * rows.size)) and abs(rows.mean()) < 5 / np.sqrt(rows.size)
    blocks = [noise[start : start + ROWS_AT_ONCE].reshape(-1) for start in range(0, items, ROWS_AT_ONCE)]
    assert abs(np.corrcoef(blocks[0], blocks[1])[0, 1]) < 5 / np.sqrt(blocks[0].size)


def test_what_is_denoised_is_the_total_of_everybody_between_the_items_met_most_with_the_noise_of_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    states, facts = trained(COUNTING, tmp_path)
    assert [(fact.phase, fact.users) for fact in facts[:2]] == [("popularity", 24), ("counts", 24)]
    assert states[-1].charged == {"popularity": 1, "counts": 1, "training": 4}
    data, config, plan = small_dataset(), COUNTING.counts, plan_of(COUNTING)
    assert config is not None
    side = data.catalogue.num_items + 1
    histogram = sum_items(data.histories, np.arange(24), config, num_items=side - 1, step=STEP)
    noise = {"phase": "popularity", "round": 1, "attempt": 0, "name": "popularity", "block": 0, "count": side}
    histogram += gaussian_steps(KEYS.noise, **noise, std_in_steps=plan.noise_std_in_steps("popularity", "popularity"))  # type: ignore[arg-type]
    found = states[1].popularity
    assert found is not None and np.array_equal(found[1:], (histogram * STEP).astype(np.float32)[1:])

    rows = np.sort(np.argsort(-histogram[1:], kind="stable")[:30] + 1)
    total = dense(sum_transitions(data.histories, np.arange(24), config, num_items=side - 1, step=STEP, rows=rows)[0])
    noise = {"phase": "counts", "round": 1, "attempt": 0, "name": "counts", "block": 0, "count": 900}
    expected = total + gaussian_steps(KEYS.noise, **noise, std_in_steps=plan.noise_std_in_steps("counts", "counts")).reshape(30, 30)  # type: ignore[arg-type]
    release = Release("counts", 1, 0, plan, KEYS.noise)
    noised, popularity, chosen, *_ = seen_by_denoise(monkeypatch, recipe_of(COUNTING, data), release, {"counts": total}, found)
    assert np.array_equal(noised, (expected * STEP).astype(np.float32))
    assert np.array_equal(chosen, rows) and popularity is found
    again = finish_counts(recipe_of(COUNTING, data), states[1], {"counts": total}, release).counts
    assert isinstance(again, LiftTable) and isinstance(states[2].counts, LiftTable)
    assert np.array_equal(again.lift, states[2].counts.lift)


@pytest.mark.parametrize("shards", [3, [np.array([user]) for user in range(24)]], ids=["three nodes", "nodes of one user"])
def test_nodes_of_any_size_release_the_same_counts(tmp_path: Path, shards: Any):
    config = small_config(PLAN, {"counts": {"clip_norm": 0.5, "items": 30}, "privacy": {"counts_noise_multiplier": 0.125}, "server": {"rounds": 0}})
    for name in "ab":
        (tmp_path / name).mkdir()
    whole, split = (train(config, small_dataset(), folder=tmp_path / name, shards=pieces)[0] for name, pieces in (("a", 1), ("b", shards)))
    assert isinstance(whole.counts, LiftTable) and isinstance(split.counts, LiftTable)
    for name, array in vars(whole.counts).items():
        assert np.array_equal(array, getattr(split.counts, name)), name


def test_keys_show_in_no_text_of_a_run(tmp_path: Path):
    from fedssl_server.rounds import Run

    run = Run("id", recipe_of(CONFIG, small_dataset()), 24, (1,), np.zeros(24, dtype=np.int32), plan_of(CONFIG), KEYS)
    for text in (repr(run), repr(Release("training", 1, 0, plan_of(CONFIG), KEYS.noise)), str(replace(KEYS))):
        assert "ccc" not in text and "nnn" not in text
