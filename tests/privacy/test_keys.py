import stat
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedssl.errors import RunFolderError
from fedssl.privacy.keys import Keys, cohort_by_coins, cohort_of_pass, draw_cohort, make_keys, read_keys

KEY = bytes(range(32))


def test_new_keys_are_two_different_secrets_that_only_the_owner_reads(tmp_path: Path):
    keys = make_keys(tmp_path)
    assert len(keys.cohort) == len(keys.noise) == 32
    assert keys.cohort != keys.noise
    assert read_keys(tmp_path) == keys
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in sorted((tmp_path / "secrets").iterdir())] == [0o600, 0o600]
    assert [path.name for path in tmp_path.iterdir()] == ["secrets"]


def test_keys_are_never_overwritten(tmp_path: Path):
    keys = make_keys(tmp_path)
    with pytest.raises(RunFolderError, match="never overwritten"):
        make_keys(tmp_path)
    assert read_keys(tmp_path) == keys


def test_keys_of_two_runs_differ(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert make_keys(tmp_path / "a") != make_keys(tmp_path / "b")


def test_keys_need_a_run_folder(tmp_path: Path):
    with pytest.raises(RunFolderError, match="no such folder"):
        make_keys(tmp_path / "absent")


def test_missing_keys_are_an_error_that_says_so(tmp_path: Path):
    with pytest.raises(RunFolderError, match="secrets is missing"):
        read_keys(tmp_path)
    make_keys(tmp_path)
    (tmp_path / "secrets" / "noise.key").unlink()
    with pytest.raises(RunFolderError, match=r"noise.key is missing"):
        read_keys(tmp_path)


def test_a_short_key_is_an_error(tmp_path: Path):
    make_keys(tmp_path)
    (tmp_path / "secrets" / "cohort.key").write_bytes(b"short")
    with pytest.raises(RunFolderError, match="5 bytes instead of 32"):
        read_keys(tmp_path)


@pytest.mark.parametrize(("path", "mode"), [("secrets", 0o755), ("secrets/cohort.key", 0o640), ("secrets/noise.key", 0o604)])
def test_keys_that_others_may_read_are_an_error(tmp_path: Path, path: str, mode: int):
    make_keys(tmp_path)
    (tmp_path / path).chmod(mode)
    with pytest.raises(RunFolderError, match="chmod"):
        read_keys(tmp_path)


def test_keys_do_not_print(tmp_path: Path):
    keys = Keys(cohort=b"A" * 32, noise=b"B" * 32)
    assert repr(keys) == str(keys) == f"{keys}" == "Keys()"


def test_each_user_comes_with_the_rate_and_independently_of_the_others():
    q, users, rounds = 0.085, 500, 800
    came = np.zeros((rounds, users), dtype=bool)
    for number in range(rounds):
        came[number, draw_cohort(KEY, "training", number + 1, 0, users, q)] = True
    deviation = (q * (1 - q)) ** 0.5
    assert abs(came.mean() - q) < 4 * deviation / (rounds * users) ** 0.5
    # A binomial cohort varies; a fixed-size one would not. Users side by side come independently.
    assert came.sum(1).var() == pytest.approx(users * deviation**2, rel=0.25)
    assert abs(np.corrcoef(came[:, 0], came[:, 1])[0, 1]) < 4 / rounds**0.5
    assert (np.abs(came.mean(0) - q) < 4.5 * deviation / rounds**0.5).all()


def test_a_cohort_is_sorted_and_repeats():
    cohort = draw_cohort(KEY, "training", 1, 0, 1000, 0.3)
    assert cohort.dtype == np.int64
    assert (np.diff(cohort) > 0).all()
    assert cohort.tolist() == draw_cohort(KEY, "training", 1, 0, 1000, 0.3).tolist()


@pytest.mark.parametrize("other", [("counts", 1, 0), ("training", 2, 0), ("training", 1, 1)])
def test_another_phase_round_or_attempt_is_another_independent_cohort(other: tuple[str, int, int]):
    here, there = (set(draw_cohort(KEY, *address, 10_000, 0.2).tolist()) for address in (("training", 1, 0), other))
    assert len(here & there) == pytest.approx(400, abs=80)


def test_another_key_is_another_cohort():
    assert draw_cohort(KEY, "training", 1, 0, 1000, 0.2).tolist() != draw_cohort(bytes(32), "training", 1, 0, 1000, 0.2).tolist()


def test_everybody_comes_at_a_rate_of_one():
    assert draw_cohort(KEY, "counts", 1, 0, 5, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_an_empty_cohort_is_an_answer():
    cohort = draw_cohort(KEY, "training", 1, 0, 3, 1e-9)
    assert cohort.tolist() == []
    assert cohort.dtype == np.int64


def test_more_users_do_not_change_the_coins_of_the_first():
    few, many = draw_cohort(KEY, "t", 1, 0, 1000, 0.1), draw_cohort(KEY, "t", 1, 0, 300_000, 0.1)
    assert few.tolist() == many[many < 1000].tolist()
    assert many.max() > 131_072 * 2  # the third block of coins is used too
    assert len(many) == pytest.approx(30_000, abs=4 * 165)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.01, float("nan")])
def test_an_impossible_rate_is_refused(bad: float):
    for draw in (lambda: draw_cohort(KEY, "t", 1, 0, 10, bad), lambda: cohort_by_coins(1, bad, 10, 1, "t")):
        with pytest.raises(ValueError, match="rate"):
            draw()


def test_a_million_users_are_quick():
    start = time.process_time()
    draw_cohort(KEY, "training", 1, 0, 1_000_000, 0.01)
    assert time.process_time() - start < 0.15  # 10 ms on a quiet core


@given(seed=st.integers(0, 5), users_per_round=st.integers(1, 12), num_users=st.integers(1, 30), number=st.integers(0, 3))
def test_a_pass_has_each_user_exactly_once(seed: int, users_per_round: int, num_users: int, number: int):
    rounds = -(-num_users // users_per_round)
    cohorts = [cohort_of_pass(seed, users_per_round, num_users, number * rounds + slot + 1) for slot in range(rounds)]
    assert sorted(np.concatenate(cohorts).tolist()) == list(range(num_users))
    assert [len(cohort) for cohort in cohorts[:-1]] == [users_per_round] * (rounds - 1)
    assert all((np.diff(cohort) > 0).all() for cohort in cohorts)


def test_passes_are_shuffled_anew_and_repeat_with_the_seed():
    first, second = cohort_of_pass(1, 10, 100, 1), cohort_of_pass(1, 10, 100, 11)
    assert first.tolist() != second.tolist()
    assert first.tolist() == cohort_of_pass(1, 10, 100, 1).tolist()
    assert first.tolist() != cohort_of_pass(2, 10, 100, 1).tolist()


def test_coins_from_the_seed_come_with_the_rate_and_change_with_round_and_phase():
    cohort = cohort_by_coins(1, 0.1, 20_000, 1, "training")
    assert len(cohort) == pytest.approx(2000, abs=4 * 43)
    assert cohort.tolist() == cohort_by_coins(1, 0.1, 20_000, 1, "training").tolist()
    for other in ((2, 0.1, 20_000, 1, "training"), (1, 0.1, 20_000, 2, "training"), (1, 0.1, 20_000, 1, "counts")):
        assert len(np.intersect1d(cohort, cohort_by_coins(*other))) == pytest.approx(200, abs=60)
    assert cohort_by_coins(1, 1.0, 5, 1, "training").tolist() == [0, 1, 2, 3, 4]
