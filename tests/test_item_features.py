"""Item vectors with a frozen part: the chain rule, rounds with them, resumes, and what is not touched by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fedssl_simulations.run import simulate
from safetensors.numpy import load_file, save_file
from small import dataset_of, learned, small_config, small_dataset

from fedssl.checkpoints import read_checkpoint
from fedssl.data.dataset import Dataset
from fedssl.errors import CheckpointError, RunFolderError
from fedssl.item_features import folded, left_out_rows, projection_of, slope_of_parts, with_projection
from fedssl.parts import initial_weights, make_parts
from fedssl.server_round import first_state
from fedssl.weights import ITEMS, flatten, layout_of, unflatten

CONFIG = small_config({"server": {"rounds": 4, "average_from": 2}, "system": {"checkpoint_every": 1, "keep_checkpoints": 9}})


def known_dataset(columns: int = 3) -> Dataset:
    """The small data set, and random numbers of which the first item has none."""
    features = np.random.default_rng(1).normal(size=(small_dataset().catalogue.num_items, columns)).astype(np.float32)
    features[0] = 0.0
    return replace(small_dataset(), features=features)


def test_an_item_is_its_row_and_its_projected_features():
    layout = layout_of({"body": torch.zeros(1), ITEMS: torch.zeros(3, 2)})
    features_IF = torch.tensor([[0.0], [1.0], [2.0]])
    parts_Q = with_projection(torch.tensor([9.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]), features_IF, layout)
    assert folded(parts_Q, features_IF, layout).equal(parts_Q[:7])
    projection_of(parts_Q, layout)[:] = torch.tensor([[10.0, 20.0]])
    assert folded(parts_Q, features_IF, layout).tolist() == [9.0, 0.0, 0.0, 11.0, 22.0, 23.0, 44.0]


def test_what_an_update_says_to_rows_and_projection_is_the_slope_of_both():
    rng = torch.Generator().manual_seed(1)
    layout = layout_of({"body": torch.zeros(4), ITEMS: torch.zeros(6, 5)})
    features_IF, slope_P = torch.randn(6, 3, generator=rng), torch.randn(34, generator=rng)
    parts_Q = torch.randn(34 + 15, generator=rng).requires_grad_()
    flat_P = torch.cat([parts_Q[:4], (parts_Q[4:34].view(6, 5) + features_IF @ parts_Q[34:].view(3, 5)).flatten()])
    (wanted_Q,) = torch.autograd.grad(flat_P @ slope_P, parts_Q)
    assert torch.allclose(slope_of_parts(slope_P, features_IF, layout), wanted_Q, rtol=1e-5, atol=1e-6)


def test_a_round_of_plain_sgd_moves_an_item_by_what_all_items_like_it_learned(tmp_path: Path):
    dataset = dataset_of(*[[1, 2, 3, 1, 2, 3]] * 6, num_items=5)
    features = np.zeros((5, 1), dtype=np.float32)
    features[[1, 4]] = 1.0  # Items 2 and 5 are alike, and nobody met item 5.
    config = small_config(
        {"task": [{"name": "next-item", "negatives": 2}], "server": {"rounds": 1, "cohort": 6, "optimizer": "sgd", "lr": 1.0, "schedule": "constant"}}
    )
    plain = simulate(config, out=tmp_path / "plain", dataset=dataset)
    known = simulate(config, out=tmp_path / "known", dataset=replace(dataset, features=features))
    start, without, having = initial_weights(plain.recipe)[ITEMS], *(run.state.released(run.recipe)[ITEMS] for run in (plain, known))
    moved = without - start
    assert torch.allclose(having[1], without[1]) and torch.allclose(having[3], without[3])
    assert torch.allclose(having[5] - start[5], moved[5] + moved[2] + moved[5], atol=1e-6)
    assert torch.allclose(having[2] - start[2], moved[2] + moved[2] + moved[5], atol=1e-6)
    assert moved[2].norm() > 1e-3


def test_a_run_with_features_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(tmp_path: Path):
    dataset = known_dataset()
    simulate(CONFIG, out=tmp_path / "whole", dataset=dataset)
    asked = iter(range(9))
    stopped = simulate(CONFIG, out=tmp_path / "halves", dataset=dataset, should_stop=lambda: next(asked) >= 3)
    assert not stopped.is_finished
    simulate(resume=tmp_path / "halves", dataset=dataset)
    assert learned(tmp_path / "halves") == learned(tmp_path / "whole")


def test_a_checkpoint_holds_the_sum_of_both_parts_and_the_parts(tmp_path: Path):
    run = simulate(CONFIG, out=tmp_path / "run", dataset=known_dataset())
    folder = tmp_path / "run" / "checkpoints" / "round-000004"
    state, layout = read_checkpoint(folder).state, make_parts(run.recipe).layout
    assert state.features is not None and state.average_P is not None and state.features.shape == (run.recipe.num_items + 1, 3)
    summed = unflatten(folded(state.average_P, state.features, layout), layout)[ITEMS]
    assert torch.from_numpy(load_file(folder / "weights.safetensors")[ITEMS]).equal(summed)
    assert projection_of(state.average_P, layout).norm() > 0.01
    assert flatten(state.weights(run.recipe), layout).numel() == layout.num_weights == state.weights_P.numel() - 3 * 8


def test_without_features_a_checkpoint_is_what_it_was_and_no_device_sends_more_with_them(tmp_path: Path):
    plain = simulate(CONFIG, out=tmp_path / "plain", dataset=small_dataset())
    known = simulate(CONFIG, out=tmp_path / "known", dataset=known_dataset())
    assert not list((tmp_path / "plain").rglob("features.safetensors")) and plain.recipe.features == ""
    for name in ("upload_bytes_per_user", "download_bytes_per_user"):
        assert plain.report["cost"][name] == known.report["cost"][name]
    assert plain.recipe.hash != known.recipe.hash


def test_a_run_is_not_gone_on_with_when_its_items_are_known_by_other_features(tmp_path: Path):
    simulate(CONFIG, out=tmp_path / "run", dataset=known_dataset(), should_stop=iter([False, False, True]).__next__)
    for other in (small_dataset(), known_dataset(columns=2)):
        with pytest.raises(RunFolderError, match="other settings"):
            simulate(resume=tmp_path / "run", dataset=other)


def test_changed_features_of_a_checkpoint_are_refused(tmp_path: Path):
    simulate(CONFIG, out=tmp_path / "run", dataset=known_dataset())
    folder = tmp_path / "run" / "checkpoints" / "round-000004"
    path, whole = folder / "features.safetensors", load_file(folder / "features.safetensors")
    save_file({**whole, "features": whole["features"] * 2}, path)
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)
    path.unlink()
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


def test_first_vectors_from_the_counts_are_the_rows_and_the_projection_is_added(tmp_path: Path):
    config = small_config({"counts": {"lags": 2}, "encoder": {"first_items": "counts"}, "server": {"rounds": 2, "lr": 1e-30}})
    plain, known = (simulate(config, out=tmp_path / name, dataset=data) for name, data in (("plain", small_dataset()), ("known", known_dataset())))
    assert plain.state.released(plain.recipe)[ITEMS].equal(known.state.released(known.recipe)[ITEMS])


def test_rows_are_left_out_by_chance_of_the_round_and_never_where_nothing_else_is_known():
    features_IF = torch.ones(2001, 2)
    features_IF[0] = features_IF[7] = 0.0
    one, other = (left_out_rows(features_IF, 0.25, seed=1, round=round) for round in (1, 2))
    assert not one[0] and not one[7] and abs(int(one.sum()) - 500) < 80
    assert one.equal(left_out_rows(features_IF, 0.25, seed=1, round=1)) and not one.equal(other)


def test_a_row_that_is_left_out_of_a_round_is_neither_sent_nor_moved_and_its_features_learn(tmp_path: Path):
    server = {"rounds": 1, "optimizer": "sgd", "lr": 1.0, "schedule": "constant", "rows_left_out": 0.5}
    run = simulate(small_config({"server": server}), out=tmp_path / "run", dataset=known_dataset())
    recipe, layout = run.recipe, make_parts(run.recipe).layout
    begin = first_state(recipe, known_dataset().features)
    is_left_out = begin.left_out(recipe, 1)
    assert is_left_out is not None and 5 < int(is_left_out.sum()) < 35
    assert not begin.sent(recipe)[ITEMS][is_left_out].any() and begin.sent(recipe)[ITEMS][~is_left_out].equal(begin.weights(recipe)[ITEMS][~is_left_out])
    before, after = (state.weights_P[layout.slice_of(ITEMS)].view(-1, 8) for state in (begin, run.state))
    assert after[is_left_out].equal(before[is_left_out]) and not after[~is_left_out].equal(before[~is_left_out])
    assert projection_of(run.state.weights_P, layout).any()
