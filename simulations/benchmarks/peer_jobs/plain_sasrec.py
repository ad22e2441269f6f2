"""SASRec for one user in ordinary torch, with nothing of fedssl in it: what a peer's client trains.

The leaves, their names and their shapes are those of `fedssl/encoders/sasrec.py`; `tests/simulations/test_peers.py` holds loss and slopes to
ours. It is written to be quick for one user at a time: one look-up in the item table, no padding, no mask where torch knows a causal one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def encode(weights: Mapping[str, Tensor], rows_BLD: Tensor, heads: int, blocks: int) -> Tensor:
    """Hidden states of windows that begin at the left edge. Shape: (B, L, D)."""
    B, L, D = rows_BLD.shape
    hidden = rows_BLD * math.sqrt(D) + weights["positions"][-L:]
    for block in range(blocks):
        name = f"block{block}."
        normal = F.layer_norm(hidden, (D,), weights[name + "norm1.gain"], weights[name + "norm1.bias"])
        query, key, value = (normal @ weights[name + "qkv"]).view(B, L, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).reshape(B, L, D)
        hidden = hidden + read @ weights[name + "out"]
        normal = F.layer_norm(hidden, (D,), weights[name + "norm2.gain"], weights[name + "norm2.bias"])
        hidden = hidden + F.relu(normal @ weights[name + "up"] + weights[name + "up.bias"]) @ weights[name + "down"] + weights[name + "down.bias"]
    return F.layer_norm(hidden, (D,), weights["norm.gain"], weights["norm.bias"])


class PlainSASRec(nn.Module):
    """The leaves as parameters; a dot in a name is a dash here, because torch keeps dots for modules inside modules."""

    def __init__(self, weights: Mapping[str, Tensor], *, heads: int, blocks: int):
        super().__init__()
        self.heads, self.blocks = heads, blocks
        self.num_items = len(weights["items"]) - 1
        for name, leaf in weights.items():
            self.register_parameter(name.replace(".", "-"), nn.Parameter(leaf.clone()))

    def loss(self, own_1M: Tensor, candidates_1N: Tensor, read_1L: Tensor, target_1L: Tensor) -> Tensor:
        """Mean cross entropy over positions: of the next item among the user's own and the candidates, which stand for all others.

        ``own`` are the distinct catalogue rows of the user's windows, ``candidates`` distinct rows that are none of them; ``read`` and ``target``
        are places in ``own``. The leading axis is one local step.
        """
        weights = {name.replace("-", "."): leaf for name, leaf in self._parameters.items() if leaf is not None}
        M, N = own_1M.shape[1], candidates_1N.shape[1]
        rows_KD = F.embedding(torch.cat([own_1M[0], candidates_1N[0]]), weights["items"])
        hidden_LD = encode(weights, F.embedding(read_1L, rows_KD), self.heads, self.blocks)[0]
        bias_K = torch.zeros(M + N)
        bias_K[M:] = math.log((self.num_items - M) / N)
        return F.cross_entropy(hidden_LD @ rows_KD.T + bias_K, target_1L[0])
