"""A model carried over to another catalogue: what stays, what is matched, what begins anew, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fedssl_simulations.run import Run, simulate
from small import PLAN, small_config, small_dataset

from fedssl.catalogue import Catalogue
from fedssl.checkpoints import Checkpoint, read_checkpoint
from fedssl.data.features_file import hash_of
from fedssl.errors import CatalogueMismatch, ConfigError
from fedssl.item_features import projection_of
from fedssl.parts import initial_weights, make_parts
from fedssl.recipe import Recipe, make_recipe
from fedssl.transfer import carried_over
from fedssl.weights import ITEMS

CONFIG = small_config({"server": {"rounds": 3}})
KNOWN = small_dataset().catalogue
ELSEWHERE = Catalogue((*reversed(KNOWN.tokens[:30]), "new", "newer"))


def features_of(catalogue: Catalogue) -> np.ndarray:
    """Numbers by the token alone."""
    return np.array([[len(token), sum(token.encode()) % 7, 1.0] for token in catalogue.tokens], dtype=np.float32)


def run_and_checkpoint(folder: Path, *, has_features: bool = False, rounds: int = 3, average_from: int = 0) -> tuple[Run, Checkpoint]:
    dataset = replace(small_dataset(), features=features_of(KNOWN)) if has_features else small_dataset()
    run = simulate(small_config({"server": {"rounds": rounds, "average_from": average_from}}), out=folder / "run", dataset=dataset)
    return run, read_checkpoint(folder / "run" / "checkpoints" / f"round-{rounds:06d}")


def recipe_of(catalogue: Catalogue, features: np.ndarray | None = None, config: object = CONFIG) -> Recipe:
    return make_recipe(config, num_items=catalogue.num_items, catalogue=catalogue.hash, features=hash_of(features))  # type: ignore[arg-type]


@pytest.mark.parametrize("has_features", [False, True])
def test_to_its_own_catalogue_a_model_is_carried_over_whole(tmp_path: Path, has_features: bool):
    run, old = run_and_checkpoint(tmp_path, has_features=has_features, average_from=2)
    features = features_of(KNOWN) if has_features else None
    state = carried_over(old, run.recipe, KNOWN, features)
    for name, leaf in run.state.released(run.recipe).items():
        assert leaf.equal(state.released(run.recipe)[name]), name
    assert state.round == 0 and state.average_P is None and not any(leaf.any() for leaf in state.memory.values())


def test_the_body_is_taken_over_items_are_matched_by_token_and_others_begin_anew(tmp_path: Path):
    run, old = run_and_checkpoint(tmp_path)
    recipe = recipe_of(ELSEWHERE)
    before, after, first = run.state.released(run.recipe), carried_over(old, recipe, ELSEWHERE).released(recipe), initial_weights(recipe)
    assert all(after[name].equal(leaf) for name, leaf in before.items() if name != ITEMS)
    assert after[ITEMS][1:31].equal(before[ITEMS][1:31].flip(0))
    assert after[ITEMS][31:].equal(first[ITEMS][31:]) and not after[ITEMS][0].any()


def test_an_item_that_only_features_are_known_of_is_what_they_project_to(tmp_path: Path):
    run, old = run_and_checkpoint(tmp_path, has_features=True)
    features = features_of(ELSEWHERE)
    features[31] = 0.0
    recipe = recipe_of(ELSEWHERE, features)
    state = carried_over(old, recipe, ELSEWHERE, features)
    after, projection = state.released(recipe)[ITEMS], projection_of(run.state.weights_P, make_parts(run.recipe).layout)
    assert torch.allclose(after[31], torch.from_numpy(features[30]) @ projection, atol=1e-6)
    assert after[32].equal(initial_weights(recipe)[ITEMS][32])
    assert torch.allclose(after[1:31], run.state.released(run.recipe)[ITEMS][1:31].flip(0), atol=1e-6)


@pytest.mark.parametrize("has_features", [False, True])
def test_items_keep_their_vectors_where_one_side_alone_has_features(tmp_path: Path, has_features: bool):
    run, old = run_and_checkpoint(tmp_path, has_features=has_features)
    features = None if has_features else features_of(ELSEWHERE)
    recipe = recipe_of(ELSEWHERE, features)
    after = carried_over(old, recipe, ELSEWHERE, features).released(recipe)[ITEMS]
    assert after[1:31].equal(run.state.released(run.recipe)[ITEMS][1:31].flip(0))


def test_features_that_say_something_else_of_the_same_items_are_refused(tmp_path: Path):
    _, old = run_and_checkpoint(tmp_path, has_features=True)
    features = -features_of(ELSEWHERE)
    with pytest.raises(CatalogueMismatch, match="something else of the items"):
        carried_over(old, recipe_of(ELSEWHERE, features), ELSEWHERE, features)


@pytest.mark.parametrize("changed", [{"width": 16}, {"blocks": 2}, {"name": "gru4rec"}, {"window": 12}])
def test_an_encoder_of_another_shape_is_refused(tmp_path: Path, changed: dict[str, object]):
    _, old = run_and_checkpoint(tmp_path, rounds=1)
    with pytest.raises(ConfigError, match="the checkpoint's encoder is sasrec of width 8, 1 blocks"):
        carried_over(old, recipe_of(KNOWN, config=small_config({"encoder": changed})), KNOWN)


def test_a_run_begins_where_its_start_ended_and_is_resumed_without_it(tmp_path: Path):
    first, _ = run_and_checkpoint(tmp_path)
    start = str(tmp_path / "run" / "checkpoints" / "round-000003")
    config = small_config({"server": {"rounds": 2, "lr": 1e-30}}).model_copy(update={"start": start})
    asked = iter(range(9))
    stopped = simulate(config, out=tmp_path / "next", dataset=small_dataset(), should_stop=lambda: next(asked) >= 1)
    assert not stopped.is_finished
    (tmp_path / "run").rename(tmp_path / "gone")
    run = simulate(resume=tmp_path / "next", dataset=small_dataset())
    assert run.state.weights_P.equal(first.state.weights_P) and run.report["test"] == first.report["test"]


def test_under_a_plan_a_start_that_the_same_histories_taught_is_refused(tmp_path: Path):
    run_and_checkpoint(tmp_path)
    start = str(tmp_path / "run" / "checkpoints" / "round-000003")
    with pytest.raises(ConfigError, match="taught by the very histories"):
        simulate(small_config(PLAN).model_copy(update={"start": start}), out=tmp_path / "private", dataset=small_dataset())
    simulate(small_config(PLAN).model_copy(update={"start": start}), out=tmp_path / "others", dataset=small_dataset(seed=4))
