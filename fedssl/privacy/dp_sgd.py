"""DP-SGD on a device by Opacus, from gradients that are given to it. The only file that imports Opacus.

Opacus clips per window, adds up, counts steps and accounts. Its hooks are not used: they silently lose the slope of a table
that is both read and scored. Nor is its noise, which comes from a generator that is not secret: ours is drawn by key.
Sources: Abadi et al. 2016, https://arxiv.org/abs/1607.00133, algorithm 1; Opacus, https://arxiv.org/abs/2109.12298.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedssl.errors import ConfigError
from fedssl.privacy.grid import CLIP_MARGIN
from fedssl.weights import Layout, Weights

try:
    from opacus.accountants import IAccountant, PRVAccountant, RDPAccountant
    from opacus.optimizers import DPOptimizer
except ImportError as error:
    raise ConfigError("[privacy] mode = 'window' trains on the device with Opacus, which is not installed; pip install 'fedssl[window-dp]'") from error

History = list[tuple[float, float, int]]
"""As Opacus keeps it: (noise multiplier, sampling rate, steps)."""


class KeyedOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with noise from ``noise(count)``: normal numbers of deviation 1, in float64.

    Sum plus noise is rounded to the nearest whole step of ``grid``, so no low-order bits of a float carry the sum out; ``released_P`` adds
    up what was released, in steps, over the flat vector.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, clip_norm: float, noise_multiplier: float, grid: float, noise: Callable[[int], NDArray[np.float64]]
    ):
        # The margin covers the float32 error of norms and scaling; the noise is that of the whole clip.
        super().__init__(
            optimizer, noise_multiplier=noise_multiplier, max_grad_norm=clip_norm * (1 - CLIP_MARGIN), expected_batch_size=None, loss_reduction="sum"
        )
        self._std, self._grid, self._noise = noise_multiplier * clip_norm, grid, noise
        self.released_P = np.zeros(sum(parameter.numel() for parameter in self.params), dtype=np.int64)

    def add_noise(self) -> None:
        """The noised sum, rounded, as the gradient."""
        noise_P, first = self._noise(len(self.released_P)) * self._std, 0
        for parameter in self.params:
            part = slice(first, first + parameter.numel())
            noised = parameter.summed_grad.double().numpy().reshape(-1) + noise_P[part]
            steps = np.rint(noised / self._grid)
            self.released_P[part] += steps.astype(np.int64)
            parameter.grad = torch.from_numpy((steps * self._grid).astype(np.float32)).view_as(parameter)
            first = part.stop


def train_device(
    weights: Weights,
    layout: Layout,
    *,
    steps: int,
    lr: float,
    rate: float,
    clip_norm: float,
    noise_multiplier: float,
    grid: float,
    gradients: Callable[[int, Weights], Iterable[Weights]],
    noise: Callable[[int, int], NDArray[np.float64]],
) -> tuple[NDArray[np.int64], History]:
    """``steps`` steps of DP-SGD from ``weights``: the sum of all noised gradient sums, in whole steps of ``grid``, and Opacus' history of them.

    ``gradients(step, weights now)`` gives the chosen windows' gradients, in pieces that fit in memory: each leaf leads with
    the windows. ``noise(step, count)`` are normal numbers of deviation 1. A step moves the weights by -``lr`` times the noised sum.
    ``rate``: each window's chance, for the accountant.

    Guarantees: a window's gradient enters no longer than ``clip_norm``, one that is not finite as 0; a step without a single
    window is noise alone; every step is in the history. Shape: (P,).
    """
    parameters = {name: torch.nn.Parameter(weights[name].clone()) for name in layout.names}
    counter = RDPAccountant()
    now = 0
    optimizer = KeyedOptimizer(
        torch.optim.SGD(parameters.values(), lr=lr),
        clip_norm=clip_norm,
        noise_multiplier=noise_multiplier,
        grid=grid,
        noise=lambda count: noise(now, count),
    )
    optimizer.attach_step_hook(counter.get_optimizer_hook_fn(sample_rate=rate))
    for now in range(steps):
        for piece in gradients(now, {name: parameter.detach() for name, parameter in parameters.items()}):
            _give(optimizer, parameters, piece, is_last=False)
        _give(optimizer, parameters, {name: torch.zeros(0, *parameter.shape) for name, parameter in parameters.items()}, is_last=True)
    return optimizer.released_P, list(counter.history)


def _give(optimizer: KeyedOptimizer, parameters: dict[str, torch.nn.Parameter], piece: Weights, *, is_last: bool) -> None:
    """Let Opacus clip a piece and add it up; after the last one it adds noise and steps."""
    is_finite_W = torch.stack([leaf.flatten(1).square().sum(1) for leaf in piece.values()]).sum(0).isfinite() if not is_last else None
    for name, parameter in parameters.items():
        leaf = piece[name]
        if is_finite_W is not None and not bool(is_finite_W.all()):
            leaf = torch.where(is_finite_W.view(-1, *[1] * (leaf.dim() - 1)), leaf, 0.0)
        parameter.grad_sample = leaf  # type: ignore[attr-defined]
    optimizer.signal_skip_step(not is_last)
    optimizer.step()
    optimizer.zero_grad()


def opacus_epsilon(events: Sequence[tuple[float, float, int]], delta: float, *, bound: str) -> float:
    """What Opacus' accountant says of (rate, noise multiplier, steps): ``bound`` is "rdp" or "prv". GDP is not offered, it under-reports.

    PRV may give up: then infinity, never less than the truth.
    """
    accountant: IAccountant = {"rdp": RDPAccountant, "prv": PRVAccountant}[bound]()
    accountant.history = [(noise, rate, steps) for rate, noise, steps in events]
    if not accountant.history:
        return 0.0
    try:
        found = float(accountant.get_epsilon(delta))
    except (RuntimeError, ValueError, MemoryError, OverflowError):
        return math.inf
    return math.inf if math.isnan(found) else found
