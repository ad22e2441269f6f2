"""Checkpoints: what was written is read again, byte for byte; whole or not there; and clear words for all else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from small import recipe_of, small_config, small_dataset, train

from fedssl.catalogue import Catalogue, write_catalogue
from fedssl.checkpoints import Checkpoint, list_checkpoints, read_checkpoint, write_checkpoint
from fedssl.counts import Counts
from fedssl.errors import CatalogueMismatch, CheckpointError

CONFIG = small_config({"counts": {}})
FILES = ["catalogue.jsonl", "counts.safetensors", "optimizer.safetensors", "recipe.json", "state.json", "weights.safetensors"]


@lru_cache(maxsize=1)
def trained() -> Checkpoint:
    state, _ = train(CONFIG, small_dataset())
    state = replace(state, charged={"counts": 1, "training": 2})
    return Checkpoint(state, recipe_of(CONFIG, small_dataset()), small_dataset().catalogue, "run-7", "print-9")


def at(round: int, phase: str = "training") -> Checkpoint:
    return replace(trained(), state=replace(trained().state, phase=phase, round=round))


def test_what_was_written_is_read_again_to_the_byte(tmp_path: Path):
    found = read_checkpoint(write_checkpoint(tmp_path, trained()))
    wrote, read = trained().state, found.state
    assert torch.equal(wrote.weights_P, read.weights_P)
    assert wrote.memory.keys() == read.memory.keys() and all(torch.equal(wrote.memory[name], read.memory[name]) for name in wrote.memory)
    assert wrote.counts is not None and read.counts is not None
    for part in ("starts", "columns", "values"):
        ours, theirs = getattr(wrote.counts, part), getattr(read.counts, part)
        assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes())
    assert (read.phase, read.round, read.charged) == ("training", 2, {"counts": 1, "training": 2})
    assert (found.recipe, found.catalogue, found.run, found.fingerprint) == (trained().recipe, trained().catalogue, "run-7", "print-9")


def test_the_same_checkpoint_is_the_same_bytes(tmp_path: Path):
    one, two = write_checkpoint(tmp_path / "one", trained()), write_checkpoint(tmp_path / "two", trained())
    assert sorted(path.name for path in one.iterdir()) == FILES
    assert [(one / name).read_bytes() for name in FILES] == [(two / name).read_bytes() for name in FILES]


def test_a_checkpoint_of_a_run_without_counts_has_none(tmp_path: Path):
    config = small_config()
    plain = Checkpoint(train(config, small_dataset())[0], recipe_of(config, small_dataset()), small_dataset().catalogue, "run", "print")
    assert read_checkpoint(write_checkpoint(tmp_path, plain)).state.counts is None


def averaged(rounds: int = 3) -> Checkpoint:
    config = small_config({"counts": {}, "server": {"rounds": rounds, "average_from": 2}})
    return Checkpoint(train(config, small_dataset())[0], recipe_of(config, small_dataset()), small_dataset().catalogue, "run", "print")


def test_an_average_is_what_the_checkpoint_releases_and_the_weights_of_training_lie_beside(tmp_path: Path):
    wrote = averaged()
    target = write_checkpoint(tmp_path, wrote)
    read = read_checkpoint(target).state
    assert wrote.state.average_P is not None and read.average_P is not None
    assert read.average_P.equal(wrote.state.average_P) and read.weights_P.equal(wrote.state.weights_P)
    assert sorted(path.name for path in target.iterdir()) == sorted([*FILES, "training.safetensors"])
    items = torch.from_numpy(load_file(target / "weights.safetensors")["items"])
    assert items.equal(read.released(wrote.recipe)["items"]) and not items.equal(read.weights(wrote.recipe)["items"])


@pytest.mark.parametrize("rounds", [1, 3])
def test_an_average_that_the_recipe_does_not_have_yet_or_lacks_is_refused(rounds: int, tmp_path: Path):
    made = averaged()
    state = made.state if rounds == 3 else replace(made.state, round=1, average_P=None)
    target = write_checkpoint(tmp_path, replace(made, state=state))
    assert read_checkpoint(target).state.round == rounds
    shutil.copy(target / "weights.safetensors", target / "training.safetensors")
    with_json("state.json", average=rounds == 1)(target)
    with pytest.raises(CheckpointError, match="disagree on whether late rounds are averaged"):
        read_checkpoint(target)


def test_weights_of_training_that_are_missing_cut_or_of_another_shape_are_refused(tmp_path: Path):
    target = write_checkpoint(tmp_path, averaged())
    whole = (target / "training.safetensors").read_bytes()
    cut("training.safetensors", 0.5)(target)
    with pytest.raises(CheckpointError, match="cut short or changed"):
        read_checkpoint(target)
    (target / "training.safetensors").write_bytes(whole)
    with_tensors("training.safetensors", lambda found: {**found, "items": found["items"][:-1].copy()})(target)
    with pytest.raises(CheckpointError, match=r"training.safetensors: 'items' is"):
        read_checkpoint(target)
    (target / "training.safetensors").unlink()
    with pytest.raises(CheckpointError, match="training"):
        read_checkpoint(target)


def test_no_key_and_no_pickle_is_in_a_checkpoint(tmp_path: Path):
    target = write_checkpoint(tmp_path, trained())
    told = {"format", "phase", "round", "charged", "counts", "popularity", "average", "clip_norm", "run", "fingerprint", "sha256"}
    assert json.loads((target / "state.json").read_text()).keys() == told
    assert not [path for path in target.iterdir() if path.suffix in (".pt", ".pkl", ".key", ".npy")]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path):
    for round in (2, 4, 10, 100):
        write_checkpoint(tmp_path, at(round), keep=keep)
    rounds = [2, 4, 10, 100][-keep:]
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"round-{round:06d}" for round in rounds]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-{round:06d}" for round in rounds]
    assert all(read_checkpoint(path).state.round == round for path, round in zip(list_checkpoints(tmp_path), rounds, strict=True))


def test_the_best_is_kept_beside_the_newest(tmp_path: Path):
    for round, best in ((2, 0), (4, 4), (6, 4), (8, 4)):
        write_checkpoint(tmp_path, at(round), best=best)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round-000004", "round-000008"]
    write_checkpoint(tmp_path, at(10), best=10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round-000010"]


def test_no_best_keeps_nothing_of_the_counts(tmp_path: Path):
    write_checkpoint(tmp_path, at(1, phase="counts"))
    write_checkpoint(tmp_path, at(1), best=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round-000001"]


def test_a_checkpoint_before_training_comes_before_those_of_training(tmp_path: Path):
    for done in (at(1, phase="counts"), at(2, phase="counts"), at(10, phase="counts"), at(1)):
        write_checkpoint(tmp_path, done, keep=4)
    found = [read_checkpoint(path).state for path in list_checkpoints(tmp_path)]
    assert [(state.phase, state.round) for state in found] == [("counts", 1), ("counts", 2), ("counts", 10), ("training", 1)]


class Killed(BaseException):
    pass


def killed_at(call: int, real: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(1, 1000))

    def function(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*arguments, **named)

    return function


# Every file, the folder and its parent are synced; the target is renamed, then the old one.
@pytest.mark.parametrize(
    ("name", "call"), [*(("fsync", call) for call in range(1, 9)), ("rename", 1), ("rename", 2), ("rmdir", 1), ("unlink", 1), ("unlink", 3)]
)
def test_killed_anywhere_every_checkpoint_that_is_seen_is_whole(name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_checkpoint(tmp_path, at(2))
    with monkeypatch.context() as patched:
        patched.setattr(os, name, killed_at(call, getattr(os, name)))
        with pytest.raises(Killed):
            write_checkpoint(tmp_path, at(4))
    seen = [read_checkpoint(path).state.round for path in list_checkpoints(tmp_path)]
    assert seen in ([2], [2, 4], [4])
    # The next one cleans up, also where the same round is written again.
    write_checkpoint(tmp_path, at(4))
    write_checkpoint(tmp_path, at(6))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000006"]
    assert read_checkpoint(tmp_path / "round-000006").state.round == 6


def test_files_are_on_disk_before_the_checkpoint_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        synced.append("renamed")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_checkpoint(tmp_path, trained())
    assert sorted(synced[:6]) == FILES
    assert synced[6:] == [".round-000002.new", "renamed", tmp_path.name]


# ---- clear words ----


def broken(folder: Path, change: Callable[[Path], None]) -> Path:
    target = write_checkpoint(folder, trained())
    change(target)
    return target


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def change(target: Path) -> None:
        raw = (target / name).read_bytes()
        (target / name).write_bytes(raw[: int(len(raw) * keep)])

    return change


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_a_file_that_was_cut_short_is_refused(name: str, keep: float, tmp_path: Path):
    with pytest.raises((CheckpointError, CatalogueMismatch), match=r"use another (checkpoint|one)|recipe is not JSON"):
        read_checkpoint(broken(tmp_path, cut(name, keep)))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_noticed(name: str, tmp_path: Path):
    target = write_checkpoint(tmp_path, trained())
    raw = (target / name).read_bytes()
    for place in np.random.default_rng(0).integers(0, len(raw), 60):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << int(place) % 8
        (target / name).write_bytes(flipped)
        with pytest.raises((CheckpointError, CatalogueMismatch)):
            read_checkpoint(target)
    (target / name).write_bytes(raw)
    read_checkpoint(target)


def test_a_flipped_bit_in_an_array_is_said_with_its_file(tmp_path: Path):
    def flip(target: Path) -> None:
        raw = bytearray((target / "optimizer.safetensors").read_bytes())
        raw[-3] ^= 1
        (target / "optimizer.safetensors").write_bytes(raw)

    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: not the bytes that were written"):
        read_checkpoint(broken(tmp_path, flip))


def test_a_checkpoint_of_a_version_without_sums_is_read(tmp_path: Path):
    def older(target: Path) -> None:
        about = json.loads((target / "state.json").read_text())
        del about["sha256"]
        about["format"] = 1
        (target / "state.json").write_text(json.dumps(about))

    assert read_checkpoint(broken(tmp_path, older)).state.round == 2


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(name: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=name.split(".")[0]):
        read_checkpoint(broken(tmp_path, lambda target: (target / name).unlink()))


def test_a_checkpoint_that_is_not_there_is_refused_with_an_example(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no such checkpoint; name a folder like RUN/checkpoints/round-000120"):
        read_checkpoint(tmp_path / "round-000001")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        read_checkpoint(tmp_path / "empty")
    (tmp_path / "run" / "checkpoints" / "round-000002").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "round-000010").mkdir()
    with pytest.raises(CheckpointError, match=r"run: a run's folder; name one of its checkpoints, such as .*/run/checkpoints/round-000010$"):
        read_checkpoint(tmp_path / "run")


def with_json(name: str, **values: Any) -> Callable[[Path], None]:
    def change(target: Path) -> None:
        (target / name).write_text(json.dumps({**json.loads((target / name).read_text()), **values}))

    return change


def test_a_newer_format_says_what_to_install(tmp_path: Path):
    with pytest.raises(CheckpointError, match="format 3, this version reads 2; install the fedssl that wrote it"):
        read_checkpoint(broken(tmp_path / "state", with_json("state.json", format=3)))
    with pytest.raises(CheckpointError, match="recipe format 9, this version reads 1; install the fedssl that wrote it"):
        read_checkpoint(broken(tmp_path / "recipe", with_json("recipe.json", format=9)))


@pytest.mark.parametrize("values", [{"charged": 3}, {"round": "x"}, {"round": None}, {"charged": {"training": "many"}}])
def test_a_state_of_other_kinds_is_refused(values: dict[str, Any], tmp_path: Path):
    with pytest.raises(CheckpointError, match="use another checkpoint"):
        read_checkpoint(broken(tmp_path, with_json("state.json", **values)))


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="has no key 'dropuot'"):
        read_checkpoint(broken(tmp_path, with_json("recipe.json", dropuot=0.1)))


def test_another_catalogue_is_a_mismatch(tmp_path: Path):
    tokens = trained().catalogue.tokens

    def other(target: Path) -> None:
        write_catalogue(Catalogue((tokens[1], tokens[0], *tokens[2:])), target / "catalogue.jsonl")

    with pytest.raises(CatalogueMismatch, match="not the one its recipe was made for"):
        read_checkpoint(broken(tmp_path, other))


def with_tensors(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda target: save_file(change(load_file(target / name)), target / name)


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a row less": ("weights.safetensors", lambda found: {**found, "items": found["items"][:-1].copy()}, "'items' is"),
    "a name less": ("weights.safetensors", lambda found: {name: leaf for name, leaf in found.items() if name != "norm.gain"}, "'norm.gain' is missing"),
    "a name more": ("weights.safetensors", lambda found: {**found, "head": np.zeros(3, np.float32)}, "'head' .* the recipe wants nothing"),
    "doubles": ("weights.safetensors", lambda found: {**found, "items": found["items"].astype(np.float64)}, "'items' is .*float64"),
    "memory of another optimiser": ("optimizer.safetensors", lambda found: {"velocity": found["mean"]}, "'mean' is missing"),
    "memory of other weights": ("optimizer.safetensors", lambda found: {**found, "square": found["square"][1:].copy()}, "'square' is"),
    "counts of fewer items": ("counts.safetensors", lambda found: {**found, "starts": found["starts"][:-1].copy()}, "not a matrix"),
    "counts out of order": ("counts.safetensors", lambda found: {**found, "starts": found["starts"][::-1].copy()}, "not a matrix"),
    "counts of items beyond": ("counts.safetensors", lambda found: {**found, "columns": found["columns"] + np.int32(40)}, "not a matrix"),
    "counts without a value": ("counts.safetensors", lambda found: {**found, "values": found["values"][1:].copy()}, "not a matrix"),
    "counts of another kind": ("counts.safetensors", lambda found: {"cells": found["values"]}, "cannot be read whole"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_tensors_of_other_shapes_are_refused_by_name(what: str, tmp_path: Path):
    name, change, words = CHANGES[what]
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(broken(tmp_path, with_tensors(name, change)))


def test_counts_that_nobody_kept_are_read_again(tmp_path: Path):
    side = trained().recipe.num_items + 1
    empty = Counts(np.zeros(side + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    found = read_checkpoint(write_checkpoint(tmp_path, replace(trained(), state=replace(trained().state, counts=empty)))).state.counts
    assert found is not None and len(found.values) == 0 and found.num_items == trained().recipe.num_items


def test_a_folder_of_other_things_has_no_checkpoints(tmp_path: Path):
    (tmp_path / "round-000001").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert list_checkpoints(tmp_path) == []
    shutil.rmtree(tmp_path)
    assert list_checkpoints(tmp_path) == []
