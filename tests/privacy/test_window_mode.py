"""Window-level privacy on the device, by Opacus: what is read and added is the device's secret, and a simulation has the same law."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from oracles.loop_over_users import sasrec
from scipy import stats
from small import KEYS, dataset_of, learned, recipe_of, small_config, small_dataset
from torch.func import grad, vmap

from fedssl import client_round as client_module
from fedssl.catalogue import write_catalogue
from fedssl.checkpoints import list_checkpoints, read_checkpoint
from fedssl.chunk_training import Chunk, ChunkJob
from fedssl.client_round import Shard, client_round, write_shard
from fedssl.config import RunConfig, TaskConfig
from fedssl.data.histories import take_users
from fedssl.data.windows import count_pieces, take_pieces
from fedssl.errors import BudgetSpent, ConfigError
from fedssl.local_training import Batch, batch_of, train_users
from fedssl.parts import make_parts, make_task
from fedssl.privacy import accounting
from fedssl.privacy.clipping import GridTotal
from fedssl.privacy.grid import grid_step
from fedssl.privacy.plan import Plan, make_plan
from fedssl.privacy.uploads import Device, UploadLedger
from fedssl.privacy.window_chance import WindowChance
from fedssl.recipe import Recipe
from fedssl.records import Address, Download
from fedssl.server_round import first_state
from fedssl.tasks import Chance
from fedssl.weights import ITEMS, Weights, layout_of, to_numpy
from fedssl.window_chunks import add_windows, follow_devices
from fedssl.window_training import window_gradients
from fedssl.wire import to_bytes
from fedssl.workers import Workers

pytest.importorskip("opacus", reason="window-level privacy is an extra: pip install 'fedssl[window-dp]'")

from fedssl.privacy.dp_sgd import opacus_epsilon, train_device

WINDOW: dict[str, Any] = {
    "privacy": {"mode": "window", "clip_norm": 0.5, "noise_multiplier": 1.5, "delta": 1e-3, "window_rate": 0.6},
    "server": {"rounds": 5, "cohort": 10},
    "encoder": {"window": 4},
}
CONFIG = small_config(WINDOW)
TWO_STEPS = small_config(WINDOW, {"local": {"steps": 2}})
CLIP = 0.5
STEP = grid_step(CLIP)
HERE = Address("run", "training", 1)
LONGER = small_dataset(items=100)


def shard_of(folder: Path, users: Sequence[int] = range(24), *, key: bytes = KEYS.noise, is_simulated: bool = False) -> Shard:
    numbers = np.array(users, dtype=np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    device = Device(key, UploadLedger(folder / "uploads.sqlite", key, may_be_new=True))
    return Shard(take_users(small_dataset().histories, numbers), numbers, users_per_chunk=4, device=device, is_simulated=is_simulated)


def ask(config: RunConfig = CONFIG, *, round: int = 1) -> Download:
    recipe = recipe_of(config, small_dataset())
    return Download(replace(HERE, round=round), recipe, to_numpy(first_state(recipe).weights(recipe)))


def update(upload: Any) -> NDArray[np.int64]:
    return np.asarray(upload.sums["update"], dtype=np.int64)


def plan_of(config: RunConfig = CONFIG, users: int = 24) -> Plan:
    plan = make_plan(config.privacy, config.server, None, users, local=config.local)
    assert plan is not None
    return plan


class Silent(WindowChance):
    """The same windows, and no noise: to look at what is under it."""

    def normal(self, user: int, step: int, count: int) -> NDArray[np.float64]:
        return np.zeros(count)


def summed(way: Any, chance: WindowChance, config: RunConfig = CONFIG, users: Sequence[int] = range(24)) -> NDArray[np.float64]:
    """The sum of clipped gradients of these users' chosen windows, by one of the two ways."""
    recipe, numbers = recipe_of(config, small_dataset()), np.array(users)
    job = ChunkJob(chance.address, recipe, None, small_dataset().histories, first_state(recipe).weights(recipe), None, chance)
    parts = make_parts(recipe)
    total = GridTotal(parts.layout)
    way(job, parts, Chunk(numbers, numbers, None), total)
    return total.total_P.numpy() * STEP


# ---- the unit ----


def test_windows_are_cut_from_the_first_event_on_and_share_none():
    # 11, 5, 6, 1 training events in pieces of 4 + 1 (the last two events of each are held out).
    histories = dataset_of(range(1, 14), range(1, 8), range(1, 9), range(1, 4), num_items=20).histories
    everybody = np.arange(4)
    assert count_pieces(histories, everybody, length=4).tolist() == [2, 1, 1, 0]
    windows = take_pieces(histories, np.array([0, 0, 1, 2]), np.array([0, 1, 0, 0]), length=4)
    assert windows[:, 0, 0].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]


def test_a_last_window_may_be_short_and_is_padded_on_the_left():
    histories = dataset_of(range(1, 10), num_items=20).histories  # 7 for training: 5 and 2
    assert count_pieces(histories, np.array([0]), length=4).tolist() == [2]
    assert take_pieces(histories, np.array([0, 0]), np.array([0, 1]), length=4)[:, 0, 0].tolist() == [[1, 2, 3, 4, 5], [0, 0, 0, 6, 7]]


def test_later_events_leave_full_windows_as_they_are():
    before, after = (dataset_of(range(1, 1 + events), num_items=40).histories for events in (15, 30))
    for number in range(2):
        one, other = (take_pieces(histories, np.array([0]), np.array([number]), length=4) for histories in (before, after))
        assert np.array_equal(one, other)


# ---- gradients ----


def windows_of_five() -> tuple[Recipe, Weights, NDArray[np.int64], NDArray[np.int64]]:
    """A recipe, weights, and two full windows of each of five users."""
    recipe, histories = recipe_of(CONFIG, LONGER), LONGER.histories
    users = np.repeat(np.flatnonzero(histories.training_ends - histories.cuts[:-1] >= 10)[:5], 2)
    assert len(users) == 10
    return recipe, first_state(recipe).weights(recipe), users, np.tile([0, 1], 5)


def gradients(recipe: Recipe, weights: Weights, users: NDArray[np.int64], numbers: NDArray[np.int64]) -> Any:
    parts = make_parts(recipe)
    return window_gradients(
        parts.encoder,
        parts.tasks,
        weights,
        LONGER.histories,
        users,
        users,
        numbers,
        base=(1, "training", 1, "window step", 0),
        local=recipe.local,
        window=4,
        num_items=recipe.num_items,
        dropout=recipe.encoder.dropout,
        seed=recipe.seed,
    )


def test_a_windows_gradient_is_that_of_vmap_over_plain_torch():
    recipe, weights, users, numbers = windows_of_five()
    windows = torch.from_numpy(take_pieces(LONGER.histories, users, numbers, length=4)[:, 0, 0])

    def loss(leaves: Weights, window_L1: torch.Tensor) -> torch.Tensor:
        vectors_LD = F.embedding(window_L1[:-1], leaves[ITEMS])
        hidden_LD = sasrec(leaves, vectors_LD, torch.ones(4, dtype=torch.bool), recipe.encoder, None)
        return F.cross_entropy(hidden_LD @ leaves[ITEMS][1:].T, window_L1[1:] - 1)

    wanted = vmap(grad(loss), in_dims=(None, 0))(weights, windows)
    found = gradients(recipe, weights, users, numbers)
    for name, leaf in {**found.update, ITEMS: found.items}.items():
        torch.testing.assert_close(-leaf, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_windows_gradient_does_not_depend_on_other_windows():
    config = small_config(WINDOW, {"encoder": {"dropout": 0.3}, "task": [{"name": "next-item", "negatives": 6}]})
    _, _, users, numbers = windows_of_five()
    recipe = recipe_of(config, LONGER)
    weights = first_state(recipe).weights(recipe)
    whole = gradients(recipe, weights, users, numbers)
    alone = gradients(recipe, weights, users[3:4], numbers[3:4])
    for name, leaf in alone.update.items():
        torch.testing.assert_close(leaf[0], whole.update[name][3], rtol=1e-4, atol=1e-7)
    tables = [torch.zeros(LONGER.catalogue.num_items + 1, 8).index_add_(0, one.rows_UK[place], one.items[place]) for one, place in ((alone, 0), (whole, 3))]
    torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-7)


# ---- two ways, one law ----


@pytest.mark.parametrize(("negatives", "clip"), [(0, 0.5), (0, 2.0), (6, 0.5)])
def test_the_users_axis_adds_up_the_clipped_sums_that_opacus_adds_up(negatives: int, clip: float):
    config = small_config(WINDOW, {"privacy": {"clip_norm": clip}, "task": [{"name": "next-item", "negatives": negatives}], "encoder": {"dropout": 0.2}})
    chance = Silent(KEYS.noise, "question", HERE)
    here, by_opacus = (summed(way, chance, config) / STEP * grid_step(clip) for way in (add_windows, follow_devices))
    assert np.abs(by_opacus).max() > 0.1
    # Whole windows are rounded toward zero here and their sum to the nearest there: by less than a step a window.
    np.testing.assert_allclose(here, by_opacus, rtol=1e-6, atol=1e-6 + 50 * grid_step(clip))


def test_one_window_more_moves_the_sum_by_the_clip_at_most_and_by_no_less_where_it_was_clipped():
    class Without(Silent):
        def chosen(self, user: int, step: int, count: int, rate: float) -> NDArray[np.int64]:
            everything = super().chosen(user, step, count, 1.0)
            return everything[1:] if user == 5 and self.question == "without" else everything

    for way in (add_windows, follow_devices):
        for clip in (0.01, 0.5):
            config = small_config(WINDOW, {"privacy": {"clip_norm": clip}})
            with_it, without = (summed(way, Without(KEYS.noise, question, HERE), config) / STEP * grid_step(clip) for question in ("with", "without"))
            moved = float(np.linalg.norm(with_it - without))
            assert moved <= clip
            assert moved > 0.999 * clip or clip == 0.5


def noise_of(upload: Any, bare_P: NDArray[np.float64]) -> NDArray[np.float64]:
    return update(upload) * STEP - bare_P


def chance_of(download: Download) -> WindowChance:
    return Silent(KEYS.noise, client_module.question_of(download), download.address)


def test_the_noise_of_a_device_and_that_of_a_simulated_shard_have_the_same_law(tmp_path: Path):
    download = ask()
    bare = summed(add_windows, chance_of(download))
    on_devices = sum(update(client_round(download, shard_of(tmp_path / f"{user}", [user]))) for user in range(24)) * STEP - bare
    simulated = noise_of(client_round(download, shard_of(tmp_path / "all", is_simulated=True)), bare)
    std = 1.5 * CLIP * math.sqrt(24)
    for noise in (on_devices, simulated):
        assert stats.kstest(noise / std, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(on_devices, simulated)[0, 1]) < 5 / math.sqrt(bare.size)


def test_a_node_of_several_users_sends_the_sum_of_what_they_would_send_alone(tmp_path: Path):
    # Uploads of several steps are followed one by one in a simulation, too.
    alone = sum(update(client_round(ask(TWO_STEPS), shard_of(tmp_path / f"{user}", [user]))) for user in range(6))
    for is_simulated in (False, True):
        together = update(client_round(ask(TWO_STEPS), shard_of(tmp_path / f"{is_simulated}", range(6), is_simulated=is_simulated)))
        np.testing.assert_allclose(together * STEP, np.asarray(alone) * STEP, atol=1e-5)


def test_both_ways_are_charged_alike_and_opacus_counted_what_the_ledger_was_charged(tmp_path: Path):
    # `follow_devices` holds Opacus' own history to the recipe, upload by upload.
    shards = [shard_of(tmp_path / "a", [4]), shard_of(tmp_path / "b", [4], is_simulated=True)]
    for shard in shards:
        for round in (1, 2, 3):
            client_round(ask(round=round), shard)
        assert shard.own().ledger.window_events(4) == [(0.6, pytest.approx(1.5), 3)]
    two_steps = shard_of(tmp_path / "c", [4])
    client_round(ask(TWO_STEPS), two_steps)
    assert two_steps.own().ledger.window_events(4) == [(0.6, pytest.approx(1.5), 2)]


# ---- Opacus ----


def opacus_on(
    pieces: list[Weights], *, clip: float = 1.0, steps: int = 1, noise: float = 1e-9, seen: list[float] | None = None
) -> tuple[NDArray[np.float64], Any]:
    weights = {"a": torch.zeros(3), ITEMS: torch.zeros(2, 2)}
    layout = layout_of(weights)

    def given(step: int, now: Weights) -> list[Weights]:
        if seen is not None:
            seen.append(float(now["a"][0]))
        return [{name: given.clone() for name, given in piece.items()} for piece in pieces]

    released, history = train_device(
        weights,
        layout,
        steps=steps,
        lr=0.5,
        rate=0.1,
        clip_norm=clip,
        noise_multiplier=noise,
        grid=2.0**-20,
        gradients=given,
        noise=lambda step, count: np.random.default_rng(step).standard_normal(count),
    )
    return released * 2.0**-20, history


def leaf(first: list[float], items: float = 0.0) -> Weights:
    return {"a": torch.tensor([[value, 0.0, 0.0] for value in first]), ITEMS: torch.full((len(first), 2, 2), items)}


def test_each_window_enters_no_longer_than_the_clip_and_short_ones_as_they_are():
    # 100 is cut to 1, -0.25 passes; of the second piece 3 and four times 2 make norm 5, so 0.6 and 0.4 each.
    released, _ = opacus_on([leaf([100.0, -0.25]), leaf([3.0], 2.0)])
    np.testing.assert_allclose(released, [1 - 0.25 + 0.6, 0, 0, 0.4, 0.4, 0.4, 0.4], atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_window_whose_gradient_is_not_finite_counts_as_nothing(bad: float):
    released, _ = opacus_on([leaf([bad, 0.5])])
    np.testing.assert_allclose(released, [0.5, 0, 0, 0, 0, 0, 0], atol=1e-4)


def test_a_step_without_a_window_is_noise_alone_and_is_counted():
    released, history = opacus_on([], noise=2.0)
    np.testing.assert_allclose(released, 2 * np.random.default_rng(0).standard_normal(7), atol=1e-6)
    assert history == [(2.0, 0.1, 1)]


def test_a_device_goes_on_from_its_noised_step():
    seen: list[float] = []
    released, history = opacus_on([leaf([0.25])], steps=2, noise=1.0, seen=seen)
    first, second = (np.random.default_rng(step).standard_normal(7) for step in (0, 1))
    assert seen == [0.0, pytest.approx(-0.5 * (0.25 + first[0]), abs=1e-5)]
    np.testing.assert_allclose(released, 2 * np.array([0.25, 0, 0, 0, 0, 0, 0]) + first + second, atol=1e-4)
    assert history == [(1.0, 0.1, 2)]


def test_without_opacus_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in sys.modules if name.split(".")[0] == "opacus"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fedssl.privacy.dp_sgd")
    with pytest.raises(ConfigError, match=r"pip install 'fedssl\[window-dp\]'"):
        client_round(ask(), shard_of(tmp_path, [4]))
    # A simulation of single steps does without.
    client_round(ask(), shard_of(tmp_path / "simulated", [4], is_simulated=True))


# ---- chance ----


def test_the_recipes_seed_changes_neither_windows_nor_noise_and_the_devices_key_changes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A seed is part of a question, and another question has chance of its own; here the question is held.
    monkeypatch.setattr(client_module, "question_of", lambda download: "held")
    seeds = [small_config(WINDOW, {"seed": seed, "encoder": {"dropout": 0.5}}) for seed in (1, 2)]
    first = ask(seeds[0])

    def sent(config: RunConfig, name: str, key: bytes = KEYS.noise) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        download = replace(ask(config), tensors=first.tensors)
        chance = WindowChance(key, "held", HERE)
        upload = client_round(download, shard_of(tmp_path / name, range(12), key=key))
        return chance.chosen(4, 0, 50, 0.6), update(upload) * STEP

    (windows_1, sent_1), (windows_2, sent_2) = sent(seeds[0], "a"), sent(seeds[1], "b")
    assert np.array_equal(windows_1, windows_2)
    # What is left are some clipped gradients, which dropout changed: the noise was the same.
    assert 0 < np.linalg.norm(sent_1 - sent_2) < 0.1 * np.linalg.norm(sent_1)
    windows_3, sent_3 = sent(seeds[0], "c", b"k" * 32)
    assert not np.array_equal(windows_1, windows_3)
    assert abs(np.corrcoef(sent_1, sent_3)[0, 1]) < 5 / math.sqrt(sent_1.size) + 0.05


def test_another_question_reads_other_windows_and_draws_other_noise():
    chances = [WindowChance(KEYS.noise, question, address) for question, address in (("a", HERE), ("b", HERE), ("a", replace(HERE, round=2)))]
    drawn = [chance.normal(4, 0, 4000) for chance in chances] + [chances[0].normal(5, 0, 4000), chances[0].normal(4, 1, 4000)]
    read = [np.isin(np.arange(4000), chance.chosen(4, 0, 4000, 0.3)) for chance in chances]
    read += [np.isin(np.arange(4000), chances[0].chosen(user, step, 4000, 0.3)) for user, step in ((5, 0), (4, 1))]
    for kind in (drawn, read):
        assert np.abs(np.corrcoef(np.array(kind, dtype=float)) - np.eye(5)).max() < 5 / math.sqrt(4000)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 1.0), st.integers(0, 50), st.integers(0, 50))
def test_whether_a_window_is_read_does_not_depend_on_how_many_there_are(rate: float, count: int, more: int):
    chance = WindowChance(KEYS.noise, "a", HERE)
    few, many = chance.chosen(3, 0, count, rate), chance.chosen(3, 0, count + more, rate)
    assert np.array_equal(few, many[many < count])


def test_each_window_is_read_with_the_rate():
    read = np.concatenate([np.isin(np.arange(10), WindowChance(KEYS.noise, "a", HERE).chosen(user, 0, 10, 0.3)) for user in range(1000)])
    assert stats.binomtest(int(read.sum()), len(read), 0.3).pvalue > 1e-4
    each = read.reshape(1000, 10).astype(float)
    assert np.abs(np.corrcoef(each.T) - np.eye(10)).max() < 5 / math.sqrt(1000)


# ---- what may be trained ----


def test_a_task_that_declares_itself_by_window_has_a_loss_that_is_the_mean_of_its_windows():
    recipe, weights, _, _ = windows_of_five()
    assert far_from_mean_of_windows(TaskConfig(name="next-item"), recipe, weights) < 1e-5
    bert = small_config(WINDOW, {"encoder": {"name": "bert4rec"}, "task": [{"name": "masked-item"}], "local": {"reduction": "sum"}})
    bert_recipe = recipe_of(bert, LONGER)
    assert far_from_mean_of_windows(TaskConfig(name="masked-item"), bert_recipe, first_state(bert_recipe).weights(bert_recipe)) < 1e-5
    assert make_task(TaskConfig(name="masked-item"), num_items=40).is_by_window


def far_from_mean_of_windows(config: TaskConfig, recipe: Recipe, weights: Weights) -> float:
    """How far the loss of a user with three windows is from the mean over each window alone, the same views drawn."""
    task = make_task(config, num_items=recipe.num_items)
    windows = np.random.default_rng(0).integers(1, 31, (1, 1, 3, 5))
    encoder = make_parts(recipe).encoder
    whole = batch_of([(task, 1.0)], windows, np.array([7]), base=("x",), window=4, num_items=recipe.num_items)

    def loss(batch: Batch, count: int) -> float:
        local = recipe.local.model_copy(update={"windows": count})
        return float(train_users(encoder, [(task, 1.0)], weights, batch, local=local, window=4).loss_U)

    alone = [replace(whole, sequences=({name: rows[:, :, one : one + 1] for name, rows in whole.sequences[0].items()},)) for one in range(3)]
    return abs(loss(whole, 3) - sum(loss(one, 1) for one in alone) / 3)


def test_contrast_reads_one_window_in_the_loss_of_another_and_does_not_say_that_it_is_by_window():
    task = make_task(TaskConfig(name="contrastive", negatives=2), num_items=30)
    windows = np.random.default_rng(0).integers(1, 31, (1, 1, 3, 5))
    changed = windows.copy()
    changed[:, :, -1] = windows[:, :, -1, ::-1] % 30 + 1
    one, other = (task.draw(given, Chance(("x", 0), np.array([7]), 4)).sequences for given in (windows, changed))
    assert np.array_equal(one["left"][:, :, 0], other["left"][:, :, 0])
    # What the first window is told apart from is made of the last one.
    assert not np.array_equal(one["invented"], other["invented"])
    assert not task.is_by_window


@pytest.mark.parametrize("task", [{"name": "contrastive", "negatives": 3}, {"name": "small:next_item_with_a_bomb"}])
def test_tasks_that_do_not_declare_themselves_by_window_are_refused_with_what_to_use_instead(task: dict[str, Any], tmp_path: Path):
    config = small_config(WINDOW, {"task": [{"name": "next-item"}, task]})
    with pytest.raises(ConfigError, match=r"no window can be clipped alone.*next-item, previous-item, masked-item.*mode = 'central' or 'local'"):
        simulate(config, out=tmp_path / "run", dataset=small_dataset(), keys=KEYS)
    assert not list(tmp_path.rglob("uploads.sqlite"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"server": {"sampling": "poisson"}}, "under privacy.mode = 'window' set sampling = 'passes'"),
        ({"counts": {"clip_norm": 1.0}}, "under privacy.mode = 'window' take the section away"),
        ({"privacy": {"fleet_users": 1000}}, "under mode = 'window' every user adds their own"),
        ({"privacy": {"clip": "adaptive"}}, "under mode = 'window' single gradients are clipped"),
        ({"privacy": {"window_rate": 0.0}}, "greater than 0"),
        ({"head": {"name": "user-vector"}}, "would carry one window into the gradients of others"),
        ({"local": {"weight_decay": 0.1}}, "set both to 0"),
        ({"local": {"proximal": 0.1}}, "set both to 0"),
        ({"server": {"weighting": "windows"}}, "set weighting = 'equal'"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(more: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        small_config(WINDOW, more)


def test_a_plan_without_the_local_settings_is_refused_because_their_steps_would_not_be_counted():
    with pytest.raises(ConfigError, match=r"needs the \[local\] settings"):
        make_plan(CONFIG.privacy, CONFIG.server, None, 24)


# ---- the account ----


def test_epsilon_is_that_of_all_local_steps_of_the_busiest_device():
    # 24 users in passes of 3 rounds: in 5 rounds somebody uploads twice, with 2 steps each.
    assert plan_of(TWO_STEPS).promised == pytest.approx(accounting.epsilon([(0.6, 1.5, 4)], 1e-3))
    assert plan_of(TWO_STEPS).epsilon({"training": 3}) == pytest.approx(accounting.epsilon([(0.6, 1.5, 2)], 1e-3))
    assert plan_of(TWO_STEPS).fingerprint != plan_of().fingerprint


def test_a_target_is_met_and_never_exceeded():
    config = small_config(WINDOW, {"privacy": {"noise_multiplier": 0.0, "epsilon": 2.0}, "local": {"steps": 3}})
    plan = plan_of(config)
    assert 1.99 < plan.promised <= 2.0
    assert plan.epsilon({"training": 5}) <= 2.0 < plan.epsilon({"training": 7})


def test_the_devices_account_goes_on_from_round_to_round_and_over_a_restart(tmp_path: Path):
    config = small_config(WINDOW, {"privacy": {"noise_multiplier": 0.0, "epsilon": 2.0}})
    plan = plan_of(config)
    told = plan.told_to_nodes(config.privacy)
    for round in (1, 2):
        download = ask(config, round=round)
        client_round(replace(download, recipe=download.recipe.model_copy(update={"privacy": told})), shard_of(tmp_path, [4]))
    shard = shard_of(tmp_path, [4])
    z = plan.sum("training", "update").noise_multiplier
    assert shard.own().ledger.window_events(4) == [(0.6, pytest.approx(z), 2)]
    download = ask(config, round=3)
    with pytest.raises(BudgetSpent, match="round 3 would spend epsilon"):
        client_round(replace(download, recipe=download.recipe.model_copy(update={"privacy": told})), shard)
    with pytest.raises(ConfigError, match=r"mode = 'window', and the recipe says no noise_multiplier"):
        client_round(download, shard)


def test_a_history_begun_anew_each_round_would_hide_most_of_what_was_spent():
    # Why the device's ledger keeps it: 100 rounds of 10 steps, of which a new engine each round would remember the last.
    fresh, kept = (opacus_epsilon([(0.2, 1.0, steps)], 1e-5, bound="rdp") for steps in (10, 1000))
    assert fresh < 6 < 45 < kept


def test_an_upload_that_protects_the_user_counts_for_each_window_and_not_the_reverse(tmp_path: Path):
    ledger = UploadLedger(tmp_path / "uploads.sqlite", KEYS.noise, may_be_new=True)
    users = np.array([3])
    ledger.charge("a", HERE, users, cost=4.0**-2, promised=None, delta=1e-5)
    ledger.charge("b", HERE, users, cost=1.5**-2, promised=None, delta=1e-5, rate=0.25, steps=2)
    ledger.charge("c", HERE, users, cost=1.5**-2, promised=None, delta=1e-5, rate=0.25, steps=3)
    again = UploadLedger(tmp_path / "uploads.sqlite", KEYS.noise, may_be_new=False)
    for one in (ledger, again):
        assert one.window_events(3) == [(0.25, pytest.approx(1.5), 5), (1.0, pytest.approx(4.0), 1)]
        assert one.spent(3, 1e-5) == pytest.approx(accounting.gaussian_epsilon(4.0, 1, 1e-5))
        assert one.window_events(8) == []


def test_the_statement_says_unit_neighbours_trust_sampling_accountant_delta_and_what_is_not_promised():
    statement = plan_of().statement()
    assert (statement["unit"], statement["neighbours"]) == ("training window", "add/remove one training window of one device")
    assert (statement["trust"], statement["accountant"], statement["delta"]) == ("local", "PLD (dp-accounting)", 1e-3)
    assert statement["epsilon_of_a_replaced_event"] == pytest.approx(accounting.event_epsilon(0.6, 1.5, 2, 1e-3, windows=1))
    text = json.dumps(statement)
    for words in ("Poisson over windows, rate 0.6", "Nobody is trusted"):
        assert words in text
    assert "A user of many is promised less" in text and "The server is trusted" not in text


# ---- runs ----


def play(config: RunConfig, folder: Path, **more: Any) -> Any:
    return simulate(config, out=folder, dataset=small_dataset(), keys=KEYS, **more)


def test_a_simulated_run_reports_what_its_devices_were_charged_with_opacus_account_beside(tmp_path: Path):
    run = play(CONFIG, tmp_path / "run")
    ledger = UploadLedger(run.folder / "devices" / "node-000" / "uploads.sqlite", KEYS.noise, may_be_new=False)
    worst = max(range(24), key=lambda user: ledger.uploads()[user])
    assert ledger.window_events(worst) == [(0.6, pytest.approx(1.5), 2)]
    assert run.report["privacy"]["epsilon"] == pytest.approx(accounting.epsilon(ledger.window_events(worst), 1e-3))
    assert run.report["privacy"]["epsilon"] < run.report["privacy"]["epsilon_by_opacus_rdp"] == opacus_epsilon([(0.6, 1.5, 2)], 1e-3, bound="rdp")
    assert "test" not in run.report
    write_report([run.folder], tmp_path / "page.html", public=True)
    page = (tmp_path / "page.html").read_text()
    for words in ("training window", "Nobody is trusted with an update", "cut from its first event on", "The unit is one training window"):
        assert words in page
    assert "One training window of a device changes the probability of anything that can be concluded from all that the device sends" in page
    assert "Opacus" in page or "opacus" in page


@pytest.mark.parametrize("more", [{}, {"system": {"shards": 2}}, {"local": {"steps": 2}}], ids=["plain", "two shards", "two steps"])
def test_stopped_and_resumed_a_run_ends_with_the_bytes_of_one_that_was_not(more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Noise is of the run: to be compared, both must bear one name.
    monkeypatch.setattr(run_module, "uuid4", lambda: SimpleNamespace(hex="the same run"))
    config = small_config(WINDOW, {"system": {"checkpoint_every": 2}}, more)
    whole = play(config, tmp_path / "whole")
    rounds = iter(range(10))
    play(config, tmp_path / "cut", should_stop=lambda: next(rounds) >= 3)
    resumed = simulate(resume=tmp_path / "cut", dataset=small_dataset(), keys=KEYS)
    assert learned(resumed.folder) == learned(whole.folder)
    assert resumed.report["privacy"] == whole.report["privacy"]


def test_worker_processes_change_no_byte(tmp_path: Path):
    one = client_round(ask(), shard_of(tmp_path / "1", is_simulated=True))
    with Workers(2) as pool:
        two = client_round(ask(), replace(shard_of(tmp_path / "2", is_simulated=True), pool=pool))
    assert to_bytes(one) == to_bytes(two)


def test_served_to_devices_the_rounds_of_several_steps_are_those_of_the_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "served"
    folder.mkdir()
    write_run(TWO_STEPS, folder / "run.toml")
    write_catalogue(small_dataset().catalogue, folder / "catalogue.jsonl")
    # Devices have keys of their own; here all have the simulation's, so that the bytes can be compared.
    shards = {user: shard_of(tmp_path / f"device-{user}", [user]) for user in range(24)}
    with InProcessGrid(handler_of(shards), {user + 1: {"partition-id": user} for user in shards}) as grid:
        serve(grid, {user + 1: shard.users for user, shard in shards.items()}, folder)
    served = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    monkeypatch.setattr(run_module, "uuid4", lambda: SimpleNamespace(hex=served.run))
    simulated = play(TWO_STEPS, tmp_path / "simulated")
    assert served.state.weights_P.equal(simulated.state.weights_P)
    assert served.state.charged == simulated.state.charged
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["epsilon"] == pytest.approx(simulated.report["privacy"]["epsilon"])


def test_a_node_makes_its_key_trains_and_answers_again_with_the_same_bytes(tmp_path: Path):
    write_shard(tmp_path / "node", small_dataset().histories, np.array([4]))
    asked = to_bytes(ask())
    first = train(asked, str(tmp_path / "node"))
    assert train(asked, str(tmp_path / "node")) == first
    assert (tmp_path / "node" / "device.key").exists()
