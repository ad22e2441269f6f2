"""Window-level privacy on the device, by Opacus: what is read and added is the device's secret, and a simulation has the same law."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small import KEYS, recipe_of, small_config, small_dataset

from fedssl.client_round import Shard, client_round
from fedssl.config import RunConfig
from fedssl.data.histories import take_users
from fedssl.privacy.grid import grid_step
from fedssl.privacy.uploads import Device, UploadLedger
from fedssl.records import Address, Download
from fedssl.server_round import first_state
from fedssl.weights import to_numpy

pytest.importorskip("opacus", reason="window-level privacy is an extra: pip install 'fedssl[window-dp]'")

WINDOW: dict[str, Any] = {
    "privacy": {"mode": "window", "clip_norm": 0.5, "noise_multiplier": 1.5, "delta": 1e-3, "window_rate": 0.6},
    "server": {"rounds": 5, "cohort": 10},
    "encoder": {"window": 4},
}
CONFIG = small_config(WINDOW)
STEP = grid_step(0.5)


def shard_of(folder: Path, users: Sequence[int] = range(24), *, key: bytes = KEYS.noise, is_simulated: bool = False) -> Shard:
    numbers = np.array(users, dtype=np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    device = Device(key, UploadLedger(folder / "uploads.sqlite", key, may_be_new=True))
    return Shard(take_users(small_dataset().histories, numbers), numbers, users_per_chunk=4, device=device, is_simulated=is_simulated)


def ask(config: RunConfig = CONFIG, *, round: int = 1) -> Download:
    recipe = recipe_of(config, small_dataset())
    return Download(Address("run", "training", round), recipe, to_numpy(first_state(recipe).weights(recipe)))


def update(upload: Any) -> NDArray[np.int64]:
    return np.asarray(upload.sums["update"], dtype=np.int64)


def test_a_device_sends_noise_of_the_stated_deviation_around_the_clipped_sum(tmp_path: Path):
    with_noise = update(client_round(ask(), shard_of(tmp_path / "a", [4])))
    noise = with_noise * STEP / 0.5
    # The sum of a few gradients of length 1 is little beside noise of 1.5 in hundreds of coordinates.
    assert noise.std() == pytest.approx(1.5, rel=0.1)
