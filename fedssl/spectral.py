"""First item vectors from item-to-item counts: items that occur in the same company begin close to each other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedssl import seeds
from fedssl.counts import Counts

OVERSAMPLING = 8
"""Directions beyond the wanted ones in which the randomised decomposition looks."""

POWER_ITERATIONS = 4


def spectral_items(counts: Counts, random_ID: Tensor, *, seed: int) -> Tensor:
    """Item vectors whose products are close to the positive pointwise mutual information of the counts. Shape: that of ``random_ID``, (I + 1, D).

    U sqrt(S) of a truncated singular value decomposition of the symmetrised counts, scaled to the spread of ``random_ID``. An item without a
    count, and directions beyond the number of items, stay random. Row 0 is zero. The same bytes for any number of threads.
    Source: Levy and Goldberg 2014, Neural word embedding as implicit matrix factorization, section 4.2; the decomposition: Halko, Martinsson
    and Tropp 2011, https://arxiv.org/abs/0909.4061, algorithm 5.1.
    """
    I1, D = random_ID.shape
    rank = min(D, I1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.key(seed, "first items"))
            left_IR, values_R, _ = torch.svd_lowrank(positive_information(counts), q=min(rank + OVERSAMPLING, I1), niter=POWER_ITERATIONS)
    finally:
        torch.set_num_threads(threads)
    items_IR = left_IR[:, :rank] * values_R[:rank].sqrt()
    is_counted_I = items_IR.abs().sum(1) > 0
    is_counted_I[0] = False
    result = random_ID.clone()
    if is_counted_I.any():
        spread = random_ID[1:].square().mean().sqrt() / items_IR[is_counted_I].square().mean().sqrt()
        result[:, :rank][is_counted_I] = items_IR[is_counted_I] * spread
    return result


def positive_information(counts: Counts) -> Tensor:
    """max(0, log(p(i, j) / (p(i) p(j)))) of the symmetrised counts, a sparse tensor (I + 1, I + 1)."""
    size = len(counts.starts) - 1
    rows = np.repeat(np.arange(size), np.diff(counts.starts))
    place = np.stack([np.concatenate([rows, counts.columns]), np.concatenate([counts.columns, rows])])
    both = torch.sparse_coo_tensor(torch.from_numpy(place), torch.from_numpy(np.tile(counts.values.astype(np.float64), 2)), (size, size), check_invariants=True)
    both = both.coalesce()
    (row, column), value = both.indices(), both.values()
    total_I = torch.zeros(size, dtype=torch.float64).index_add_(0, row, value)
    information = (value * total_I.sum() / (total_I[row] * total_I[column])).log().clamp(min=0)
    is_more = information > 0
    return torch.sparse_coo_tensor(both.indices()[:, is_more], information[is_more].float(), (size, size), check_invariants=True).coalesce()
