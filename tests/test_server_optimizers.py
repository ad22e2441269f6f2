"""Server optimisers equal torch.optim's on the slope that points the other way; step sizes by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fedssl.checking import check
from fedssl.config import ServerConfig
from fedssl.errors import ConfigError
from fedssl.parts import SERVER_OPTIMIZERS
from fedssl.server_optimizers import learning_rate

P = 40
RATES = [0.1, 0.3, 0.02, 0.2, 0.05, 0.1, 0.07, 0.1]


def updates() -> list[torch.Tensor]:
    """Mean updates of some rounds, of sizes from 1e-6 to 1; a coordinate that never moves, one that moves once."""
    rng = torch.Generator().manual_seed(0)
    size = torch.logspace(-6, 0, P)
    drawn = [torch.randn(P, generator=rng) * size for _ in RATES]
    for number, update in enumerate(drawn):
        update[0] = 0.0
        update[1] = 0.5 if number == 2 else 0.0
    return drawn


def assert_equals_torch(config: ServerConfig, theirs: type[torch.optim.Optimizer], *, moves_all: bool = False, **settings: object) -> None:
    optimizer = SERVER_OPTIMIZERS[config.optimizer](config)
    weights = torch.randn(P, generator=torch.Generator().manual_seed(1))
    memory = optimizer.init(P)
    leaf = weights.clone().requires_grad_()
    plain = theirs([leaf], **settings)  # type: ignore[call-arg]
    for round, (update, lr) in enumerate(zip(updates(), RATES, strict=True), start=1):
        before = weights.clone(), update.clone(), {name: value.clone() for name, value in memory.items()}
        new_weights, new_memory = optimizer.step(weights, update, memory, lr, round)
        assert torch.equal(weights, before[0]) and torch.equal(update, before[1])
        assert all(torch.equal(memory[name], value) for name, value in before[2].items())
        weights, memory = new_weights, new_memory
        for group in plain.param_groups:
            group["lr"] = lr
        leaf.grad = -update
        plain.step()
        torch.testing.assert_close(weights, leaf.detach(), rtol=1e-6, atol=2e-7)
    assert (weights[0] != before[0][0]) == moves_all


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torchs_over_several_rounds(momentum: float):
    assert_equals_torch(ServerConfig(optimizer="sgd", momentum=momentum), torch.optim.SGD, lr=1.0, momentum=momentum)


@pytest.mark.parametrize(("beta1", "beta2", "epsilon"), [(0.9, 0.98, 1e-8), (0.0, 0.999, 1e-3), (0.5, 0.0, 1e-5)])
def test_adam_equals_torchs_over_several_rounds(beta1: float, beta2: float, epsilon: float):
    config = ServerConfig(optimizer="adam", momentum=beta1, beta2=beta2, epsilon=epsilon)
    assert_equals_torch(config, torch.optim.Adam, lr=1.0, betas=(beta1, beta2), eps=epsilon)


@pytest.mark.parametrize(("beta1", "beta2", "epsilon", "decay"), [(0.9, 0.98, 1e-8, 0.1), (0.5, 0.999, 1e-3, 3.0)])
def test_adamw_equals_torchs_over_several_rounds(beta1: float, beta2: float, epsilon: float, decay: float):
    config = ServerConfig(optimizer="adamw", momentum=beta1, beta2=beta2, epsilon=epsilon, weight_decay=decay)
    assert_equals_torch(config, torch.optim.AdamW, lr=1.0, betas=(beta1, beta2), eps=epsilon, weight_decay=decay, moves_all=True)


def test_adamw_without_decay_is_adam():
    settings: dict[str, float] = {"momentum": 0.8, "beta2": 0.9, "epsilon": 1e-4}
    plain, decayed = (SERVER_OPTIMIZERS[name](ServerConfig(optimizer=name, **settings)) for name in ("adam", "adamw"))  # type: ignore[arg-type]
    weights = torch.randn(P, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain.step(weights, updates()[0], plain.init(P), 0.1, 1)[0], decayed.step(weights, updates()[0], decayed.init(P), 0.1, 1)[0])


@pytest.mark.parametrize("epsilon", [1e-3, 1e-8])
def test_adagrad_equals_torchs_over_several_rounds(epsilon: float):
    config = ServerConfig(optimizer="adagrad", epsilon=epsilon)
    assert_equals_torch(config, torch.optim.Adagrad, lr=1.0, eps=epsilon, initial_accumulator_value=epsilon**2)


@pytest.mark.parametrize(("beta1", "beta2", "epsilon"), [(0.9, 0.99, 1e-3), (0.0, 0.98, 1e-8)])
def test_yogi_equals_its_recursion_in_plain_numbers(beta1: float, beta2: float, epsilon: float):
    """Reddi et al. 2021, algorithm 2, one number at a time, in Python's own floats."""
    optimizer = SERVER_OPTIMIZERS["yogi"](ServerConfig(optimizer="yogi", momentum=beta1, beta2=beta2, epsilon=epsilon))
    weights = torch.randn(P, generator=torch.Generator().manual_seed(1))
    plain, mean, square = weights.tolist(), [0.0] * P, [epsilon**2] * P
    memory = optimizer.init(P)
    directions = set()
    for round, (update, lr) in enumerate(zip(updates(), RATES, strict=True), start=1):
        weights, memory = optimizer.step(weights, update, memory, lr, round)
        for place, delta in enumerate(update.tolist()):
            mean[place] = beta1 * mean[place] + (1 - beta1) * delta
            sign = (square[place] > delta**2) - (square[place] < delta**2)
            directions.add(sign)
            square[place] -= (1 - beta2) * delta**2 * sign
            plain[place] += lr * mean[place] / (math.sqrt(square[place]) + epsilon)
        torch.testing.assert_close(weights, torch.tensor(plain), rtol=1e-5, atol=1e-6)
    assert directions >= {-1, 1}


def test_yogi_by_hand():
    """v: .25, then up by a tenth of 1 to .35, then down by a tenth of .01 to .349; m is the update itself."""
    optimizer = SERVER_OPTIMIZERS["yogi"](ServerConfig(optimizer="yogi", momentum=0.0, beta2=0.9, epsilon=0.5))
    weights, memory = optimizer.step(torch.zeros(1), torch.tensor([1.0]), optimizer.init(1), 1.0, 1)
    assert memory["square"].item() == pytest.approx(0.35) and weights.item() == pytest.approx(1 / (0.35**0.5 + 0.5))
    weights, memory = optimizer.step(torch.zeros(1), torch.tensor([0.1]), memory, 1.0, 2)
    assert memory["square"].item() == pytest.approx(0.349) and weights.item() == pytest.approx(0.1 / (0.349**0.5 + 0.5))


@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad", "yogi"])
def test_a_decay_that_nobody_reads_is_refused(name: str):
    with pytest.raises(ConfigError, match=r"weight_decay = 0.1 is read by adamw alone; set optimizer = 'adamw'"):
        check(ServerConfig, {"optimizer": name, "weight_decay": 0.1}, where="run.toml")
    assert check(ServerConfig, {"optimizer": "mine:own", "weight_decay": 0.1}, where="run.toml").weight_decay == 0.1


def test_a_decay_beyond_0_is_refused():
    with pytest.raises(ConfigError, match=r"lr \* weight_decay = 2 shrinks weights beyond 0; keep weight_decay at most 2"):
        check(ServerConfig, {"optimizer": "adamw", "weight_decay": 4.0, "lr": 0.5}, where="run.toml")


def test_sgd_without_momentum_is_federated_averaging():
    optimizer = SERVER_OPTIMIZERS["sgd"](ServerConfig(optimizer="sgd", momentum=0.0))
    weights, _ = optimizer.step(torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0]), optimizer.init(2), 1.0, 1)
    assert weights.tolist() == [1.5, 1.0]


def test_the_step_size_by_hand():
    """Warm-up over two rounds times the cosine over four, which is .8536, .5, .1464 and 0; never below the floor."""
    config = ServerConfig(lr=10.0, rounds=4, warmup=2, schedule="cosine", floor=0.1)
    assert [learning_rate(config, round) for round in (1, 2, 3, 4)] == pytest.approx([4.2678, 5.0, 1.4645, 1.0], abs=1e-4)


def test_a_constant_step_size_is_constant_after_the_warm_up():
    config = ServerConfig(lr=2.0, rounds=9, warmup=4, schedule="constant")
    assert [learning_rate(config, round) for round in range(1, 7)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(config.model_copy(update={"warmup": 0}), 1) == 2.0


def test_a_cosine_ends_at_its_floor():
    config = ServerConfig(lr=1.0, rounds=100, schedule="cosine", floor=0.02)
    rates = [learning_rate(config, round) for round in range(1, 101)]
    assert rates[0] == pytest.approx(1.0, abs=1e-3) and rates[-1] == 0.02
    assert all(later <= earlier for earlier, later in pairwise(rates))
