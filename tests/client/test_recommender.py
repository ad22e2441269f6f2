"""Recommendations on a device: those of the torch recommender, counts and head included."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fedssl_client.recommender import DeviceRecommender
from fedssl_simulations.recommend import recommend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedssl.catalogue import Catalogue
from fedssl.checkpoints import Checkpoint
from fedssl.config import RunConfig
from fedssl.counts import Counts, from_cells
from fedssl.device_model import settle, write_device_model, write_encoder
from fedssl.errors import CatalogueMismatch, CheckpointError, ConfigError
from fedssl.lift import LiftTable
from fedssl.parts import initial_weights
from fedssl.recipe import Recipe, make_recipe
from fedssl.recommender import Recommender
from fedssl.server_round import first_state
from fedssl.weights import Weights, flatten, layout_of, to_numpy

ITEMS, D = 30, 16
CATALOGUE = Catalogue(tuple(f"i{row}" for row in range(1, ITEMS + 1)), {"i3": "The Third"})
HISTORIES = [[], [4], [2, 9, 2], list(range(1, 8)), [5, 1, 30, 7, 7, 2, 12, 3, 1, 28, 14]]
ENCODERS = ("sasrec", "bert4rec", "gru4rec", "hgrn")


def recipe_of(encoder: str = "sasrec", window: int = 7, blocks: int = 2, **sections: object) -> Recipe:
    task = [{"name": "masked-item" if encoder == "bert4rec" else "next-item"}]
    config = {"encoder": {"name": encoder, "width": D, "hidden": 24, "window": window, "blocks": blocks}, "task": task, **sections}
    return make_recipe(RunConfig.model_validate(config), num_items=ITEMS, catalogue=CATALOGUE.hash)


def weights_of(recipe: Recipe) -> Weights:
    rng = torch.Generator().manual_seed(0)
    return {name: leaf + 0.3 * torch.randn(leaf.shape, generator=rng) for name, leaf in initial_weights(recipe).items()}


def some_counts() -> Counts:
    rng = np.random.default_rng(1)
    cells = np.unique(rng.integers(1, ITEMS + 1, (120, 2)), axis=0)
    return from_cells(cells[:, 0], cells[:, 1], rng.random(len(cells)) * 5, num_items=ITEMS)


def some_table() -> LiftTable:
    rng = np.random.default_rng(2)
    share = rng.random(ITEMS + 1).astype(np.float32)
    rows = np.array([1, 2, 5, 7, 12, 30])
    return LiftTable(rows, rng.normal(size=(6, 6)).astype(np.float32), np.log(share / share[1:].sum()), np.array([0.7], np.float32))


def on_device(folder: Path, recipe: Recipe, counts: Counts | LiftTable | None = None) -> DeviceRecommender:
    write_device_model(folder, recipe, to_numpy(weights_of(recipe)), CATALOGUE, counts, run="a run", round=7)
    return DeviceRecommender(folder)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_scores_are_those_of_the_torch_recommender_with_the_head_merged_in(encoder: str, tmp_path: Path):
    recipe = recipe_of(encoder)
    device = on_device(tmp_path / "model", recipe)
    head_D = np.linspace(-1, 1, D).astype(np.float32)
    for history in HISTORIES:
        rows = np.array(history, dtype=np.int64)
        for head in (None, head_D):
            heads = None if head is None else lambda users: np.tile(head_D, (len(users), 1))
            wanted = Recommender(recipe, weights_of(recipe), heads=heads)([rows], np.zeros(1, np.int64))["score"][0].numpy()
            np.testing.assert_allclose(device.scores(rows, head), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 16, 17, 23])
def test_hgrn_runs_through_a_window_of_any_length_in_pieces_as_event_by_event(window: int, tmp_path: Path):
    recipe = recipe_of("hgrn", window, blocks=3)
    device = on_device(tmp_path / "model", recipe)
    rows = np.random.default_rng(window).integers(1, ITEMS + 1, window + 1)
    for length in range(1, window + 2):
        wanted = Recommender(recipe, weights_of(recipe))([rows[:length]], np.zeros(1, np.int64))["score"][0].numpy()
        np.testing.assert_allclose(device.scores(rows[:length]), wanted, rtol=1e-5, atol=1e-5)


def test_the_mean_of_a_history_longer_than_the_window_is_that_of_the_torch_recommender(tmp_path: Path):
    recipe = recipe_of("hgrn", head={"history": 2.5})
    device = on_device(tmp_path / "model", recipe)
    for history in HISTORIES:
        rows = np.array(history, dtype=np.int64)
        wanted = Recommender(recipe, weights_of(recipe))([rows], np.zeros(1, np.int64))["score"][0].numpy()
        np.testing.assert_allclose(device.scores(rows), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("encoder", "history"), [*((name, 0.0) for name in ENCODERS), ("hgrn", 2.5)])
def test_a_step_of_the_head_is_minus_the_slope_that_autograd_gives_of_the_same_loss(encoder: str, history: float, tmp_path_factory: pytest.TempPathFactory):
    recipe = recipe_of(encoder, head={"name": "user-vector", "adapt": 0.5, "history": history})
    device, weights = on_device(tmp_path_factory.mktemp("device") / "model", recipe), weights_of(recipe)
    table_ID = weights["items"]

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(1, ITEMS), min_size=1, max_size=12), st.integers(1, ITEMS), arrays(np.float32, D, elements=st.floats(-3, 3, width=32)))
    def check(items: list[int], row: int, start_D: NDArray[np.float32]) -> None:
        rows = np.array(items, dtype=np.int64)
        head = torch.tensor(start_D, requires_grad=True)
        mean_D = table_ID[rows].mean(0) if history else 0.0
        scores_I = (Recommender(recipe, weights).encode([rows])[0] + head + history * mean_D) @ table_ID.T
        # Row 0 is no item.
        F.cross_entropy(scores_I[None, 1:], torch.tensor([row - 1])).backward()
        assert head.grad is not None
        np.testing.assert_allclose(device.step(rows, row, start_D), -head.grad.numpy(), atol=1e-5)

    check()


def test_scores_of_a_graph_with_a_step_are_those_of_one_without(tmp_path: Path):
    plain, adapting = recipe_of(head={"name": "user-vector"}), recipe_of(head={"name": "user-vector", "adapt": 0.5})
    rows, head_D = np.array([2, 9, 2]), np.linspace(-1, 1, D).astype(np.float32)
    before, after = on_device(tmp_path / "plain", plain), on_device(tmp_path / "adapting", adapting)
    assert np.array_equal(before.scores(rows, head_D), after.scores(rows, head_D))
    with pytest.raises(Exception, match="Invalid input name: target"):
        before.step(rows, 4, head_D)


PLAN = {"privacy": {"clip_norm": 1.0, "noise_multiplier": 1.0, "counts_noise_multiplier": 1.0}}


@pytest.mark.parametrize(
    ("counts", "sections"),
    [
        (some_counts(), {"counts": {"strength": 2.0}}),
        (some_counts(), {"counts": {"form": "log-lift"}}),
        (some_counts(), {"counts": {"form": "log-lift"}, "server": {"rounds": 0}}),
        (some_table(), {"counts": {"clip_norm": 1.0, "items": 6}, "server": {"sampling": "poisson"}, **PLAN}),
    ],
)
def test_the_list_is_that_of_the_command_counts_included(counts: Counts | LiftTable, sections: dict[str, object], tmp_path: Path):
    recipe = recipe_of("sasrec", **sections)
    weights = weights_of(recipe)
    state = first_state(recipe)
    layout = layout_of(weights)
    trained = type(state)("training", 1, flatten(weights, layout), state.memory, counts, {})
    device = on_device(tmp_path / "model", recipe, counts)
    for history in HISTORIES[1:]:  # After none all may be equal, and torch then lists them in any order.
        tokens = [f"i{row}" for row in history]
        for include_seen in (False, True):
            wanted = recommend(Checkpoint(trained, recipe, CATALOGUE, "", ""), tokens, k=10, include_seen=include_seen)
            found = device.recommend(tokens, k=10, exclude_seen=not include_seen)
            assert [(one.item, one.title) for one in found] == [(one["item"], one["title"]) for one in wanted]
            np.testing.assert_allclose([one.score for one in found], [one["score"] for one in wanted], rtol=1e-5, atol=1e-5)


def test_items_that_the_catalogue_does_not_list_are_passed_over_and_k_may_be_larger_than_it(tmp_path: Path):
    device = on_device(tmp_path / "model", recipe_of())
    assert device.recommend(["i4", "gone", "i2"], k=3, exclude_seen=True) == device.recommend(["i4", "i2"], k=3, exclude_seen=True)
    everything = device.recommend(["i4"], k=1000, exclude_seen=True)
    assert sorted(one.item for one in everything) == sorted(set(CATALOGUE.tokens) - {"i4"})
    assert next(one.title for one in everything if one.item == "i3") == "The Third"


def test_of_equal_scores_the_smaller_row_comes_first(tmp_path: Path):
    recipe = recipe_of()
    flat = {name: np.zeros_like(leaf) for name, leaf in to_numpy(weights_of(recipe)).items()}
    write_device_model(tmp_path / "model", recipe, flat, CATALOGUE, None, run="a run", round=1)
    assert [one.item for one in DeviceRecommender(tmp_path / "model").recommend(["i2"], k=4, exclude_seen=True)] == ["i1", "i3", "i4", "i5"]


def test_a_rounds_weights_replace_the_encoder_and_say_where_they_come_from(tmp_path: Path):
    recipe = recipe_of()
    before = on_device(tmp_path / "model", recipe)
    other = {name: -leaf for name, leaf in to_numpy(weights_of(recipe)).items()}
    write_encoder(tmp_path / "model", recipe, other, run="a run", round=8)
    after = DeviceRecommender(tmp_path / "model")
    assert (before.round, after.round, after.run) == (7, 8, "a run")
    assert not np.allclose(before.scores(np.array([4])), after.scores(np.array([4])))


def test_a_process_that_was_killed_between_two_names_left_the_old_model(tmp_path: Path):
    folder = tmp_path / "model"
    assert not settle(folder)
    on_device(folder, recipe_of())
    os.rename(folder, tmp_path / ".model.old")
    assert settle(folder)
    assert DeviceRecommender(folder).round == 7
    on_device(folder, recipe_of("hgrn"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert DeviceRecommender(folder).recipe.encoder.name == "hgrn"


def test_a_model_that_is_not_whole_or_of_two_is_refused(tmp_path: Path):
    folder = tmp_path / "model"
    on_device(folder, recipe_of())
    kept = (folder / "encoder.onnx").read_bytes()
    (folder / "encoder.onnx").write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as a model"):
        DeviceRecommender(folder)
    (folder / "encoder.onnx").unlink()
    with pytest.raises(CheckpointError, match="not a whole model"):
        DeviceRecommender(folder)
    (folder / "encoder.onnx").write_bytes(kept)
    (folder / "catalogue.jsonl").write_text('{"row": 0, "token": null}\n{"row": 1, "token": "other"}\n')
    with pytest.raises(CatalogueMismatch):
        DeviceRecommender(folder)


def test_an_encoder_of_ones_own_has_no_graph(tmp_path: Path):
    recipe = recipe_of()
    foreign = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"name": "fedssl.encoders.sasrec:sasrec"})})
    with pytest.raises(ConfigError, match="has no ONNX graph, only sasrec"):
        write_device_model(tmp_path / "model", foreign, to_numpy(weights_of(recipe)), CATALOGUE, None, run="", round=0)
    assert not any(tmp_path.iterdir())
