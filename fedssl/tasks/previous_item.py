"""Previous item: at every position of a window, which item came before; the next item of a window that is read backwards.

The encoder is the one that foretells, with the same weights and item vectors: what stands together in time is learned from both sides,
from one history and without anybody's negatives. Source: Liu et al. 2021 (ASReP), https://arxiv.org/abs/2105.00522, section 3.1,
who train so first and forwards afterwards; here both directions are trained in the same round.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedssl import views
from fedssl.config import TaskConfig
from fedssl.tasks import Chance, Task, Views
from fedssl.tasks.next_item import next_item


def previous_item(config: TaskConfig, *, num_items: int) -> Task:
    """`next_item` of reversed windows; ``config.negatives`` as there."""
    forwards = next_item(config, num_items=num_items)

    def draw(windows_USBL1: NDArray[np.int64], chance: Chance) -> Views:
        return forwards.draw(views.reverse(windows_USBL1), chance)

    return forwards._replace(draw=draw)
