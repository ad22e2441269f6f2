"""Users who add their own noise: from their own key, charged per upload, in the same rounds here and on nodes of one user."""

from __future__ import annotations

import json
import math
import sqlite3
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fedssl_client.trainer import train
from fedssl_server.serve import serve
from fedssl_simulations import run as run_module
from fedssl_simulations.grids import InProcessGrid, handler_of
from fedssl_simulations.report import write_report
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles.gaussian_privacy import gaussian_epsilon
from small import KEYS, learned, recipe_of, small_config, small_dataset

from fedssl.catalogue import write_catalogue
from fedssl.checkpoints import list_checkpoints, read_checkpoint
from fedssl.client_round import Shard, client_round, write_shard
from fedssl.config import PrivacyConfig, RunConfig, ServerConfig
from fedssl.data.histories import take_users
from fedssl.errors import BudgetSpent, ConfigError, DataError, UploadRefused
from fedssl.privacy import accounting
from fedssl.privacy.adaptive_clip import WITHIN
from fedssl.privacy.grid import grid_step
from fedssl.privacy.keys import cohort_of_pass
from fedssl.privacy.manifest import check_manifest, declared_sums
from fedssl.privacy.plan import Plan, make_plan
from fedssl.privacy.uploads import Device, UploadLedger
from fedssl.records import Address, Download
from fedssl.round_lines import read_lines
from fedssl.server_round import first_state
from fedssl.weights import to_numpy
from fedssl.wire import to_bytes

LOCAL: dict[str, Any] = {"privacy": {"mode": "local", "clip_norm": 0.5, "noise_multiplier": 3.0, "delta": 1e-3}, "server": {"rounds": 5, "cohort": 10}}
CONFIG = small_config(LOCAL)
STEP = grid_step(0.5)


def plan_of(privacy: PrivacyConfig, server: ServerConfig, users: int = 24) -> Plan:
    plan = make_plan(privacy, server, None, users)
    assert plan is not None
    return plan


def shard_of(folder: Path, users: NDArray[np.int64] | None = None, key: bytes = KEYS.noise) -> Shard:
    users = np.arange(24) if users is None else users
    folder.mkdir(parents=True, exist_ok=True)
    device = Device(key, UploadLedger(folder / "uploads.sqlite", key, may_be_new=True))
    return Shard(take_users(small_dataset().histories, users), users, folder / "heads", users_per_chunk=1, device=device)


def ask(config: RunConfig = CONFIG, users: Any = None, *, round: int = 1, scale: float = 1.0, clip_norm: float | None = None) -> Download:
    recipe = recipe_of(config, small_dataset())
    tensors = {name: array * np.float32(scale) for name, array in to_numpy(first_state(recipe).weights(recipe)).items()}
    chosen = None if users is None else np.asarray(users, dtype=np.int64)
    return Download(Address("run", "training", round), recipe, tensors, chosen, clip_norm=clip_norm)


def update(upload: Any) -> NDArray[np.int64]:
    return np.asarray(upload.sums["update"], dtype=np.int64)


# ---- the plan ----


def test_its_epsilon_is_the_gaussians_of_the_users_own_uploads_at_twice_the_clip():
    # 24 users in passes of 3 rounds (10, 10, 4): in 5 rounds somebody uploads twice, nobody more.
    plan = plan_of(CONFIG.privacy, CONFIG.server)
    assert [plan.uploads(rounds) for rounds in (0, 1, 3, 4, 5, 6, 7)] == [0, 1, 1, 2, 2, 2, 3]
    assert plan.promised == pytest.approx(gaussian_epsilon(3.0 / 2, 2, 1e-3), abs=1e-6)
    assert plan.epsilon({"training": 3}) == pytest.approx(gaussian_epsilon(3.0 / 2, 1, 1e-3), abs=1e-6)
    assert plan.epsilon({}) == 0.0


def test_replace_one_is_twice_as_far_as_add_or_remove():
    # Two updates within the clip may point in opposite directions.
    assert plan_of(CONFIG.privacy, CONFIG.server).promised > accounting.epsilon([(1.0, 3.0, 2)], 1e-3)
    assert plan_of(CONFIG.privacy, CONFIG.server).promised == pytest.approx(accounting.epsilon([(1.0, 1.5, 2)], 1e-3), abs=1e-3)


@pytest.mark.parametrize("clip", ["fixed", "adaptive"])
def test_a_target_is_met_and_never_exceeded(clip: Any):
    privacy = PrivacyConfig(mode="local", clip=clip, clip_norm=1.0, epsilon=4.0, delta=1e-5, clip_share=0.1)
    plan = plan_of(privacy, ServerConfig(rounds=9, cohort=8, sampling="passes"))
    assert plan.uploads(9) == 3
    assert 4.0 * 0.999 < plan.epsilon({"training": 9}) <= 4.0
    assert plan.epsilon({"training": 10}) > 4.0


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 60.0), st.integers(1, 500), st.floats(1e-9, 1e-2))
def test_the_closed_form_is_that_of_the_oracle_and_never_below_it(z: float, count: int, delta: float):
    exact = gaussian_epsilon(z, count, delta)
    assert -1e-9 <= accounting.gaussian_epsilon(z, count, delta) - exact < 1e-6 * max(1.0, exact)


@pytest.mark.parametrize(("target", "count"), [(0.1, 1), (1.0, 10), (8.0, 100), (50.0, 3)])
def test_solved_gaussian_noise_never_overspends_and_a_thousandth_less_would(target: float, count: int):
    z = accounting.solve_gaussian_noise(target, 1e-5, count)
    assert gaussian_epsilon(z, count, 1e-5) <= target < gaussian_epsilon(z / 1.001, count, 1e-5)


def test_the_statement_says_who_is_trusted_what_neighbours_are_and_how_often_the_worst_user_uploads():
    statement = plan_of(CONFIG.privacy, CONFIG.server).statement()
    assert (statement["trust"], statement["uploads_of_worst_user"]) == ("local", 2)
    assert statement["neighbours"] == "replace all that is on one device by anything else"
    text = json.dumps(statement)
    assert "Nobody is trusted" in text and "The server is trusted" not in text and "Amplification" not in text and "each user once a pass" in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"server": {"sampling": "poisson"}}, "set sampling = 'passes'"),
        ({"counts": {"clip_norm": 1.0}}, "a whole matrix of noise"),
        ({"privacy": {"fleet_users": 1000}}, "every user adds their own"),
        ({"server": {"weighting": "windows"}}, "set weighting = 'equal'"),
        ({"evaluation": {"patience": 1, "every": 1}}, "set patience = 0"),
        ({"privacy": {"epsilon": 1.0}}, "both given"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(more: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        small_config(LOCAL, more)


# ---- an upload ----


def test_noise_is_the_users_own_in_whole_steps_of_the_stated_deviation(tmp_path: Path):
    # The same question with and without noise: what differs is the noise.
    with_noise = update(client_round(ask(users=[4]), shard_of(tmp_path / "a")))
    bare = small_config({"privacy": {"clip_norm": 0.5}, "server": {"rounds": 5, "cohort": 10}})
    without = update(client_round(ask(bare, users=[4]), shard_of(tmp_path / "b")))
    noise = (with_noise - without) * STEP / 0.5
    assert noise.std() == pytest.approx(3.0, abs=5 * 3.0 / math.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 5 * 3.0 / math.sqrt(noise.size)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 5 / math.sqrt(noise.size)


def test_a_shard_sends_the_sum_of_what_its_users_would_send_alone(tmp_path: Path):
    alone = [update(client_round(ask(users=None), shard_of(tmp_path / str(user), np.array([user])))) for user in range(24)]
    assert np.array_equal(update(client_round(ask(), shard_of(tmp_path / "all"))), sum(alone))


def test_noise_comes_from_the_nodes_key_and_not_from_the_recipes_seed(tmp_path: Path):
    # One recipe, one question, one history: with another key everything differs, by noise that has nothing in common.
    one, same, other = (update(client_round(ask(users=[4]), shard_of(tmp_path / name, key=name.encode() * 32))) for name in ("a", "a", "b"))
    assert np.array_equal(one, same)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(one.size) + 0.01
    assert (one - other).std() * STEP / 0.5 == pytest.approx(3.0 * math.sqrt(2), rel=0.1)


def test_users_rounds_and_questions_share_no_noise(tmp_path: Path):
    four, five = shard_of(tmp_path / "4", np.array([4])), shard_of(tmp_path / "5", np.array([5]))
    asked = [(ask(), four), (ask(), five), (ask(round=2), four), (ask(scale=1.0001), four)]
    # Updates are at most 0.5 long and noise some 40, so that uploads are noise, nearly.
    uploads = [update(client_round(download, shard)) for download, shard in asked]
    for left in range(4):
        for right in range(left):
            assert abs(np.corrcoef(uploads[left], uploads[right])[0, 1]) < 5 / math.sqrt(uploads[0].size) + 0.01


def test_a_second_asking_brings_the_same_bytes_and_costs_nothing_even_after_the_history_changed(tmp_path: Path):
    shard = shard_of(tmp_path, np.array([4]))
    first = to_bytes(client_round(ask(), shard))
    assert to_bytes(client_round(ask(), shard)) == first
    changed = replace(shard, events=take_users(small_dataset().histories, np.array([9])))
    assert to_bytes(client_round(ask(), changed)) == first
    assert shard.own().ledger.uploads() == {4: 1}


def test_a_crash_between_charge_and_answer_costs_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shard = shard_of(tmp_path / "crashed", np.array([4]))
    with monkeypatch.context() as patched:
        patched.setattr(UploadLedger, "keep", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            client_round(ask(), shard)
    assert shard.own().ledger.uploads() == {4: 1}
    again = to_bytes(client_round(ask(), shard))
    assert shard.own().ledger.uploads() == {4: 1}
    assert again == to_bytes(client_round(ask(), shard_of(tmp_path / "whole", np.array([4]))))


def test_it_is_charged_before_anything_of_the_user_is_read(tmp_path: Path):
    shard = shard_of(tmp_path, np.array([4]))
    shard.events = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        client_round(ask(), shard)
    assert shard.own().ledger.uploads() == {4: 1}


@pytest.mark.parametrize("privacy", [{}, {"privacy": {"noise_multiplier": 0.0, "epsilon": 2.0}}], ids=["noise given", "epsilon given"])
def test_a_node_refuses_the_upload_that_would_break_the_recipes_promise(privacy: dict[str, Any], tmp_path: Path):
    config, recipe = small_config(LOCAL, privacy), recipe_of(small_config(LOCAL, privacy), small_dataset())
    told = recipe.model_copy(update={"privacy": plan_of(config.privacy, config.server).told_to_nodes(config.privacy)})
    shard = shard_of(tmp_path, np.array([4]))
    for round in (1, 2):
        client_round(replace(ask(config, round=round), recipe=told), shard)
    with pytest.raises(BudgetSpent, match="round 3 would spend epsilon"):
        client_round(replace(ask(config, round=3), recipe=told), shard)
    assert shard.own().ledger.uploads() == {4: 2}


def test_a_recipe_with_a_target_and_no_noise_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="must solve for it"):
        client_round(ask(small_config(LOCAL, {"privacy": {"noise_multiplier": 0.0, "epsilon": 2.0}})), shard_of(tmp_path))


def test_a_node_without_a_folder_for_key_and_ledger_trains_nothing():
    with pytest.raises(DataError, match="no folder for a key"):
        client_round(ask(users=[1]), Shard(small_dataset().histories, np.arange(24)))


def test_the_trainer_of_a_node_makes_key_and_ledger_and_answers_again_with_the_same_bytes(tmp_path: Path):
    write_shard(tmp_path / "node", small_dataset().histories, np.array([4]))
    asked = to_bytes(ask(users=[4]))
    first = train(asked, str(tmp_path / "node"))
    assert train(asked, str(tmp_path / "node")) == first
    assert {path.name for path in (tmp_path / "node").iterdir()} >= {"device.key", "uploads.sqlite"}
    assert (tmp_path / "node" / "device.key").read_bytes() not in first
    (tmp_path / "node" / "uploads.sqlite").unlink()
    with pytest.raises(DataError, match="missing"):
        train(asked, str(tmp_path / "node"))


@pytest.mark.parametrize("users", [1, 24])
def test_admission_lets_honest_noise_through_and_nothing_much_longer(users: int, tmp_path: Path):
    download = ask(users=np.arange(users))
    upload = client_round(download, shard_of(tmp_path))
    declared = declared_sums(download.recipe, "training", num_weights=len(update(upload)))
    assert declared["update"].noise_std == 3.0 * 0.5 / STEP
    check_manifest(upload.sums, declared, most_users=users)
    with pytest.raises(UploadRefused, match="L2 norm"):
        check_manifest({"update": update(upload) * 2}, declared, most_users=users)
    spike = np.zeros_like(update(upload))
    spike[5] = 60 * users * 2**24
    with pytest.raises(UploadRefused, match="coordinates"):
        check_manifest({"update": spike}, declared, most_users=users)


# ---- runs ----


def play(config: RunConfig, folder: Path, **more: Any) -> Any:
    return simulate(config, out=folder, dataset=small_dataset(), keys=KEYS, **more)


FULL = small_config(
    LOCAL,
    {"head": {"name": "user-vector", "lr": 0.5}, "encoder": {"dropout": 0.1}, "privacy": {"clip": "adaptive"}},
    {"system": {"users_per_chunk": 1, "checkpoint_every": 2}},
)


def test_a_round_is_the_mean_of_the_noised_uploads_of_those_who_were_asked(tmp_path: Path):
    plain: dict[str, Any] = {"server": {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "schedule": "constant", "rounds": 1}}
    run = play(small_config(LOCAL, plain), tmp_path / "run")
    download = ask(small_config(LOCAL, plain))
    about = tomllib.loads((run.folder / "run.toml").read_text())["about"]
    asked = Download(replace(download.address, run=about["run"]), run.recipe, download.tensors)
    users = cohort_of_pass(1, 10, 24, 1)
    total = sum(update(client_round(replace(asked, users=np.array([user])), shard_of(tmp_path / f"{user}"))) for user in users)
    released = run.state.memory["velocity"].double().numpy()
    where = released != 0
    assert where.mean() > 0.9
    # Half a unit in the last place of float32 numbers up to 1.
    np.testing.assert_allclose(released[where], (total * STEP / 10)[where], rtol=1e-5, atol=2.0**-25)


def test_every_user_is_charged_for_their_own_uploads_and_the_report_states_the_worst(tmp_path: Path):
    run = play(CONFIG, tmp_path / "run")
    ledger = UploadLedger(run.folder / "devices" / "node-000" / "uploads.sqlite", KEYS.noise, may_be_new=False)
    counts = ledger.uploads()
    assert len(counts) == 24 and set(counts.values()) == {1, 2}
    worst = max(counts, key=lambda user: counts[user])
    assert run.report["privacy"]["epsilon"] == pytest.approx(ledger.spent(worst, 1e-3), abs=1e-6)
    assert run.report["privacy"]["uploads_of_worst_user"] == 2
    lines = read_lines(run.folder / "metrics.jsonl")
    assert [line["epsilon"] for line in lines] == pytest.approx([gaussian_epsilon(1.5, 1 + (round > 3), 1e-3) for round in range(1, 6)], abs=1e-6)
    assert not (run.folder / "ledger.jsonl").exists()
    assert run.report.keys() >= {"privacy", "researcher_only"} and "test" not in run.report


def test_after_a_crash_every_user_was_charged_for_the_uploads_of_a_run_without_one(tmp_path: Path):
    class Crash(Exception):
        pass

    def crash(progress: Any) -> None:
        if progress.facts.round == 3:
            raise Crash

    whole = play(FULL, tmp_path / "whole")
    with pytest.raises(Crash):
        play(FULL, tmp_path / "run", on_progress=crash)
    done = simulate(resume=tmp_path / "run", dataset=small_dataset(), keys=KEYS)
    ledgers = [UploadLedger(run.folder / "devices" / "node-000" / "uploads.sqlite", KEYS.noise, may_be_new=False) for run in (whole, done)]
    assert ledgers[0].uploads() == ledgers[1].uploads()
    assert done.state.charged == whole.state.charged == {"training": 5}


def test_killed_after_any_round_and_resumed_a_run_ends_with_the_bytes_of_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Noise is of the run: to be compared, all must bear one name.
    monkeypatch.setattr(run_module, "uuid4", lambda: SimpleNamespace(hex="the same run"))
    whole = play(FULL, tmp_path / "whole")
    for stop in (1, 3, 4):
        folder = tmp_path / f"after-{stop}"
        begun = iter([False] * stop + [True] * 9)
        play(FULL, folder, should_stop=lambda begun=begun: next(begun))

        def crash(progress: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            simulate(resume=folder, dataset=small_dataset(), keys=KEYS, on_progress=crash)
        simulate(resume=folder, dataset=small_dataset(), keys=KEYS)
        assert learned(folder) == learned(whole.folder)


@pytest.mark.parametrize("damage", ["gone", "behind", "changed"])
def test_with_a_ledger_that_is_gone_behind_or_changed_nothing_is_trained_and_nothing_charged(damage: str, tmp_path: Path):
    begun = iter([False, False, True])
    play(CONFIG, tmp_path / "run", should_stop=lambda: next(begun))
    path = tmp_path / "run" / "devices" / "node-000" / "uploads.sqlite"
    if damage == "gone":
        path.unlink()
    else:
        file = sqlite3.connect(path)
        file.executescript("DELETE FROM uploads WHERE number > 2" if damage == "behind" else "UPDATE uploads SET cost = 0 WHERE number = 1")
        file.close()
    before = learned(tmp_path / "run")
    with pytest.raises(DataError, match={"gone": "is missing", "behind": "the ledger is behind", "changed": "not what this node wrote"}[damage]):
        simulate(resume=tmp_path / "run", dataset=small_dataset(), keys=KEYS)
    assert learned(tmp_path / "run") == before
    if damage == "behind":
        ledger = UploadLedger(path, KEYS.noise, may_be_new=False)
        assert sum(ledger.uploads().values()) == 10


@pytest.mark.parametrize("config", [CONFIG, FULL, small_config(LOCAL, {"privacy": {"noise_multiplier": 0.0, "epsilon": 3.0}})], ids=["plain", "full", "target"])
def test_served_to_nodes_of_one_user_the_rounds_are_those_of_the_simulation(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config.model_copy(update={"system": config.system.model_copy(update={"users_per_chunk": 1})})
    folder = tmp_path / "served"
    folder.mkdir()
    write_run(config, folder / "run.toml")
    write_catalogue(small_dataset().catalogue, folder / "catalogue.jsonl")
    # Devices have keys of their own; here all have the simulation's, so that the bytes can be compared.
    shards = {user: shard_of(tmp_path / f"device-{user}", np.array([user])) for user in range(24)}
    with InProcessGrid(handler_of(shards), {user + 1: {"partition-id": user} for user in shards}) as grid:
        serve(grid, {user + 1: shard.users for user, shard in shards.items()}, folder)
    served = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])

    monkeypatch.setattr(run_module, "uuid4", lambda: SimpleNamespace(hex=served.run))
    simulated = play(config, tmp_path / "simulated")
    assert served.state.weights_P.equal(simulated.state.weights_P)
    assert served.state.clip_norm == simulated.state.clip_norm and served.state.charged == simulated.state.charged
    assert served.recipe.hash == simulated.recipe.hash and served.recipe.privacy.noise_multiplier > 0
    assert not (folder / "secrets").exists() and not (folder / "ledger.jsonl").exists()
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epsilon"] for line in lines] == [line["epsilon"] for line in read_lines(simulated.folder / "metrics.jsonl")]
    uploads: dict[int, int] = {}
    for shard in shards.values():
        uploads |= shard.own().ledger.uploads()
    together = UploadLedger(simulated.folder / "devices" / "node-000" / "uploads.sqlite", KEYS.noise, may_be_new=False)
    assert uploads == together.uploads()
    if config is FULL:
        assert WITHIN in simulated.report["privacy"]["noise_multiplier"]


def test_the_page_says_that_nobody_is_trusted(tmp_path: Path):
    run = play(CONFIG, tmp_path / "run")
    write_report([run.folder], tmp_path / "page.html", public=True)
    page = (tmp_path / "page.html").read_text()
    assert "Nobody is trusted with an update" in page and "Neighbouring data sets differ in all that is on one device." in page
    assert "from all that it sends by at most a factor of e^" in page and "released models by at most" not in page
