"""How the server turns a round's mean update into new weights: pairs of pure functions on flat vectors.

Source: Reddi et al. 2021, https://arxiv.org/abs/2003.00295. The mean update points downhill already, so it is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedssl.config import ServerConfig

Memory = dict[str, Tensor]


class ServerOptimizer(NamedTuple):
    """``init(P)`` gives the memory; ``step(weights_P, mean_update_P, memory, lr, round)`` new weights and new memory.

    ``round`` counts from 1. Nothing is changed in place.
    """

    init: Callable[[int], Memory]
    step: Callable[[Tensor, Tensor, Memory, float, int], tuple[Tensor, Memory]]


def sgd(config: ServerConfig) -> ServerOptimizer:
    """SGD with momentum (FedAvgM): Hsu et al. 2019, https://arxiv.org/abs/1909.06335. Momentum 0 is FedAvg."""

    def init(num_weights: int) -> Memory:
        return {"velocity": torch.zeros(num_weights)}

    def step(weights: Tensor, mean_update: Tensor, memory: Memory, lr: float, round: int) -> tuple[Tensor, Memory]:
        velocity = memory["velocity"] * config.momentum + mean_update
        return weights + lr * velocity, {"velocity": velocity}

    return ServerOptimizer(init, step)


def adam(config: ServerConfig) -> ServerOptimizer:
    """Adam with bias correction (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) on the mean update (FedAdam)."""

    def init(num_weights: int) -> Memory:
        return {"mean": torch.zeros(num_weights), "square": torch.zeros(num_weights)}

    def step(weights: Tensor, mean_update: Tensor, memory: Memory, lr: float, round: int) -> tuple[Tensor, Memory]:
        mean = torch.lerp(memory["mean"], mean_update, 1 - config.momentum)
        # Not a lerp: in float32 it would take 1 - .999 for .99999e-3, beside the exact one in the bias correction.
        square = torch.addcmul(memory["square"] * config.beta2, mean_update, mean_update, value=1 - config.beta2)
        root = (square / (1 - config.beta2**round)).sqrt_().add_(config.epsilon)
        return torch.addcdiv(weights, mean, root, value=lr / (1 - config.momentum**round)), {"mean": mean, "square": square}

    return ServerOptimizer(init, step)


def adamw(config: ServerConfig) -> ServerOptimizer:
    """Adam with decoupled decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101): weights shrink by lr * `weight_decay` a round."""
    plain = adam(config)

    def step(weights: Tensor, mean_update: Tensor, memory: Memory, lr: float, round: int) -> tuple[Tensor, Memory]:
        return plain.step(weights * (1 - lr * config.weight_decay), mean_update, memory, lr, round)

    return ServerOptimizer(plain.init, step)


def adagrad(config: ServerConfig) -> ServerOptimizer:
    """FedAdagrad: steps shrink where updates were large (Reddi et al. 2021, algorithm 2, without momentum, as they run it).

    ``config.epsilon`` is their tau, and the squares begin at its square.
    """

    def init(num_weights: int) -> Memory:
        return {"square": torch.full((num_weights,), config.epsilon**2)}

    def step(weights: Tensor, mean_update: Tensor, memory: Memory, lr: float, round: int) -> tuple[Tensor, Memory]:
        square = torch.addcmul(memory["square"], mean_update, mean_update)
        return torch.addcdiv(weights, mean_update, square.sqrt().add_(config.epsilon), value=lr), {"square": square}

    return ServerOptimizer(init, step)


def yogi(config: ServerConfig) -> ServerOptimizer:
    """FedYogi (Reddi et al. 2021, algorithm 2; Zaheer et al. 2018): the square moves by a share of the new one, up or down, so it forgets slowly.

    ``config.epsilon`` is their tau, and the squares begin at its square; as there, no bias is corrected.
    """

    def init(num_weights: int) -> Memory:
        return {"mean": torch.zeros(num_weights), "square": torch.full((num_weights,), config.epsilon**2)}

    def step(weights: Tensor, mean_update: Tensor, memory: Memory, lr: float, round: int) -> tuple[Tensor, Memory]:
        mean = torch.lerp(memory["mean"], mean_update, 1 - config.momentum)
        new = mean_update.square()
        square = torch.addcmul(memory["square"], new, (memory["square"] - new).sign_(), value=config.beta2 - 1)
        return torch.addcdiv(weights, mean, square.sqrt().add_(config.epsilon), value=lr), {"mean": mean, "square": square}

    return ServerOptimizer(init, step)


def average_late(config: ServerConfig, average: Tensor | None, weights: Tensor, round: int) -> Tensor | None:
    """The mean of the weights after rounds ``average_from`` .. ``round``, from that of the round before; None until then.

    A plain mean of the tail, which leaves out the early rounds and has no rate to choose; of all weightings of independent noise it is the one
    with the least left. Sources: Polyak and Juditsky 1992, https://doi.org/10.1137/0330046; of the tail: Jain et al. 2018,
    https://arxiv.org/abs/1610.03774. Under a plan it is made of what was released, and costs no epsilon.
    """
    if not config.average_from or round < config.average_from:
        return None
    if round == config.average_from:
        return weights.clone()
    assert average is not None, "a mean of late rounds begins at the first of them"
    return torch.lerp(average, weights, 1 / (round - config.average_from + 1))


def learning_rate(config: ServerConfig, round: int) -> float:
    """The server's step size in ``round`` (from 1): linear warm-up, then constant or cosine decay to ``floor``.

    Source of the cosine: Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, equation 5 without restarts.
    """
    factor = min(1.0, round / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        factor *= max(config.floor, 0.5 * (1 + math.cos(math.pi * round / config.rounds)))
    return config.lr * factor
