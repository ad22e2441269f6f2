"""A model carried over to another catalogue: what the encoder learned stays, items that both list keep their vectors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedssl.catalogue import Catalogue
from fedssl.checkpoints import Checkpoint
from fedssl.errors import CatalogueMismatch, ConfigError
from fedssl.item_features import projection_of
from fedssl.parts import make_parts
from fedssl.recipe import Recipe
from fedssl.server_round import State, first_state
from fedssl.weights import ITEMS


def carried_over(old: Checkpoint, recipe: Recipe, catalogue: Catalogue, features: NDArray[np.float32] | None = None) -> State:
    """The state in which a run over ``catalogue`` begins from a checkpoint of a run over another one.

      - the encoder's weights are those that ``old`` released;
      - an item that both catalogues list, by its token, keeps its vector;
      - where both have ``features`` (I, F) the projection is taken over too, and an item that only features are known of has the vector they
        project to; every other item begins as in a run from nothing;
      - counts and the optimiser's memory are left behind: they belong to other histories and other rounds.

    Raises ConfigError where the encoders differ in a shape, and CatalogueMismatch where features of the items that both list are far apart.
    """
    begin = first_state(recipe, features)
    mine, theirs = make_parts(recipe).layout, make_parts(old.recipe).layout
    _check_encoders(recipe, old.recipe)
    body, width = mine.slice_of(ITEMS).start, recipe.encoder.width
    row_pairs = [(row, old.catalogue.rows[token]) for row, token in enumerate(catalogue.tokens, start=1) if token in old.catalogue.rows]
    rows, their_rows = torch.tensor(row_pairs, dtype=torch.long).reshape(-1, 2).T
    is_projected = old.state.features is not None and begin.features is not None and _same_features(old, begin, rows, their_rows)

    released_Q = old.state.weights_P if old.state.average_P is None else old.state.average_P
    vectors_ID = released_Q[theirs.slice_of(ITEMS)].view(-1, width) if is_projected else old.state.released(old.recipe)[ITEMS]
    weights_P = begin.weights_P.clone()
    weights_P[:body] = released_Q[:body]
    items_ID = weights_P[mine.slice_of(ITEMS)].view(-1, width)
    if is_projected and begin.features is not None:
        items_ID[begin.features.any(1)] = 0.0
        projection_of(weights_P, mine)[:] = projection_of(released_Q, theirs)
    items_ID[rows] = vectors_ID[their_rows]
    return replace(begin, weights_P=weights_P)


def _same_features(old: Checkpoint, begin: State, rows: torch.Tensor, their_rows: torch.Tensor) -> bool:
    """Whether the features mean the same; those of no common width do not. Two descriptions of one item may differ a little, two encoders differ much."""
    assert old.state.features is not None and begin.features is not None
    if old.state.features.shape[1] != begin.features.shape[1]:
        return False
    both = begin.features[rows].any(1) & old.state.features[their_rows].any(1)
    mine, theirs = begin.features[rows][both], old.state.features[their_rows][both]
    if (mine - theirs).square().sum() > 0.5 * theirs.square().sum():
        raise CatalogueMismatch("[data] features say something else of the items that both catalogues list; take both from one encoder of sentences")
    return True


def _check_encoders(recipe: Recipe, old: Recipe) -> None:
    mine, theirs = make_parts(recipe).layout, make_parts(old).layout
    wanted = {name: shape for name, shape in zip(mine.names, mine.shapes) if name != ITEMS}
    found = {name: shape for name, shape in zip(theirs.names, theirs.shapes) if name != ITEMS}
    if recipe.encoder.name != old.encoder.name or recipe.encoder.width != old.encoder.width or wanted != found:
        raise ConfigError(f"the checkpoint's encoder is {_words(old)}, [encoder] asks for {_words(recipe)}; take the [encoder] section of the run it came from")


def _words(recipe: Recipe) -> str:
    encoder = recipe.encoder
    return f"{encoder.name} of width {encoder.width}, {encoder.blocks} blocks, hidden {encoder.hidden}, window {encoder.window}"
