import json
import subprocess
import sys

import pytest
from oracles.gaussian_privacy import gaussian_epsilon

from fedssl.config import CountsConfig, PrivacyConfig, ServerConfig
from fedssl.errors import BudgetSpent, ConfigError
from fedssl.privacy.accounting import combined_noise, epsilon, solve_noise
from fedssl.privacy.plan import PhasePlan, Plan, SumPlan, make_plan

SERVER = ServerConfig(rounds=20, cohort=50, sampling="poisson")
NOISE = PrivacyConfig(clip_norm=1.5, noise_multiplier=2.0, delta=1e-5)
TARGET, MANY = PrivacyConfig(clip_norm=1.0, epsilon=2.0, delta=1e-5), ServerConfig(rounds=60, cohort=250, sampling="poisson")
COUNTS = CountsConfig(clip_norm=1.0, share=0.85)


def plan_of(privacy: PrivacyConfig = NOISE, server: ServerConfig = SERVER, counts: CountsConfig | None = None, num_users: int = 1000) -> Plan:
    plan = make_plan(privacy, server, counts, num_users)
    assert plan is not None
    return plan


def test_without_noise_or_target_there_is_no_plan():
    assert make_plan(PrivacyConfig(clip_norm=1.0), SERVER, None, 1000) is None
    assert make_plan(PrivacyConfig(), ServerConfig(cohort=5000), COUNTS, 1000) is None


def test_a_plan_owns_rate_denominator_clip_step_and_noise():
    # A quarter of 1/z^2 to the histogram: twice the noise; the rest: 3 / sqrt(3/4), rounded up.
    quarter = COUNTS.model_copy(update={"popularity_share": 0.25})
    plan = plan_of(PrivacyConfig(clip_norm=1.5, noise_multiplier=2.0, counts_noise_multiplier=3.0, delta=1e-5), counts=quarter)
    assert plan.phases == (
        PhasePlan("popularity", 1, 1.0, 1000.0, (SumPlan("popularity", 1.0, 2.0**-24, 6.0),)),
        PhasePlan("counts", 1, 1.0, 1000.0, (SumPlan("counts", 1.0, 2.0**-24, 3.4642),)),
        PhasePlan("training", 20, 0.05, 50.0, (SumPlan("update", 1.5, 2.0**-23, 2.0),)),
    )
    assert plan.expected_cohort("training") == 50.0
    assert plan.noise_std_in_steps("training", "update") == 2.0 * 1.5 * 2**23
    assert plan.noise_std_in_steps("popularity", "popularity") == 6.0 * 2**24


def test_epsilon_is_that_of_the_noise_actually_added():
    plan = plan_of()
    noise_in_weights = plan.noise_std_in_steps("training", "update") * plan.sum("training", "update").step
    assert plan.epsilon({"training": 7}) == epsilon([(50 / 1000, noise_in_weights / 1.5, 7)], 1e-5)


def test_phases_compose_and_uncharged_ones_cost_nothing():
    plan = plan_of(PrivacyConfig(clip_norm=1.0, noise_multiplier=2.0, counts_noise_multiplier=3.0, delta=1e-5), counts=COUNTS)
    assert plan.epsilon({}) == 0.0
    histogram, transitions = (plan.sum(name, name).noise_multiplier for name in ("popularity", "counts"))
    assert plan.epsilon({"counts": 1}) == epsilon([(1.0, transitions, 1)], 1e-5)
    all_of_it = {"popularity": 1, "counts": 1, "training": 20}
    assert plan.epsilon(all_of_it) == epsilon([(1.0, histogram, 1), (1.0, transitions, 1), (0.05, 2.0, 20)], 1e-5) == plan.promised


def test_histogram_and_transitions_cost_what_one_gaussian_of_the_given_noise_costs():
    plan = plan_of(PrivacyConfig(clip_norm=1.0, noise_multiplier=2.0, counts_noise_multiplier=3.0, delta=1e-5), counts=COUNTS)
    spent = plan.epsilon({"popularity": 1, "counts": 1})
    assert gaussian_epsilon(3.0, 1, 1e-5) * 0.999 < spent < gaussian_epsilon(3.0, 1, 1e-5) * 1.002


@pytest.mark.parametrize(("target", "noise"), [(8.0, 0.6003), (2.0, 1.994)])
def test_a_run_that_only_counts_spends_the_whole_target_on_one_gaussian_whose_noise_is_known(target: float, noise: float):
    # Balle and Wang 2018, theorem 8, solved for the noise: 0.60027 and 1.99396.
    plan = plan_of(PrivacyConfig(epsilon=target, delta=1e-5, clip_norm=1.0), ServerConfig(rounds=0, sampling="poisson"), COUNTS)
    assert [phase.phase for phase in plan.phases] == ["popularity", "counts"]
    both = combined_noise([phase.noise_multiplier for phase in plan.phases])
    assert noise * 0.9995 < both < noise * 1.002
    assert gaussian_epsilon(both, 1, 1e-5) <= target
    assert target * 0.995 < plan.epsilon({"popularity": 1, "counts": 1}) <= target


def test_several_sums_of_one_exchange_are_accounted_together():
    sums = (SumPlan("update", 1.0, 2.0**-24, 4.0), SumPlan("clipped", 1.0, 2.0**-24, 3.0))
    plan = Plan(phases=(PhasePlan("training", 5, 0.1, 10.0, sums),), delta=1e-5, num_users=100)
    assert plan.epsilon({"training": 5}) == pytest.approx(epsilon([(0.1, 2.4, 5)], 1e-5), abs=1e-9)


def test_what_was_promised_is_affordable_and_nothing_more():
    plan = plan_of()
    for charged in range(20):
        plan.check_affordable({"training": charged}, "training", charged + 1)
    with pytest.raises(BudgetSpent) as caught:
        plan.check_affordable({"training": 20}, "training", 20)
    assert (caught.value.promised, caught.value.round_number) == (plan.promised, 20)
    assert caught.value.spent == plan.epsilon({"training": 21}) > plan.promised


def test_an_attempt_more_of_one_phase_is_paid_by_the_other():
    plan = plan_of(PrivacyConfig(clip_norm=1.0, noise_multiplier=2.0, counts_noise_multiplier=8.0, delta=1e-5), counts=COUNTS)
    plan.check_affordable({"popularity": 1, "counts": 1, "training": 0}, "counts", 1)
    spent = {"popularity": 1, "counts": 2, "training": 0}
    while True:
        try:
            plan.check_affordable(spent, "training", spent["training"] + 1)
        except BudgetSpent:
            break
        spent["training"] += 1
    assert 0 < spent["training"] < 20
    assert plan.epsilon(spent) <= plan.promised < plan.epsilon({**spent, "training": spent["training"] + 1})


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_a_target_is_met_closely_and_never_exceeded(counts: CountsConfig | None):
    plan = plan_of(TARGET, MANY, counts)
    planned = {phase.phase: phase.rounds for phase in plan.phases}
    assert plan.promised == 2.0
    assert 2.0 * 0.998 < plan.epsilon(planned) <= 2.0


def test_counts_take_their_share_of_the_one_gaussian_that_spends_the_target():
    plan = plan_of(TARGET, MANY, COUNTS)
    whole = combined_noise([plan.sum(name, name).noise_multiplier for name in ("popularity", "counts")]) * 0.85**0.5
    assert gaussian_epsilon(whole, 1, 1e-5) == pytest.approx(2.0, rel=2e-3)


def test_the_solved_noise_does_not_change_from_one_making_to_the_next():
    once = plan_of(TARGET, MANY).fingerprint
    solve_noise.cache_clear()
    assert plan_of(TARGET, MANY).fingerprint == once


@pytest.mark.parametrize(
    "other",
    [
        plan_of(PrivacyConfig(clip_norm=1.5, noise_multiplier=2.5, delta=1e-5)),
        plan_of(PrivacyConfig(clip_norm=1.6, noise_multiplier=2.0, delta=1e-5)),
        plan_of(num_users=1001),
        plan_of(server=ServerConfig(rounds=21, cohort=50, sampling="poisson")),
    ],
)
def test_another_plan_has_another_fingerprint(other: Plan):
    assert other.fingerprint != plan_of().fingerprint


@pytest.mark.parametrize(
    ("privacy", "server", "counts", "message"),
    [
        (NOISE, ServerConfig(cohort=1001, sampling="poisson"), None, "at most 1000"),
        (NOISE, ServerConfig(cohort=50, sampling="passes"), None, "poisson"),
        (NOISE, ServerConfig(cohort=50, sampling="poisson", weighting="positions"), None, "equal"),
        (NOISE, SERVER, CountsConfig(), "clip_norm"),
        (NOISE, SERVER, COUNTS, "counts_noise_multiplier"),
    ],
)
def test_settings_that_no_plan_can_keep_are_refused(privacy: PrivacyConfig, server: ServerConfig, counts: CountsConfig | None, message: str):
    with pytest.raises(ConfigError, match=message):
        make_plan(privacy, server, counts, 1000)


def test_a_cohort_of_everybody_is_a_rate_of_one():
    assert plan_of(server=ServerConfig(rounds=1, cohort=1000, sampling="poisson")).phase("training").rate == 1.0


def test_what_the_plan_does_not_know_is_refused():
    plan = plan_of()
    for ask in (
        lambda: plan.phase("counts"),
        lambda: plan.sum("training", "loss"),
        lambda: plan.epsilon({"audit": 1}),
        lambda: plan.check_affordable({}, "audit", 1),
    ):
        with pytest.raises(ConfigError, match="accounted for"):
            ask()


def test_the_statement_names_unit_neighbours_trust_and_numbers_as_json():
    plan = plan_of()
    statement = json.loads(json.dumps(plan.statement()))
    assert {key: statement[key] for key in ("unit", "neighbours", "trust", "accountant", "delta", "epsilon", "noise_multiplier", "clip_norm")} == {
        "unit": "user",
        "neighbours": "add/remove one user",
        "trust": "central",
        "accountant": "PLD (dp-accounting)",
        "delta": 1e-5,
        "epsilon": plan.promised,
        "noise_multiplier": {"update": 2.0},
        "clip_norm": {"update": 1.5},
    }
    assert statement["sampling"] == {"training": "Poisson, rate 0.05, from a secret cohort key"}


def test_the_statement_says_what_it_does_not_cover():
    text = json.dumps(plan_of().statement())
    for words in (
        "not against the server or the network",
        "k-core",
        "Hyper-parameters",
        "server is trusted",
        "add/remove one user",
    ):
        assert words in text


def test_amplification_is_not_claimed_without_sampling():
    assert "Amplification" not in json.dumps(plan_of(server=ServerConfig(rounds=1, cohort=1000, sampling="poisson")).statement())


def test_a_delta_that_gives_a_user_away_is_said_out_loud():
    assert "1 / users" in json.dumps(plan_of(PrivacyConfig(clip_norm=1.0, noise_multiplier=2.0, delta=1e-3)).statement())
    assert "1 / users" not in json.dumps(plan_of().statement())


def test_words_of_the_plan_need_neither_torch_nor_an_accountant():
    # A device has no dp-accounting; a server that only reads a plan should not pay for it.
    code = (
        "import sys; sys.modules['torch'] = sys.modules['dp_accounting'] = sys.modules['scipy'] = None\n"
        "from fedssl.privacy import accounting, grid, keys, ledger, manifest, noise, plan, stream"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
