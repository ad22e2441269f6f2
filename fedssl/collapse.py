"""Collapse: whether the encodings of different histories still differ, and whether they lie where what came next does.

A pretext task may be solved by encoding all histories alike; ranks of items show that late, these numbers at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_SHARE = 0.05
"""Encodings that fill a smaller share of their directions, beyond the one that even collapsed ones have, are taken for collapsed."""


class Spread(NamedTuple):
    """How encodings lie in their ``width`` directions.

    ``effective_rank``: directions in use, from 1 to the width: exponential of the entropy of the normalised singular values (RankMe:
    Garrido et al. 2023, https://arxiv.org/abs/2210.02885, equation 1). ``alignment``: mean squared distance, from 0 to 4, of an encoding to the vector
    of what came next, both of length 1; ``uniformity``: log of the mean of exp(-2 d^2) over pairs of encodings of length 1, 0 where all are alike,
    and lower the further apart they are (Wang and Isola 2020, https://arxiv.org/abs/2005.10242, section 4.1).
    """

    effective_rank: float
    alignment: float
    uniformity: float
    width: int

    @property
    def is_collapsed(self) -> bool:
        """Whether hardly more than one direction is in use."""
        return self.effective_rank < 1 + LEAST_SHARE * (self.width - 1)


def spread(encodings_ND: Tensor, next_ND: Tensor) -> Spread:
    """The spread of N encodings, at least two, and of the vectors of the items that came next."""
    encoded, following = F.normalize(encodings_ND, dim=1), F.normalize(next_ND, dim=1)
    alignment = (encoded - following).square().sum(1).mean()
    uniformity = torch.pdist(encoded).square().mul(-2).exp().mean().log()
    return Spread(effective_rank(encodings_ND), float(alignment), float(uniformity), encodings_ND.shape[1])


def effective_rank(encodings_ND: Tensor) -> float:
    """Directions in use, from 1 to D; 1 where all encodings are alike, or zero."""
    values = torch.linalg.svdvals(encodings_ND.double())
    share = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))
