"""The vector of a history: a mean so far in training, of everything in a recommendation."""

from __future__ import annotations

import numpy as np
import torch

from fedssl.config import EncoderConfig
from fedssl.encoders import Encoder
from fedssl.encoders.sasrec import sasrec
from fedssl.heads.history import history_vectors, with_history

D = 4
DEAF = Encoder(init=lambda rng: {}, encode=lambda weights, rows, padding, masks: torch.zeros_like(rows), dropout_sites=0)


def test_a_position_gets_the_mean_of_the_events_so_far():
    rows = torch.tensor([[9.0, 2.0, 4.0, 9.0, 0.0]])[None, :, :, None]
    is_padding = torch.tensor([[True, False, False, True, False]])[None]
    found = with_history(DEAF, 10.0).encode({}, rows, is_padding, ())
    assert found[0, 0, :, 0].tolist() == [0, 20, 30, 30, 20]


def test_what_the_encoder_says_stays_and_padding_and_later_events_change_nothing():
    config = EncoderConfig(width=D, heads=1, hidden=D, blocks=1, window=9)
    encoder = sasrec(config)
    rng = torch.Generator().manual_seed(1)
    weights = {name: leaf[None] for name, leaf in encoder.init(rng).items()}
    rows = torch.randn(1, 1, 6, D, generator=rng)
    padding = torch.zeros(1, 1, 6, dtype=torch.bool)
    found = with_history(encoder, 0.5).encode(weights, rows, padding, ())
    means = torch.stack([rows[0, 0, : place + 1].mean(0) for place in range(6)])
    torch.testing.assert_close(found[0, 0], encoder.encode(weights, rows, padding, ())[0, 0] + 0.5 * means)
    wider = torch.cat([torch.zeros(1, 1, 3, D), rows], 2)
    padded = torch.cat([torch.ones(1, 1, 3, dtype=torch.bool), padding], 2)
    torch.testing.assert_close(with_history(encoder, 0.5).encode(weights, wider, padded, ())[:, :, 3:], found)
    earlier = with_history(DEAF, 1.0).encode(weights, rows[:, :, :4], padding[:, :, :4], ())
    assert torch.equal(earlier, with_history(DEAF, 1.0).encode(weights, rows, padding, ())[:, :, :4])


def test_a_recommendation_gets_the_mean_of_all_events_and_an_empty_history_nothing():
    table = torch.arange(12.0).view(6, 2)
    histories = [np.array([], dtype=np.int32), np.array([1, 1, 4], dtype=np.int32), np.array([], dtype=np.int32), np.array([5], dtype=np.int32), np.array([])]
    found = history_vectors(histories, table)
    assert found.tolist() == [[0, 0], [(2 + 2 + 8) / 3, (3 + 3 + 9) / 3], [0, 0], [10, 11], [0, 0]]
    assert history_vectors([], table).shape == (0, 2)
