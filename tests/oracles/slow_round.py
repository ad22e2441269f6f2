"""One round of federated SGD, slow and obvious: plain torch, one user at a time, gradients added in floats."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.data.histories import Histories
from fedssl.recipe import Recipe
from fedssl.weights import Weights, flatten, layout_of


def hidden_states(weights: Weights, items: Tensor, *, heads: int, blocks: int) -> Tensor:
    """SASRec over one history without padding, as its paper has it (pre-norm, positions counted from the newest). Shape: (L, D)."""
    L, D = len(items), weights["items"].shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), weights[f"{name}.gain"], weights[f"{name}.bias"])

    x = F.embedding(items, weights["items"]) * math.sqrt(D) + weights["positions"][-L:]
    for block in range(blocks):
        name = f"block{block}."
        query, key, value = (part.view(L, heads, D // heads).transpose(0, 1) for part in (norm(x, name + "norm1") @ weights[name + "qkv"]).split(D, 1))
        read = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + read.transpose(0, 1).reshape(L, D) @ weights[name + "out"]
        wide = F.relu(norm(x, name + "norm2") @ weights[name + "up"] + weights[name + "up.bias"])
        x = x + wide @ weights[name + "down"] + weights[name + "down.bias"]
    return norm(x, "norm")


def large_batch_step(recipe: Recipe, weights: Weights, histories: Histories, *, lr: float, weighting: str) -> tuple[Tensor, float]:
    """Weights (P,) after one SGD step on the weighted mean of all users' next-item losses, and that mean."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in weights.items()}
    losses, shares = [], []
    for user in range(histories.num_users):
        row = torch.from_numpy(histories.items[histories.cuts[user] : histories.training_ends[user]]).long()
        if len(row) < 2:
            continue
        hidden = hidden_states(leaves, row[:-1], heads=recipe.encoder.heads, blocks=recipe.encoder.blocks)
        scores = hidden @ leaves["items"][1:].T
        losses.append(F.cross_entropy(scores, row[1:] - 1))
        shares.append(1.0 if weighting == "equal" else float(len(row) - 1))
    loss = sum(share * loss for share, loss in zip(shares, losses, strict=True)) / sum(shares)
    assert isinstance(loss, Tensor)
    loss.backward()
    after = {name: leaf.detach() - lr * (leaf.grad if leaf.grad is not None else 0) for name, leaf in leaves.items()}
    return flatten(after, layout_of(after)), float(loss.detach())
