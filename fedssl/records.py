"""The two records that travel: a Download to a node, an Upload back. Plain frozen data, numpy inside, no torch.

A round is one or more exchanges; an exchange is one Download and one Upload a node. An Upload holds named sums over the
node's users, in whole steps of a grid that the plan declares; sums are additive, so a shard of a thousand users and a
device of one send the same kind of thing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedssl.recipe import Recipe

Ints = NDArray[np.int64] | NDArray[np.int32]


@dataclass(frozen=True)
class SparseSum:
    """A matrix of whole numbers by its non-empty cells: sorted by (row, column), each cell once.

    Shapes: ``rows``, ``columns``, ``values`` are (cells,); ``shape`` is that of the whole matrix.
    """

    rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    values: Ints
    shape: tuple[int, int]


@dataclass(frozen=True)
class Address:
    """Which exchange a record belongs to. ``round`` counts from 1 within its phase; ``attempt`` and ``exchange`` from 0."""

    run: str
    phase: str
    round: int
    attempt: int = 0
    exchange: int = 0


@dataclass(frozen=True)
class Download:
    """What a node receives.

    ``tensors``: the shared weights (and, in later exchanges of a round, what the first one summed). ``users``: the chosen
    users of a node inside the trust boundary; None asks the whole node (a device of one user is only asked when chosen).
    ``settled``: the newest training round that a durable checkpoint holds; heads need no way back beyond it.
    ``clip_norm``: the clip of this round where the recipe's is adaptive, else None.
    """

    address: Address
    recipe: Recipe
    tensors: dict[str, NDArray[np.float32]]
    users: NDArray[np.int64] | None = None
    settled: int = 0
    clip_norm: float | None = None


@dataclass(frozen=True)
class Upload:
    """What a node returns: named sums, nothing else. ``recipe`` is the hash of the recipe that was followed."""

    address: Address
    recipe: str
    sums: dict[str, Ints | SparseSum] = field(default_factory=dict)
