"""BERT4Rec: a transformer that reads a window both ways and fills in hidden items; the last of them is what comes next.

Source: Sun et al. 2019, https://arxiv.org/abs/1904.06690. The blocks are those of our SASRec (pre-norm, ReLU, no layer of their own
in front of the scores), without the causal mask; positions count from the right edge. It learns from the task `masked-item`.
"""

from __future__ import annotations

from fedssl.config import EncoderConfig
from fedssl.encoders import Encoder
from fedssl.encoders.sasrec import transformer


def bert4rec(config: EncoderConfig) -> Encoder:
    """The encoder with the widths of ``config``; it reads ``config.window`` events and a mask."""
    return transformer(config, is_causal=False)
