"""Collapse: directions in use, alignment, uniformity; and who is warned."""

from __future__ import annotations

import math

import pytest
import torch

from fedssl.collapse import effective_rank, spread


def test_the_effective_rank_counts_directions_in_use():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 3)) == pytest.approx(1)
    assert effective_rank(torch.zeros(7, 3)) == pytest.approx(1)
    # Singular values 3 and 1: shares 3/4 and 1/4.
    by_hand = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(by_hand)


def test_alignment_and_uniformity_by_hand():
    encodings = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    found = spread(encodings, torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    assert found.alignment == pytest.approx((0 + 2 + 4) / 3, abs=1e-6)
    # Squared distances of the three pairs: 2, 4 and 2.
    assert found.uniformity == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3), abs=1e-5)


def test_a_collapsed_encoder_is_noticed_and_a_healthy_one_is_not():
    noise = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    items = torch.randn(200, 32, generator=torch.Generator().manual_seed(2))
    alike = torch.ones(200, 32) + 0.001 * noise
    assert spread(alike, items).is_collapsed and spread(alike, items).uniformity == pytest.approx(0, abs=1e-3)
    assert not spread(noise, items).is_collapsed and spread(noise, items).effective_rank > 25
    line = torch.outer(noise[:, 0], torch.ones(32))
    assert spread(line, items).is_collapsed
