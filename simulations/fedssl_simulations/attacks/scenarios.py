"""What an audit plays, and what an attacker sees of it: the words that audits of all kinds share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedssl.privacy.keys import Keys, make_keys

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

CLIP_NORM = 1.0
PARTS = "fedssl_simulations.attacks.canaries"


@dataclass(frozen=True)
class Scenario:
    """A way to run rounds. ``rate``: each canary's chance to take part in a release; ``releases``: how many.

    ``see``: plays it, and returns what the attacker saw. ``privacy``: further settings of `[privacy]`. ``share``: of the canaries asked for, so many
    are played with, where one costs more than elsewhere. ``falls_back``: all releases are of round 1; between them the server falls
    back to the state before it, as after a crash, and other users answer, so that another attempt is charged. Otherwise they are rounds
    one after the other.
    """

    name: str
    see: Callable[[Scenario, Asked], Seen]
    rate: float
    releases: int
    epsilon: float
    privacy: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    falls_back: bool = False


class Asked(NamedTuple):
    """What the auditor asks for. ``folder``: empty, for ledgers and keys; ``keys``: known ones, for tests alone."""

    folder: Path
    canaries: int
    delta: float
    seed: int
    keys: Keys | None

    def own_keys(self) -> Keys:
        """The known keys, or fresh ones in the folder."""
        return self.keys or make_keys(self.folder)

    def coins(self) -> Bools:
        """The auditor's: which canaries are in. Shape: (canaries,)."""
        return np.random.default_rng(self.seed).random(self.canaries) < 0.5


class Guess(NamedTuple):
    """One attack: every canary's score, and the score from which on it is named, fixed by the scenario and by how many canaries there are."""

    name: str
    score_N: Floats
    threshold: float


@dataclass(frozen=True)
class Seen:
    """What was claimed of a run, who of its canaries was in, and what attackers make of all that was released.

    ``claimed``: epsilon of what was charged. ``is_judged_N``: which canaries are asked about.
    """

    claimed: float
    statement: Mapping[str, Any]
    was_in_N: Bools
    is_judged_N: Bools
    guesses: Sequence[Guess]


@contextmanager
def replaced(home: str, stand_in: Any) -> Iterator[None]:
    """``stand_in`` in place of what is at ``home`` (module:name, where a name may have dots), in this process, until the block ends."""
    module, _, path = home.partition(":")
    *outer, name = path.split(".")
    place: Any = importlib.import_module(module)
    for part in outer:
        place = getattr(place, part)
    shipped = getattr(place, name)
    setattr(place, name, stand_in)
    try:
        yield
    finally:
        setattr(place, name, shipped)
