"""Checkpoints: all that a resume, an evaluation or a recommendation needs, in a folder that is whole or not there.

Written beside, synced and renamed. No pickle: safetensors for arrays, JSON for the rest; chance is keyed, so there are no
random states, and never a key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedssl.catalogue import Catalogue, read_catalogue, write_catalogue
from fedssl.counts import Counts
from fedssl.data.features_file import hash_of
from fedssl.disk import sync, writing
from fedssl.errors import CatalogueMismatch, CheckpointError, DataError, FedSSLError
from fedssl.lift import LiftTable
from fedssl.parts import make_parts
from fedssl.recipe import Recipe, read_recipe
from fedssl.server_round import State
from fedssl.weights import flatten, from_numpy, to_numpy

CHECKPOINT_FORMAT, WITHOUT_SUMS = 2, 1
BEFORE_TRAINING = ("popularity", "counts", "distillation")
"""Phases that come before training, in order."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds. ``fingerprint``: of the histories that were trained on."""

    state: State
    recipe: Recipe
    catalogue: Catalogue
    run: str
    fingerprint: str


def name_of(state: State) -> str:
    """The folder's name. Phases before training sort first."""
    if state.phase == "training":
        return name_of_round(state.round)
    place = BEFORE_TRAINING.index(state.phase) if state.phase in BEFORE_TRAINING else len(BEFORE_TRAINING)
    return f"{name_of_round(0)}-{place}-{state.phase}" + (f"-{state.round:03d}" if state.round > 1 else "")


def name_of_round(round: int) -> str:
    """The name of a training round's checkpoint."""
    return f"round-{round:06d}"


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 1, best: int = 0) -> Path:
    """Write a checkpoint into ``folder`` (a run's `checkpoints`), then remove all but the newest ``keep`` and that of
    training round ``best`` (0: none).

    Guarantee: killed at any moment, or out of room, the folder has the old checkpoints whole, or the new one too, never half of one.
    Raises DiskError where it cannot be written.
    """
    try:
        with writing(folder):
            return _write(folder, checkpoint, keep, best)
    finally:
        # Room for who needs it, where there was too little for this.
        shutil.rmtree(_beside(folder, checkpoint.state), ignore_errors=True)


def _beside(folder: Path, state: State) -> Path:
    return folder / f".{name_of(state)}.new"


def _write(folder: Path, checkpoint: Checkpoint, keep: int, best: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    state, recipe = checkpoint.state, checkpoint.recipe
    target = folder / name_of(state)
    if target.exists():
        # Whole, by the guarantee, and of the same round: what would be written is what is there.
        tidy_checkpoints(folder, state, keep=keep, best=best)
        return target
    beside = _beside(folder, state)
    beside.mkdir()
    # Who opens one file finds the model in it; what only a resume needs lies beside.
    put_arrays(beside / "weights.safetensors", to_numpy(state.released(recipe)))
    if state.features is not None:
        put_arrays(beside / "features.safetensors", _in_parts(state))
    if state.average_P is not None:
        put_arrays(beside / "training.safetensors", to_numpy(state.weights(recipe)))
    put_arrays(beside / "optimizer.safetensors", to_numpy(state.memory))
    if state.counts is not None:
        put_arrays(beside / "counts.safetensors", vars(state.counts))
    if state.popularity is not None:
        put_arrays(beside / "popularity.safetensors", {"popularity": state.popularity})
    (beside / "recipe.json").write_text(recipe.canonical)
    write_catalogue(checkpoint.catalogue, beside / "catalogue.jsonl")
    about: dict[str, Any] = {
        "format": CHECKPOINT_FORMAT,
        "phase": state.phase,
        "round": state.round,
        "charged": dict(state.charged),
        "counts": state.counts is not None,
        "popularity": state.popularity is not None,
        "average": state.average_P is not None,
        "clip_norm": state.clip_norm,
        "run": checkpoint.run,
        "fingerprint": checkpoint.fingerprint,
    }
    if state.features is not None:
        about["features"] = True
    about["sha256"] = {path.name: _sha256(path) for path in sorted(beside.iterdir())}
    about["sha256"]["state.json"] = _sha256_of(about)
    (beside / "state.json").write_text(json.dumps(about, indent=1))
    for path in [*beside.iterdir(), beside]:
        sync(path)
    os.rename(beside, target)
    sync(folder)
    tidy_checkpoints(folder, state, keep=keep, best=best)
    return target


def _in_parts(state: State) -> dict[str, NDArray[Any]]:
    """What is known of the items, and the weights with the projection behind them: a sum of both is all that the other files have."""
    assert state.features is not None
    parts = {"features": state.features, "weights": state.weights_P} | ({} if state.average_P is None else {"average": state.average_P})
    return to_numpy(parts)


def _sweep(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for rest in [*folder.glob(".round-*.new"), *folder.glob(".round-*.old")]:
        shutil.rmtree(rest, ignore_errors=True)


def tidy_checkpoints(folder: Path, state: State, *, keep: int = 1, best: int = 0) -> None:
    """Remove all checkpoints but the newest ``keep``, those of ``state`` and of training round ``best`` (0: none), and what a killed process left."""
    _sweep(folder)
    for old in list_checkpoints(folder)[:-keep]:
        if old.name != name_of(state) and not (best and old.name == name_of_round(best)):
            # Renamed first: a removal takes many steps, and what is half removed must not look like a checkpoint.
            gone = folder / f".{old.name}.old"
            os.rename(old, gone)
            shutil.rmtree(gone, ignore_errors=True)


def put_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a file of named arrays."""
    # Not safetensors' own `save_file`: what it raises on a full disk is no OSError.
    path.write_bytes(save(dict(arrays)))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("round-*") if path.is_dir())


def oldest_round(folder: Path) -> int:
    """The training round of the oldest checkpoint; 0: of one from before training, or where there is none."""
    found = list_checkpoints(folder)
    return int(found[0].name.split("-")[1]) if found else 0


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """What a run goes on from; None where it has no checkpoint yet. Raises CheckpointError for a damaged one, with what can be done."""
    found = list_checkpoints(folder)
    if not found:
        return None
    try:
        return read_checkpoint(found[-1])
    except CheckpointError as error:
        rest = f"the run goes on from {found[-2].name} where {found[-1].name} is taken away" if len(found) > 1 else "there is no other here, start a new run"
        raise CheckpointError(f"{error}; {rest}") from None


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, checked against its own recipe and catalogue.

    Raises CheckpointError where it is missing, cut short, changed in any bit or of a newer format; CatalogueMismatch where its parts speak of
    different catalogues.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint; name a folder like RUN/checkpoints/round-000120")
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder}: a run's folder; name one of its checkpoints, such as {max((folder / 'checkpoints').iterdir(), default='none yet')}")
    try:
        about: dict[str, Any] = json.loads((folder / "state.json").read_text())
        number = about["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: state.json cannot be read ({error}); this is not a whole checkpoint, use another one") from None
    if number not in (CHECKPOINT_FORMAT, WITHOUT_SUMS):
        raise CheckpointError(f"{folder}: checkpoint format {number}, this version reads {CHECKPOINT_FORMAT}; install the fedssl that wrote it")
    try:
        recipe = read_recipe((folder / "recipe.json").read_text(), where=str(folder / "recipe.json"))
        catalogue = read_catalogue(folder / "catalogue.jsonl")
        weights = load_file(folder / "weights.safetensors")
        has_average = bool(about["average"])
        training = load_file(folder / "training.safetensors") if has_average else weights
        memory = load_file(folder / "optimizer.safetensors")
        counts = (LiftTable if recipe.privacy.has_plan else Counts)(**load_file(folder / "counts.safetensors")) if about["counts"] else None
        popularity = load_file(folder / "popularity.safetensors") if about.get("popularity") else {}
        in_parts = load_file(folder / "features.safetensors") if about.get("features") else {}
        phase, round_, charged = str(about["phase"]), int(about["round"]), {str(name): int(value) for name, value in about["charged"].items()}
        run, fingerprint = str(about["run"]), str(about["fingerprint"])
        clip_norm = None if about.get("clip_norm") is None else float(about["clip_norm"])
        sums = {} if number == WITHOUT_SUMS else dict(about["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read whole ({error}); it was cut short or changed, use another checkpoint") from None
    except DataError:
        raise CheckpointError(f"{folder}: catalogue.jsonl cannot be read whole; it was cut short or changed, use another checkpoint") from None
    except FedSSLError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if catalogue.hash != recipe.catalogue or catalogue.num_items != recipe.num_items:
        raise CatalogueMismatch(f"{folder}: catalogue.jsonl is not the one its recipe was made for; a file was replaced, use another checkpoint")
    if popularity:
        _check_shapes(folder / "popularity.safetensors", popularity, {"popularity": (recipe.num_items + 1,)})
    if isinstance(counts, LiftTable):
        _check_table(folder / "counts.safetensors", counts, recipe)
    elif counts is not None:
        _check_counts(folder / "counts.safetensors", counts, recipe.num_items)
    if has_average != (phase == "training" and 0 < recipe.server.average_from <= round_):
        raise CheckpointError(f"{folder}: state.json and recipe.json disagree on whether late rounds are averaged; one was changed, use another checkpoint")
    if (clip_norm is not None) != (recipe.privacy.clip == "adaptive"):
        raise CheckpointError(f"{folder}: state.json and recipe.json disagree on whether the clip is adaptive; one was changed, use another checkpoint")
    layout = make_parts(recipe).layout
    _check_shapes(folder / "weights.safetensors", weights, dict(zip(layout.names, layout.shapes, strict=True)))
    _check_shapes(folder / "training.safetensors", training, dict(zip(layout.names, layout.shapes, strict=True)))
    if bool(in_parts) != bool(recipe.features):
        raise CheckpointError(f"{folder}: state.json and recipe.json disagree on whether items have features; one was changed, use another checkpoint")
    length = layout.num_weights
    if in_parts:
        length = _check_parts(folder / "features.safetensors", in_parts, recipe, length, has_average=has_average)
    expected = make_parts(recipe).optimizer.init(length)
    _check_shapes(folder / "optimizer.safetensors", memory, {name: tuple(leaf.shape) for name, leaf in expected.items()})
    if number != WITHOUT_SUMS:
        _check_bytes(folder, about, sums)
    average_P = flatten(from_numpy(weights), layout) if has_average else None
    weights_P, features = flatten(from_numpy(training), layout), None
    if in_parts:
        parts = from_numpy(in_parts)
        weights_P, average_P, features = parts["weights"], parts.get("average"), parts["features"]
    state = State(phase, round_, weights_P, from_numpy(memory), counts, charged, average_P, clip_norm, popularity.get("popularity"), features)
    return Checkpoint(state, recipe, catalogue, run, fingerprint)


def _check_bytes(folder: Path, about: dict[str, Any], sums: dict[str, str]) -> None:
    """Whether every file is, bit for bit, the one that was written. ``sums``: what state.json says of each."""
    files = {name: one for name, one in sums.items() if name != "state.json"}
    # First the file that names the others.
    for name in ("state.json", *files):
        found = _sha256(folder / name) if name in files else _sha256_of({**about, "sha256": files})
        if found != sums.get(name):
            raise CheckpointError(f"{folder / name}: not the bytes that were written (SHA-256); it was changed or the disk errs, use another checkpoint")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _check_shapes(path: Path, found: dict[str, NDArray[Any]], wanted: dict[str, tuple[int, ...]]) -> None:
    kinds = {name: (array.shape, array.dtype.name) for name, array in found.items()}
    asked = {name: (shape, "float32") for name, shape in wanted.items()}
    for name in sorted({*kinds, *asked}):
        if kinds.get(name) != asked.get(name):
            raise CheckpointError(f"{path}: '{name}' is {kinds.get(name, 'missing')}, the recipe wants {asked.get(name, 'nothing')}; use another checkpoint")


def _check_parts(path: Path, found: dict[str, NDArray[Any]], recipe: Recipe, num_weights: int, *, has_average: bool) -> int:
    """How many weights there are with the projection's, once features and weights are those of the recipe."""
    features = found.get("features", np.zeros((0, 0), dtype=np.float32))
    columns = features.shape[1] if features.ndim == 2 else 0
    length = num_weights + columns * recipe.encoder.width
    _check_shapes(path, found, {"features": (recipe.num_items + 1, columns), "weights": (length,)} | ({"average": (length,)} if has_average else {}))
    if hash_of(features[1:]) != recipe.features or features[0].any():
        raise CheckpointError(f"{path}: 'features' are not those that recipe.json names; it was changed, use another checkpoint")
    return length


def _check_table(path: Path, table: LiftTable, recipe: Recipe) -> None:
    items = min(recipe.counts.items if recipe.counts is not None else 0, recipe.num_items)
    rows = table.rows
    if not (rows.dtype == np.int64 and rows.shape == (items,) and (np.diff(rows) > 0).all() and (not items or 1 <= rows[0] <= rows[-1] <= recipe.num_items)):
        raise CheckpointError(f"{path}: 'rows' are not {items} different items of the catalogue; it was changed, use another checkpoint")
    floats = {name: array for name, array in vars(table).items() if name != "rows"}
    _check_shapes(path, floats, {"lift": (items, items), "log_popularity": (recipe.num_items + 1,), "log_repeat": (1,)})


def _check_counts(path: Path, counts: Counts, num_items: int) -> None:
    starts, columns, values = counts.starts, counts.columns, counts.values
    cells = (len(columns),)
    is_whole = starts.shape == (num_items + 2,) and [part.dtype.name for part in (starts, columns, values)] == ["int64", "int32", "float32"]
    is_whole = is_whole and columns.shape == values.shape == cells and starts[0] == 0 and starts[-1] == cells[0] and bool((np.diff(starts) >= 0).all())
    if not is_whole or (len(columns) and not 1 <= columns.min() <= columns.max() <= num_items):
        raise CheckpointError(f"{path}: not a matrix of {num_items} items by rows; it was changed, use another checkpoint")
