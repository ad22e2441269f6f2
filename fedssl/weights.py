"""Weights: the named tensors being learned, and their order in one flat vector.

The order is by name, with the item table last; every update, sum and optimiser memory follows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Weights: TypeAlias = dict[str, Tensor]
ITEMS = "items"


@dataclass(frozen=True)
class Layout:
    """Names and shapes in the order of the flat vector. ``offsets`` has one more entry than ``names``."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]

    @property
    def num_weights(self) -> int:
        """Coordinates of the flat vector."""
        return self.offsets[-1]

    def slice_of(self, name: str) -> slice:
        """Where ``name`` lies in the flat vector."""
        place = self.names.index(name)
        return slice(self.offsets[place], self.offsets[place + 1])


def layout_of(weights: Mapping[str, Tensor] | Mapping[str, NDArray[np.float32]]) -> Layout:
    """The layout of these weights."""
    names = tuple(sorted(weights, key=lambda name: (name == ITEMS, name)))
    shapes = tuple(tuple(weights[name].shape) for name in names)
    offsets = [0]
    for shape in shapes:
        offsets.append(offsets[-1] + math.prod(shape))
    return Layout(names, shapes, tuple(offsets))


def flatten(weights: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """One vector (P,) in the order of the layout: a copy."""
    return torch.cat([weights[name].reshape(-1) for name in layout.names])


def unflatten(flat_P: Tensor, layout: Layout) -> Weights:
    """Named views of a flat vector."""
    return {
        name: flat_P[start:stop].view(shape) for name, shape, start, stop in zip(layout.names, layout.shapes, layout.offsets, layout.offsets[1:], strict=False)
    }


def to_numpy(weights: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """The same memory as numpy arrays."""
    return {name: leaf.detach().contiguous().numpy() for name, leaf in weights.items()}


def from_numpy(tensors: Mapping[str, NDArray[np.float32]]) -> Weights:
    """The same values as tensors, in memory that torch aligned.

    Matrix products may round differently over memory of another alignment, and bytes that came over a wire lie anywhere:
    without this copy, nodes with the same weights would differ in the last bit.
    """
    return {name: torch.empty(leaf.shape).copy_(torch.from_numpy(leaf if leaf.flags.writeable else leaf.copy())) for name, leaf in tensors.items()}
