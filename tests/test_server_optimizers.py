"""Server optimisers equal torch.optim's on the slope that points the other way; step sizes by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fedssl.config import ServerConfig
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


def assert_equals_torch(config: ServerConfig, theirs: type[torch.optim.Optimizer], **settings: object) -> None:
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
    assert weights[0] == before[0][0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torchs_over_several_rounds(momentum: float):
    assert_equals_torch(ServerConfig(optimizer="sgd", momentum=momentum), torch.optim.SGD, lr=1.0, momentum=momentum)


@pytest.mark.parametrize(("beta1", "beta2", "epsilon"), [(0.9, 0.98, 1e-8), (0.0, 0.999, 1e-3), (0.5, 0.0, 1e-5)])
def test_adam_equals_torchs_over_several_rounds(beta1: float, beta2: float, epsilon: float):
    config = ServerConfig(optimizer="adam", momentum=beta1, beta2=beta2, epsilon=epsilon)
    assert_equals_torch(config, torch.optim.Adam, lr=1.0, betas=(beta1, beta2), eps=epsilon)


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
