"""A model as a device holds it: an ONNX file, the counts, the recipe and the catalogue, in a folder that is whole or not there.

Written from a checkpoint (`fedssl export`), or, the ONNX file alone, from the weights of a round. Nothing in it is about the person.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from fedssl.catalogue import Catalogue, read_catalogue, write_catalogue
from fedssl.counts import Counts
from fedssl.disk import sync, whole_file, writing
from fedssl.errors import CatalogueMismatch, CheckpointError, FedSSLError
from fedssl.lift import LiftTable
from fedssl.recipe import Recipe, read_recipe

ENCODER_FILE = "encoder.onnx"
_DTYPES = {"F32": "<f4", "I32": "<i4", "I64": "<i8"}
_FILES = (ENCODER_FILE, "counts.safetensors", "recipe.json", "catalogue.jsonl")


@dataclass(frozen=True)
class DeviceModel:
    """What a model folder holds beside its ONNX file ``encoder``."""

    recipe: Recipe
    catalogue: Catalogue
    counts: Counts | LiftTable | None
    encoder: Path


def write_device_model(
    folder: Path, recipe: Recipe, weights: Mapping[str, NDArray[np.float32]], catalogue: Catalogue, counts: Counts | LiftTable | None, *, run: str, round: int
) -> None:
    """Write a model folder: whole, or what was there before. Raises DiskError, and ConfigError for an encoder without a graph."""
    with _replaced(folder) as beside:
        write_encoder(beside, recipe, weights, run=run, round=round)
        if counts is not None and recipe.counts is not None:
            (beside / "counts.safetensors").write_bytes(save(dict(vars(counts))))
        (beside / "recipe.json").write_text(recipe.canonical, encoding="utf-8")
        write_catalogue(catalogue, beside / "catalogue.jsonl")


def copy_device_model(source: Path, folder: Path) -> None:
    """Put the model in ``source`` in place of the one in ``folder``: whole, or what was there before. Raises DiskError."""
    with _replaced(folder) as beside:
        for name in _FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, beside / name)


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder for the block to fill, which then takes the name of ``folder``."""
    beside, old = folder.with_name(f".{folder.name}.{os.getpid()}.new"), _old(folder)
    try:
        with writing(folder):
            beside.mkdir(parents=True)
            yield beside
            for path in [*beside.iterdir(), beside]:
                sync(path)
            # Two names cannot be exchanged at once: between both, `settle` finds the old one.
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                os.rename(folder, old)
            os.rename(beside, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_encoder(folder: Path, recipe: Recipe, weights: Mapping[str, NDArray[np.float32]], *, run: str, round: int) -> None:
    """Exchange the ONNX file of a model folder alone, for one with these weights: whole, or as it was."""
    from fedssl.onnx_graph import encoder_graph  # What only reads a model needs no onnx.

    about = {"run": run, "round": str(round), "recipe": recipe.hash}
    made = encoder_graph(recipe.encoder, weights, about, history=recipe.head.history, adapts=recipe.head.adapt > 0)
    with whole_file(folder / ENCODER_FILE) as beside:
        beside.write_bytes(made)


def settle(folder: Path) -> bool:
    """Whether there is a model folder. A process that was killed between two names left the old one, which comes back."""
    old = _old(folder)
    if not folder.exists() and old.exists():
        with writing(folder):
            os.rename(old, folder)
    return folder.exists()


def read_device_model(folder: Path) -> DeviceModel:
    """The model in a folder. Raises CheckpointError where it is not whole, CatalogueMismatch where recipe and catalogue are of two models."""
    try:
        recipe = read_recipe((folder / "recipe.json").read_text(encoding="utf-8"), where=str(folder / "recipe.json"))
        catalogue = read_catalogue(folder / "catalogue.jsonl")
        path = folder / "counts.safetensors"
        counts = (LiftTable if recipe.privacy.has_plan else Counts)(**map_arrays(path)) if path.exists() else None
        if not (folder / ENCODER_FILE).exists():
            raise FileNotFoundError(folder / ENCODER_FILE)
    except (OSError, ValueError, TypeError, KeyError, struct.error, FedSSLError) as error:
        raise CheckpointError(f"{folder}: not a whole model of a device ({error}); write it again with `fedssl export`") from None
    if (catalogue.hash, catalogue.num_items) != (recipe.catalogue, recipe.num_items) or (counts is not None and counts.num_items != recipe.num_items):
        raise CatalogueMismatch(f"{folder}: catalogue, counts and recipe are of different models; write it again with `fedssl export`")
    return DeviceModel(recipe, catalogue, counts, folder / ENCODER_FILE)


def map_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file, read-only views of its bytes on disk: only what is read takes memory. Raises ValueError, KeyError, OSError."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    bytes_on_disk = np.memmap(path, dtype=np.uint8, mode="r")
    found = {}
    for name, about in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in about["data_offsets"])
            found[name] = np.asarray(bytes_on_disk[start:stop]).view(_DTYPES[about["dtype"]]).reshape(about["shape"])
    return found


def give_back_pages(array: NDArray[Any]) -> None:
    """Let the system have the pages of a mapped array (`map_arrays`); they come back when they are read."""
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base if isinstance(base, np.ndarray) else None
    if base is not None:
        base.madvise(mmap.MADV_DONTNEED)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
