"""The file of what is known of items beside histories: a vector of each item's text, by item token.

`fedssl data embed` writes it, `[data] features` reads it. It names its items, so one file serves every catalogue that shares them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedssl.catalogue import Catalogue
from fedssl.disk import whole_file
from fedssl.errors import DataError

FEATURES_FORMAT = 1


def write_features(path: Path, catalogue: Catalogue, vectors_IF: NDArray[np.float32]) -> None:
    """Write vectors (I, F), row 0 the catalogue's item 1, with the items' tokens and their hash: whole, or nothing. Raises DiskError."""
    about = {"format": str(FEATURES_FORMAT), "catalogue": catalogue.hash, "tokens": json.dumps(catalogue.tokens)}
    with whole_file(path) as beside:
        beside.write_bytes(save({"vectors": np.ascontiguousarray(vectors_IF, dtype=np.float32)}, metadata=about))


def hash_of(features: NDArray[np.float32] | None) -> str:
    """SHA-256 over the numbers of features and their shape, in hexadecimal, on every machine the same; of None the empty text."""
    if features is None:
        return ""
    return hashlib.sha256(f"features {features.shape}\n".encode() + np.ascontiguousarray(features, dtype="<f4").tobytes()).hexdigest()


def read_features(path: Path, catalogue: Catalogue) -> NDArray[np.float32]:
    """Features of the catalogue's items: a column of ones, then each item's vector as it was written. Shape: (I, 1 + F), row 0 is item 1.

    An item that the file does not name has a row of zeros: it is known by histories alone. Raises DataError for another kind of file, a
    damaged one, and one that names no item of the catalogue.
    """
    tokens, vectors = _read(path)
    place_of = {token: place for place, token in enumerate(tokens)}
    is_known = np.array([token in place_of for token in catalogue.tokens])
    if not is_known.any():
        like = f"items here are like {catalogue.tokens[0]!r}, there like {tokens[0]!r}"
        raise DataError(f"{path}: names no item of the data; {like}. Make it from this data's items: `fedssl data embed`")
    result = np.zeros((catalogue.num_items, 1 + vectors.shape[1]), dtype=np.float32)
    result[is_known, 0] = 1.0
    result[is_known, 1:] = vectors[[place_of[token] for token in catalogue.tokens if token in place_of]]
    return result


def _read(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            number, tokens, written = about.get("format"), json.loads(about["tokens"]), about["catalogue"]
            vectors = file.get_tensor("vectors")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it with `fedssl data embed ITEMS {path.name}`") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a file of item features ({error}); make one with `fedssl data embed ITEMS FILE`") from None
    if number != str(FEATURES_FORMAT):
        raise DataError(f"{path}: features of format {number}, this version reads {FEATURES_FORMAT}; make the file again with `fedssl data embed`")
    is_whole = isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens) and Catalogue(tuple(tokens)).hash == written
    if not is_whole or vectors.ndim != 2 or len(vectors) != len(tokens) or vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise DataError(f"{path}: its numbers and the items that it names do not belong together; make it again with `fedssl data embed`")
    return tokens, vectors
