"""A job as files, which is how ours and the peers get the same one: settings, first weights, and every user's windows and negatives.

`job.json` has the settings; `weights.npz` the first weights, by name; `users.npz` what the first round draws for every user, end to end.
Nothing of fedssl is imported here: the peers' environments do not have it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What is the same for all users; ``lr`` is the local step's, ``nodes`` are Flower's; the last four are the server's Adam."""

    steps: int
    lr: float
    clip_norm: float
    heads: int
    blocks: int
    cohort: int
    nodes: int
    rounds: int
    server_lr: float
    momentum: float
    beta2: float
    epsilon: float


class UserTensors(NamedTuple):
    """What `PlainSASRec.loss` takes, all steps of it: each (S, ...). A step is one window; own items and negatives are those of all steps."""

    own_SM: Tensor
    candidates_SN: Tensor
    read_SL: Tensor
    target_SL: Tensor


def write_job(folder: Path, settings: Settings, weights: Mapping[str, Tensor], users: Sequence[UserTensors]) -> None:
    """Lay a job out in ``folder``, which is there."""
    (folder / "job.json").write_text(json.dumps(asdict(settings)))
    np.savez(folder / "weights.npz", **{name: leaf.numpy() for name, leaf in weights.items()})
    arrays = {}
    for name in UserTensors._fields:
        # Own items and candidates are the same at every step, and are kept once.
        pieces = [getattr(user, name)[: 1 if name in ("own_SM", "candidates_SN") else None].flatten().numpy() for user in users]
        arrays[name] = np.concatenate(pieces)
        arrays[name + ".cuts"] = np.cumsum([0, *(len(piece) for piece in pieces)])
    np.savez(folder / "users.npz", **arrays)


def read_settings(folder: Path) -> Settings:
    """The settings of the job in ``folder``."""
    return Settings(**json.loads((folder / "job.json").read_text()))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Its first weights."""
    with np.load(folder / "weights.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def read_users(folder: Path) -> list[UserTensors]:
    """The tensors of all its users, views of four arrays."""
    steps = read_settings(folder).steps
    with np.load(folder / "users.npz") as file:
        own, candidates, read, target = ([torch.from_numpy(piece) for piece in _pieces(file[name], file[name + ".cuts"])] for name in UserTensors._fields)
    return [
        UserTensors(own[user].expand(steps, -1), candidates[user].expand(steps, -1), read[user].view(steps, -1), target[user].view(steps, -1))
        for user in range(len(own))
    ]


def _pieces(flat: NDArray[np.int64], cuts: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (flat[first:stop] for first, stop in pairwise(cuts))


def write_updates(path: Path, found: Mapping[int, tuple[Mapping[str, Tensor], float]]) -> None:
    """Clipped updates of some users and their losses before any step, for the check that all do the same job."""
    arrays = {f"{user}/{name}": leaf.numpy() for user, (update, _) in found.items() for name, leaf in update.items()}
    np.savez(path, **arrays, **{f"{user}/loss": np.array(loss) for user, (_, loss) in found.items()})


def read_updates(path: Path, user: int) -> tuple[dict[str, Tensor], float]:
    """The update of one of them, by names of leaves, and its loss."""
    with np.load(path) as file:
        mine = {name.removeprefix(f"{user}/"): torch.from_numpy(file[name]) for name in file.files if name.startswith(f"{user}/")}
    loss = float(mine.pop("loss"))
    return mine, loss


class Turns:
    """Rounds that wait for their turn, told over standard input, so that whoever times several peers lets them alternate.

    The words are READY, then for each line that comes a ROUND with its seconds. Libraries may print between them.
    """

    def __init__(self) -> None:
        self._began: float | None = None

    def end_and_wait(self, *, is_last: bool = False) -> None:
        """End the round under way, if there is one, and block until the next may begin."""
        print("READY" if self._began is None else f"ROUND {time.perf_counter() - self._began}", flush=True)
        if not is_last:
            if not sys.stdin.readline():
                sys.exit("nobody waits for the next round")
            self._began = time.perf_counter()
