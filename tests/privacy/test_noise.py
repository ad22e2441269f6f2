import hashlib
import hmac
import time

import numpy as np
import pytest
from scipy import stats

from fedssl.privacy.noise import gaussian_steps
from fedssl.privacy.stream import open_stream

KEY = bytes(range(32))
HERE = {"phase": "training", "round": 3, "attempt": 0, "name": "update", "block": 0}


def test_the_stream_is_chacha20_as_another_library_computes_it():
    from Crypto.Cipher import ChaCha20  # an independent implementation, which comes with flwr

    own_key = hmac.new(KEY, b'fedssl stream\x00["cohort","training",1,0]', hashlib.sha256).digest()
    expected = ChaCha20.new(key=own_key, nonce=bytes(8)).encrypt(bytes(80))
    assert open_stream(KEY, "cohort", "training", 1, 0)(10).tobytes() == expected


def test_a_stream_does_not_depend_on_how_it_is_cut():
    draw = open_stream(KEY, "x")
    assert np.concatenate([draw(3), draw(0), draw(5)]).tolist() == open_stream(KEY, "x")(8).tolist()


def test_addresses_that_read_alike_are_different_streams():
    addresses = [("a", 1), ("a", "1"), ("a1",), ("a", 1.0), (1, "a"), ("a,1",), ('a",1',)]
    assert len({open_stream(KEY, *address)(1)[0] for address in addresses}) == len(addresses)


def test_noise_is_normal_with_the_deviation_asked_for():
    std = 3.7e6
    noise = gaussian_steps(KEY, **HERE, count=200_000, std_in_steps=std) / std
    # Four standard errors each: a fixed key, so this passes always or never.
    assert abs(noise.mean()) < 4 / 200_000**0.5
    assert abs(noise.var() - 1) < 4 * (2 / 200_000) ** 0.5
    assert abs(stats.skew(noise)) < 4 * (6 / 200_000) ** 0.5
    assert abs(stats.kurtosis(noise)) < 4 * (24 / 200_000) ** 0.5
    assert stats.kstest(noise, "norm").pvalue > 0.01
    assert (np.abs(noise) > 4).sum() == pytest.approx(200_000 * 2 * stats.norm.sf(4), abs=12)


def test_the_two_numbers_of_a_pair_and_neighbours_are_not_correlated():
    noise = gaussian_steps(KEY, **HERE, count=100_000, std_in_steps=1e6) / 1e6
    for lag in (1, 2, 3):
        assert abs(np.mean(noise[lag:] * noise[:-lag])) < 4 / 100_000**0.5
        assert abs(np.mean((noise[lag:] ** 2 - 1) * (noise[:-lag] ** 2 - 1))) < 8 / 100_000**0.5


def test_a_small_deviation_is_rounded_to_the_nearest_step():
    noise = gaussian_steps(KEY, **HERE, count=100_000, std_in_steps=0.8)
    for step in range(-2, 3):
        chance = stats.norm.cdf((step + 0.5) / 0.8) - stats.norm.cdf((step - 0.5) / 0.8)
        assert np.mean(noise == step) == pytest.approx(chance, abs=0.006)


def test_the_same_address_draws_the_same_noise():
    assert gaussian_steps(KEY, **HERE, count=9, std_in_steps=1e6).tolist() == gaussian_steps(KEY, **HERE, count=9, std_in_steps=1e6).tolist()


@pytest.mark.parametrize(
    "other",
    [{"phase": "counts"}, {"round": 4}, {"attempt": 1}, {"name": "counts"}, {"block": 1}, {"exchange": 1}, {"std_in_steps": 2e6}],
    ids=lambda other: next(iter(other)),
)
def test_another_address_or_deviation_draws_independent_noise(other: dict[str, object]):
    here = gaussian_steps(KEY, **HERE, count=20_000, std_in_steps=1e6)
    there = gaussian_steps(KEY, **{**HERE, "std_in_steps": 1e6, **other}, count=20_000)  # type: ignore[arg-type]
    assert abs(np.corrcoef(here, there)[0, 1]) < 4 / 20_000**0.5


def test_another_key_draws_independent_noise():
    here, there = (gaussian_steps(key, **HERE, count=20_000, std_in_steps=1e6) for key in (KEY, bytes(32)))
    assert abs(np.corrcoef(here, there)[0, 1]) < 4 / 20_000**0.5


@pytest.mark.parametrize("count", [0, 1, 2, 7, 65_535, 65_536, 65_537])
def test_the_first_numbers_do_not_depend_on_the_count(count: int):
    long = gaussian_steps(KEY, **HERE, count=70_000, std_in_steps=1e6)
    short = gaussian_steps(KEY, **HERE, count=count, std_in_steps=1e6)
    assert short.dtype == np.int64
    assert np.array_equal(short, long[:count])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_noise_without_a_deviation_is_refused(bad: float):
    with pytest.raises(ValueError, match="deviation"):
        gaussian_steps(KEY, **HERE, count=1, std_in_steps=bad)


def test_rounding_the_noise_is_rounding_the_noised_total():
    total = np.array([5, -7, 2**40, 0])
    noise = np.array([0.49, 0.51, -1.2, 7.7])
    assert (total + np.rint(noise).astype(np.int64)).tolist() == np.rint(total + noise).astype(np.int64).tolist()


def test_three_hundred_thousand_numbers_are_quick():
    start = time.process_time()
    gaussian_steps(KEY, **HERE, count=300_000, std_in_steps=1e6)
    assert time.process_time() - start < 0.12  # 15 ms on a quiet core
