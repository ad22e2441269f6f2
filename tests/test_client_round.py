"""What a node does with a Download: who trains, what leaves, and that one broken user harms nobody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small import BOMB, PLAN, dataset_of, deal, recipe_of, small_config, small_dataset

from fedssl.checking import check
from fedssl.chunk_training import cut_chunks
from fedssl.client_round import CLIENT_PHASES, ClientPhase, Shard, client_round, open_shard, write_shard
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset
from fedssl.errors import ConfigError, DataError, UploadRefused, WireError
from fedssl.privacy.manifest import WEIGHT_STEP, squared_norm
from fedssl.records import Address, Download, SparseSum, Upload
from fedssl.server_round import first_state
from fedssl.weights import to_numpy

HEADS: dict[str, Any] = {"head": {"name": "user-vector", "lr": 0.5}}


def ask(config: RunConfig, dataset: Dataset, users: list[int] | None = None, *, phase: str = "training", round: int = 1) -> Download:
    recipe = recipe_of(config, dataset)
    tensors = to_numpy(first_state(recipe).weights(recipe)) if phase == "training" else {}
    return Download(Address("test", phase, round), recipe, tensors, None if users is None else np.array(users, dtype=np.int64))


def shard_of(config: RunConfig, dataset: Dataset, heads: Path | None = None) -> Shard:
    return deal(config, dataset, [np.arange(dataset.histories.num_users)], heads)[1]


def dense(upload: Upload, name: str = "update") -> NDArray[np.int64]:
    value = upload.sums[name]
    assert isinstance(value, np.ndarray)
    return value.astype(np.int64)


def test_an_upload_is_the_sum_of_what_each_user_sends_alone():
    config = small_config({"system": {"users_per_chunk": 1}})
    shard = shard_of(config, small_dataset())
    together = client_round(ask(config, small_dataset(), [2, 5, 11]), shard)
    alone = [client_round(ask(config, small_dataset(), [user]), shard) for user in (2, 5, 11)]
    for name in ("update", "weight", "loss"):
        assert np.array_equal(dense(together, name), sum(dense(upload, name) for upload in alone))


def test_without_a_plan_update_weight_and_loss_leave_and_under_one_the_update_alone():
    without = client_round(ask(small_config(), small_dataset(), [1, 2]), shard_of(small_config(), small_dataset()))
    assert without.sums.keys() == {"update", "weight", "loss"}
    assert without.recipe == recipe_of(small_config(), small_dataset()).hash
    config = small_config(PLAN)
    assert client_round(ask(config, small_dataset(), [1, 2]), shard_of(config, small_dataset())).sums.keys() == {"update"}


def test_no_user_leaves_longer_than_the_clip_norm():
    config = small_config(PLAN, {"local": {"lr": 50.0, "steps": 2}})
    download = ask(config, small_dataset(), [])
    step = CLIENT_PHASES["training"].declared(download, _parts(download))["update"].step
    shard = shard_of(config, small_dataset())
    norms = [squared_norm(dense(client_round(replace(download, users=np.array([user])), shard))) ** 0.5 * step for user in range(24)]
    assert 0.499 < max(norms) <= 0.5
    assert shard.notes.norms_U.min() > 0.5


def _parts(download: Download) -> Any:
    from fedssl.parts import make_parts

    return make_parts(download.recipe)


def test_a_device_of_one_user_sends_what_a_shard_would_add():
    config = small_config({"system": {"users_per_chunk": 1}})
    device = deal(config, small_dataset(), [np.array([5])])[1]
    at_home = client_round(ask(config, small_dataset()), device)
    in_crowd = client_round(ask(config, small_dataset(), [5]), shard_of(config, small_dataset()))
    assert all(np.array_equal(dense(at_home, name), dense(in_crowd, name)) for name in in_crowd.sums)
    assert dense(at_home).any()


def test_one_device_sends_int32():
    assert client_round(ask(small_config(), small_dataset(), [3]), shard_of(small_config(), small_dataset())).sums["update"].dtype == np.int32  # type: ignore[union-attr]


@pytest.mark.parametrize("users", [[3, 3], [5, 2], [24], [-1], [0, 99]])
def test_users_named_twice_out_of_order_or_living_elsewhere_are_refused(users: list[int]):
    with pytest.raises(WireError, match=r"users"):
        client_round(ask(small_config(), small_dataset(), users), shard_of(small_config(), small_dataset()))


def test_a_phase_that_nobody_knows_is_refused():
    with pytest.raises(WireError, match=r"phase 'gossip' is not known"):
        client_round(ask(small_config(), small_dataset(), [1], phase="gossip"), shard_of(small_config(), small_dataset()))


def test_a_recipe_with_heads_needs_a_folder_for_them():
    config = small_config(HEADS)
    with pytest.raises(DataError, match="no folder for heads"):
        client_round(ask(config, small_dataset(), [1]), shard_of(config, small_dataset()))


LEAKS: dict[str, Any] = {
    "head": np.ones(8, dtype=np.float32),
    "update2": np.ones(8, dtype=np.int64),
    "history": np.array([3, 1, 4], dtype=np.int32),
    "cohort": np.array([7], dtype=np.int64),
    "loss": np.array([1], dtype=np.int64),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_phase_that_adds_a_field_has_its_upload_refused_before_it_leaves(name: str, monkeypatch: pytest.MonkeyPatch):
    config = small_config(PLAN)
    real = CLIENT_PHASES["training"]

    def leaking(download: Download, parts: Any, shard: Shard, users: NDArray[np.int64]) -> Any:
        return {**real.run(download, parts, shard, users), name: LEAKS[name]}

    monkeypatch.setitem(CLIENT_PHASES, "training", ClientPhase(real.declared, leaking))
    with pytest.raises(UploadRefused, match=f"'{name}' is not declared"):
        client_round(ask(config, small_dataset(), [1]), shard_of(config, small_dataset()))


@pytest.mark.parametrize(
    "instead", [np.ones(8, dtype=np.float32), np.ones(8, dtype=np.int64), SparseSum(*(np.ones(1, dtype=np.int32) for _ in range(3)), (2, 2))]
)
def test_a_head_or_history_under_a_declared_name_is_refused_too(instead: Any, monkeypatch: pytest.MonkeyPatch):
    config = small_config(PLAN)
    real = CLIENT_PHASES["training"]
    monkeypatch.setitem(CLIENT_PHASES, "training", ClientPhase(real.declared, lambda *asked: {"update": instead}))
    with pytest.raises(UploadRefused, match="'update'"):
        client_round(ask(config, small_dataset(), [1]), shard_of(config, small_dataset()))


WITH_BOMB = dataset_of([1, 2, 3, 4, 5], [6, BOMB, 7, 8, 9], [9, 8, 7, 6, 5, 4], [2, 4, 6, 8, 1], num_items=BOMB)
BOMBED: dict[str, Any] = {"task": [{"name": "small:next_item_with_a_bomb"}]}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_user_whose_update_is_nan_counts_as_zero_and_the_others_stay(clip: float | None, tmp_path: Path):
    config = small_config(BOMBED, HEADS, {"privacy": {"clip_norm": clip}, "system": {"users_per_chunk": 1}})
    bombed, spared = shard_of(config, WITH_BOMB, tmp_path / "a"), shard_of(config, WITH_BOMB, tmp_path / "b")
    everybody = client_round(ask(config, WITH_BOMB), bombed)
    others = client_round(ask(config, WITH_BOMB, [0, 2, 3]), spared)
    assert bombed.notes.broken_users == 1 and spared.notes.broken_users == 0
    assert np.isnan(bombed.notes.losses_U).sum() == 1
    for name in ("update", "weight", "loss"):
        assert np.array_equal(dense(everybody, name), dense(others, name))
    assert dense(everybody, "weight")[0] == round(3 / WEIGHT_STEP)


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_head_of_a_broken_user_is_not_changed(chunk: int, tmp_path: Path):
    config = small_config(BOMBED, HEADS, {"system": {"users_per_chunk": chunk}})
    shard = shard_of(config, WITH_BOMB, tmp_path)
    client_round(ask(config, WITH_BOMB), shard)
    store = shard.heads(recipe_of(config, WITH_BOMB))
    assert store is not None
    heads = store.read(np.arange(4))
    assert np.isfinite(heads).all()
    assert heads.any(1).tolist() == [True, False, True, True]


def test_without_a_clip_a_coordinate_beyond_the_grid_counts_as_zero():
    config = small_config({"local": {"lr": 1e4}})
    shard = shard_of(config, small_dataset())
    upload = client_round(ask(config, small_dataset(), [1, 2, 3]), shard)
    assert shard.notes.broken_users == 3
    assert not dense(upload).any() and not dense(upload, "weight").any()


def test_the_head_of_a_user_beyond_the_grid_is_not_changed_though_it_is_finite(tmp_path: Path):
    config = small_config(HEADS, {"local": {"lr": 1e4}})
    shard = shard_of(config, small_dataset(), tmp_path)
    client_round(ask(config, small_dataset(), [1, 2, 3]), shard)
    store = shard.heads(recipe_of(config, small_dataset()))
    assert store is not None and shard.notes.broken_users == 3
    assert not store.read(np.arange(24)).any()


def test_heads_change_where_they_live_and_are_in_no_upload(tmp_path: Path):
    config = small_config(HEADS)
    shard = shard_of(config, small_dataset(), tmp_path)
    upload = client_round(ask(config, small_dataset(), [2, 7]), shard)
    store = shard.heads(recipe_of(config, small_dataset()))
    assert store is not None
    assert np.flatnonzero(store.read(np.arange(24)).any(1)).tolist() == [2, 7]
    assert upload.sums.keys() == {"update", "weight", "loss"}


def test_a_round_that_begins_anew_gives_the_same_upload_and_the_same_heads(tmp_path: Path):
    config = small_config(HEADS)
    shard = shard_of(config, small_dataset(), tmp_path)
    store = shard.heads(recipe_of(config, small_dataset()))
    assert store is not None
    client_round(ask(config, small_dataset(), [1, 2]), shard)
    second = client_round(ask(config, small_dataset(), [2, 3], round=2), shard)
    heads = store.read(np.arange(24))
    client_round(ask(config, small_dataset(), [2, 5], round=3), shard)
    again = client_round(ask(config, small_dataset(), [2, 3], round=2), shard)
    assert np.array_equal(dense(second), dense(again))
    assert np.array_equal(heads, store.read(np.arange(24)))


LONG_AND_SHORT = dataset_of(
    [1, 2, 3, 8, 9],  # three to train on: two positions, one window of four
    [1, 2, 3, 4, 5, 8, 9],  # four positions, just the window
    [1, 2, 3, 4, 5, 6, 8, 9],  # one more
    [1, 8, 9],  # nothing to learn from
    [1, 2, 3, 4, 5] * 20 + [8, 9],  # 25 windows, which weigh as 16
    num_items=9,
)


def test_weights_by_windows_by_hand():
    config = small_config({"encoder": {"window": 4}, "server": {"weighting": "windows"}, "local": {"windows": 3}})
    shard = shard_of(config, LONG_AND_SHORT)
    uploads = [client_round(ask(config, LONG_AND_SHORT, [user]), shard) for user in range(5)]
    assert [dense(upload, "weight")[0] * WEIGHT_STEP * 16 for upload in uploads] == [1, 1, 2, 0, 16]
    equal = small_config({"encoder": {"window": 4}, "local": {"windows": 3}})
    for upload, user, share in zip(uploads, range(5), (1 / 16, 1 / 16, 2 / 16, 0, 1), strict=True):
        alike = client_round(ask(equal, LONG_AND_SHORT, [user]), shard)
        # Rounded toward zero once each.
        assert np.abs(dense(upload) - share * dense(alike)).max() <= 1 and dense(alike).any() == (share > 0)
        assert dense(upload, "loss")[0] == pytest.approx(share * dense(alike, "loss")[0], abs=1)


def test_a_lone_item_that_a_contrast_learns_from_fills_one_window():
    config = small_config({"server": {"weighting": "windows"}, "task": [{"name": "contrastive", "negatives": 3}]})
    assert dense(client_round(ask(config, LONG_AND_SHORT, [3]), shard_of(config, LONG_AND_SHORT)), "weight")[0] * WEIGHT_STEP == 1 / 16


@pytest.mark.parametrize("weighting", ["windows", "positions"])
def test_weights_that_differ_are_refused_under_a_plan(weighting: str):
    with pytest.raises(ConfigError, match=rf"\[server\] weighting = '{weighting}' lets a user weigh more than the clip; under a plan set weighting = 'equal'"):
        check(RunConfig, {"server": {"sampling": "poisson", "weighting": weighting}, "privacy": PLAN["privacy"]}, where="run.toml")


def test_chunks_are_users_of_like_length_each_once():
    users = np.array([1, 3, 4, 8, 10, 11, 15, 20])
    lengths = small_dataset().histories.training_lengths[users]
    chunks = cut_chunks(lengths, users, window=50, windows=1, users_per_chunk=5)
    assert [len(chunk) for chunk in chunks] == [5, 3]
    assert sorted(np.concatenate(chunks).tolist()) == list(range(8))
    assert lengths[chunks[0]].min() >= lengths[chunks[1]].max()


@given(lengths=st.lists(st.integers(0, 400), max_size=40), window=st.integers(2, 200), windows=st.integers(1, 3), most=st.integers(1, 9))
def test_chunks_of_long_windows_hold_fewer_users_but_never_none(lengths: list[int], window: int, windows: int, most: int):
    chunks = cut_chunks(np.array(lengths, dtype=np.int64), np.arange(len(lengths)), window=window, windows=windows, users_per_chunk=most)
    assert sorted(place for chunk in chunks for place in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        longest = max(min(lengths[place], window) for place in chunk) * windows
        assert len(chunk) == 1 or (len(chunk) <= most and len(chunk) * longest <= most * 50)


@given(lengths=st.lists(st.integers(0, 400), min_size=1, max_size=200), most=st.integers(1, 64))
def test_a_chunk_is_at_most_half_of_the_work_that_is_left_or_a_few_users(lengths: list[int], most: int):
    chunks = cut_chunks(np.array(lengths, dtype=np.int64), np.arange(len(lengths)), window=100, windows=1, users_per_chunk=most)
    work = [sum(min(max(lengths[place], 1), 100) for place in chunk) for chunk in chunks]
    for number, chunk in enumerate(chunks):
        longest = min(max(lengths[chunk[0]], 1), 100)
        assert len(chunk) <= 6 or work[number] < sum(work[number:]) / 2 + longest


def test_the_store_of_a_node_opens_as_the_shard_that_was_written(tmp_path: Path):
    users = np.array([4, 9, 17])
    write_shard(tmp_path / "node", small_dataset().histories, users, users_per_chunk=7, workers=2)
    shard = open_shard(tmp_path / "node")
    assert shard.users.tolist() == [4, 9, 17] and (shard.users_per_chunk, shard.pool.number) == (7, 2)
    assert np.array_equal(shard.events.items[: shard.events.cuts[1]], small_dataset().histories.of(4))


@pytest.mark.parametrize("name", ["users.npy", "node.json"])
def test_a_store_that_lacks_a_file_says_so(name: str, tmp_path: Path):
    write_shard(tmp_path / "node", small_dataset().histories, np.array([4]))
    (tmp_path / "node" / name).unlink()
    with pytest.raises(DataError, match="not the store of a node"):
        open_shard(tmp_path / "node")
