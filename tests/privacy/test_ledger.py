import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.config import PrivacyConfig, ServerConfig
from fedssl.errors import BudgetSpent, RunFolderError
from fedssl.privacy import ledger as ledger_module
from fedssl.privacy.keys import draw_cohort
from fedssl.privacy.ledger import Ledger, begin_attempt, hmac_of_totals, may_draw_noise, new_attempt
from fedssl.privacy.noise import gaussian_steps
from fedssl.privacy.plan import Plan, make_plan
from fedssl.records import SparseSum

KEY = bytes(range(32))


def plan_of(rounds: int = 3, noise: float = 2.0) -> Plan:
    plan = make_plan(PrivacyConfig(clip_norm=1.0, noise_multiplier=noise), ServerConfig(rounds=rounds, cohort=10, sampling="poisson"), None, 100)
    assert plan is not None
    return plan


def test_attempts_count_from_zero_in_each_round_and_each_is_charged(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert [ledger.charge("training", 1), ledger.charge("training", 1), ledger.charge("training", 2), ledger.charge("counts", 1)] == [0, 1, 0, 0]
    assert ledger.charged() == {"training": 3, "counts": 1}
    assert ledger.last_attempt("training", 1) == 1
    assert ledger.last_attempt("training", 3) is None


def test_another_process_reads_what_was_written(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.seal("training", 1, ledger.charge("training", 1), "aa")
    ledger.charge("training", 1)
    again = Ledger(tmp_path / "ledger.jsonl")
    assert again.charged() == {"training": 2}
    assert (again.sealed("training", 1, 0), again.sealed("training", 1, 1)) == ("aa", None)
    assert again.charge("training", 1) == 2


def test_opening_a_ledger_writes_nothing(tmp_path: Path):
    Ledger(tmp_path / "ledger.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_charge_is_on_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append("folder" if is_folder else (tmp_path / "ledger.jsonl").read_text().splitlines()[-1])
        real(descriptor)

    monkeypatch.setattr(ledger_module.os, "fsync", fsync)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.charge("training", 1)
    assert json.loads(synced[-2])["kind"] == "charge"
    assert synced[-1] == "folder"
    ledger.seal("training", 1, 0, "aa")
    assert json.loads(synced[-1])["kind"] == "seal"


def test_a_charge_that_cannot_be_written_is_refused_and_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.charge("training", 1)

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger_module.os, "fsync", fsync)
    with pytest.raises(RunFolderError, match="No space left"):
        ledger.charge("training", 1)
    assert ledger.charged() == {"training": 1}


def test_the_ledger_is_for_its_owner_alone(tmp_path: Path):
    Ledger(tmp_path / "ledger.jsonl").charge("training", 1)
    assert stat.S_IMODE((tmp_path / "ledger.jsonl").stat().st_mode) == 0o600


def written(path: Path) -> list[bytes]:
    """A ledger of three charges and a seal; the lines of its file."""
    ledger = Ledger(path)
    ledger.charge("training", 1)
    ledger.seal("training", 1, 0, "aa")
    ledger.charge("training", 2)
    ledger.charge("training", 3)
    return path.read_bytes().splitlines(keepends=True)


def test_a_crash_at_any_byte_of_the_last_line_loses_that_line_alone(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    lines = written(path)
    whole = b"".join(lines)
    for length in range(len(whole) - len(lines[-1]), len(whole)):
        path.write_bytes(whole[:length])
        ledger = Ledger(path)
        assert ledger.charged() == {"training": 2}
        assert ledger.charge("training", 3) == 0
        assert path.read_bytes() == whole


def test_a_torn_line_longer_than_the_next_one_leaves_nothing_behind(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    lines = written(path)
    path.write_bytes(b"".join(lines[:-1]) + b'{"kind":"seal","hmac":"' + b"a" * 500)
    Ledger(path).charge("training", 3)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("number", range(5))
def test_a_line_that_was_changed_is_corruption(tmp_path: Path, number: int):
    path = tmp_path / "ledger.jsonl"
    lines = written(path)
    for bad in (b"\n", b"{}\n", b"[1]\n", b"\0\0\n", lines[number].replace(b"training", b"trainimg").replace(b"format", b"farmot")):
        path.write_bytes(b"".join([*lines[:number], bad, *lines[number + 1 :]]))
        with pytest.raises(RunFolderError, match=rf"line {number + 1}.*corrupt"):
            Ledger(path)


@pytest.mark.parametrize("number", range(4))
def test_a_line_that_was_taken_out_or_doubled_is_corruption(tmp_path: Path, number: int):
    path = tmp_path / "ledger.jsonl"
    lines = written(path)
    for bad in (lines[:number] + lines[number + 1 :], lines[: number + 1] + lines[number:]):
        path.write_bytes(b"".join(bad))
        with pytest.raises(RunFolderError, match="corrupt"):
            Ledger(path)


def test_another_format_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ledger_module, "LEDGER_FORMAT", 2)
    written(tmp_path / "ledger.jsonl")
    monkeypatch.undo()
    with pytest.raises(RunFolderError, match="format 2"):
        Ledger(tmp_path / "ledger.jsonl")


def test_two_servers_on_one_folder_cannot_both_charge_or_seal(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).charge("training", 1)
    one, other = Ledger(path), Ledger(path)
    assert may_draw_noise(one, "training", 1, 0, "aa")
    for act in (lambda: other.charge("training", 1), lambda: may_draw_noise(other, "training", 1, 0, "bb")):
        with pytest.raises(RunFolderError, match="another process"):
            act()
    path.unlink()
    with pytest.raises(RunFolderError, match="another process"):
        one.charge("training", 2)


def test_a_round_is_charged_once_and_played_again_after_a_crash(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    plan = plan_of()
    assert begin_attempt(Ledger(path), "training", 1, plan=plan) == (0, False)
    # Crash before the seal: nothing was released.
    assert begin_attempt(Ledger(path), "training", 1, plan=plan) == (0, True)
    assert may_draw_noise(Ledger(path), "training", 1, 0, "aa")
    # Crash after the seal: the same totals, the same noise.
    after = Ledger(path)
    assert begin_attempt(after, "training", 1, plan=plan) == (0, True)
    assert may_draw_noise(after, "training", 1, 0, "aa")
    assert after.charged() == {"training": 1}


def test_other_totals_than_those_sealed_are_a_new_attempt_charged_again(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    plan = plan_of()
    attempt, _ = begin_attempt(Ledger(path), "training", 1, plan=plan)
    assert may_draw_noise(Ledger(path), "training", 1, attempt, "aa")
    after = Ledger(path)
    assert not may_draw_noise(after, "training", 1, attempt, "bb")
    assert new_attempt(after, "training", 1, plan=plan) == 1
    assert after.charged() == {"training": 2}
    assert may_draw_noise(after, "training", 1, 1, "bb")
    assert Ledger(path).sealed("training", 1, 0) == "aa"


def test_an_attempt_that_was_superseded_is_never_sealed(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.charge("training", 1)
    ledger.charge("training", 1)
    with pytest.raises(AssertionError, match="not the newest"):
        ledger.seal("training", 1, 0, "aa")
    ledger.seal("training", 1, 1, "aa")
    with pytest.raises(AssertionError, match="other totals"):
        ledger.seal("training", 1, 1, "bb")


def test_each_exchange_of_a_round_has_its_own_seal(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.charge("training", 1)
    assert may_draw_noise(ledger, "training", 1, 0, "aa", exchange=0)
    assert may_draw_noise(ledger, "training", 1, 0, "bb", exchange=1)
    assert not may_draw_noise(Ledger(ledger.path), "training", 1, 0, "aa", exchange=1)


def test_a_round_that_would_overspend_is_refused_and_not_charged(tmp_path: Path):
    plan = plan_of(rounds=2)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    begin_attempt(ledger, "training", 1, plan=plan)
    new_attempt(ledger, "training", 1, plan=plan)
    with pytest.raises(BudgetSpent, match="round 2"):
        begin_attempt(ledger, "training", 2, plan=plan)
    with pytest.raises(BudgetSpent, match="round 1"):
        new_attempt(ledger, "training", 1, plan=plan)
    assert Ledger(ledger.path).charged() == {"training": 2}
    # What was charged may still be played again.
    assert begin_attempt(ledger, "training", 1, plan=plan) == (1, True)


def test_an_empty_cohort_is_a_round_of_noise_alone_and_charged(tmp_path: Path):
    plan = plan_of()
    ledger = Ledger(tmp_path / "ledger.jsonl")
    attempt, _ = begin_attempt(ledger, "training", 1, plan=plan)
    assert len(draw_cohort(KEY, "training", 1, attempt, 3, 1e-9)) == 0
    totals = {"update": np.zeros(4, dtype=np.int64)}
    assert may_draw_noise(ledger, "training", 1, attempt, hmac_of_totals(KEY, totals))
    std = plan.noise_std_in_steps("training", "update")
    assert gaussian_steps(KEY, phase="training", round=1, attempt=attempt, name="update", count=4, std_in_steps=std).any()
    assert plan.epsilon(ledger.charged()) == plan.epsilon({"training": 1}) > 0


def test_a_ledger_is_bound_to_one_plan(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    begin_attempt(ledger, "training", 1, plan=plan_of(noise=2.0))
    for act in (begin_attempt, new_attempt):
        with pytest.raises(RunFolderError, match="another privacy plan"):
            act(Ledger(ledger.path), "training", 1, plan=plan_of(noise=2.1))
    assert Ledger(ledger.path).charged() == {"training": 1}


def test_a_ledger_that_knows_less_than_a_checkpoint_is_refused(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    lines = written(path)
    whole = Ledger(path)
    whole.check_not_behind(whole.charged())
    whole.check_not_behind({})
    path.write_bytes(b"".join(lines[:2]))  # A backup: what came after is gone, and its noise may be out.
    behind = Ledger(path)
    for lost in (whole.charged(), {"counts": 99}):
        with pytest.raises(RunFolderError, match="the ledger is behind"):
            behind.check_not_behind(lost)
    assert path.read_bytes() == b"".join(lines[:2])


def play(ledger: Ledger, plan: Plan, totals_of_try: str, round_number: int, crash: str, drawn: dict[tuple[int, int], set[str]]) -> None:
    """One try at a round by the rules; it may crash before sealing or before the noise is drawn."""
    attempt, _ = begin_attempt(ledger, "training", round_number, plan=plan)
    if crash == "folding":
        return
    if not may_draw_noise(ledger, "training", round_number, attempt, totals_of_try):
        attempt = new_attempt(ledger, "training", round_number, plan=plan)
        assert may_draw_noise(ledger, "training", round_number, attempt, totals_of_try)
    if crash == "noise":
        return
    drawn.setdefault((round_number, attempt), set()).add(totals_of_try)


@settings(max_examples=60, deadline=None)
@given(tries=st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["folding", "noise", "none"]), st.sampled_from("abc"), st.booleans()), max_size=12))
def test_no_history_of_crashes_draws_one_noise_over_two_totals_or_releases_uncharged(
    tmp_path_factory: pytest.TempPathFactory, tries: list[tuple[int, str, str, bool]]
):
    path = tmp_path_factory.mktemp("run") / "ledger.jsonl"
    plan = plan_of(rounds=1000)
    ledger = Ledger(path)
    drawn: dict[tuple[int, int], set[str]] = {}
    for round_number, crash, totals, reopen in tries:
        play(ledger, plan, totals, round_number, crash, drawn)
        if reopen:
            ledger = Ledger(path)
    assert all(len(totals) == 1 for totals in drawn.values())
    assert len(drawn) <= Ledger(path).charged().get("training", 0)


def test_equal_totals_have_equal_hmacs_however_they_are_laid_out():
    dense = np.arange(12, dtype=np.int32).reshape(3, 4)
    sparse = SparseSum(np.array([0, 1], np.int32), np.array([2, 0], np.int32), np.array([5, -6], np.int64), (3, 3))
    one = hmac_of_totals(KEY, {"a": dense, "b": sparse})
    other = hmac_of_totals(KEY, {"b": sparse, "a": np.asfortranarray(dense.astype(np.int64))})
    assert one == other
    assert len(one) == 64


def test_totals_that_differ_in_anything_have_other_hmacs():
    row, column, value = np.array([1], np.int32), np.array([2], np.int32), np.array([3], np.int64)
    variants = [
        {"a": np.array([1, 2, 3])},
        {"a": np.array([1, 2, 4])},
        {"a": np.array([[1, 2, 3]])},
        {"b": np.array([1, 2, 3])},
        {"a": np.array([1, 2]), "b": np.array([3])},
        {"a": np.array([1]), "b": np.array([2, 3])},
        {"a": np.array([1, 2, 3]), "b": np.array([], dtype=np.int64)},
        {"a": SparseSum(row, column, value, (4, 4))},
        {"a": SparseSum(column, row, value, (4, 4))},
        {"a": SparseSum(row, column, value, (4, 5))},
        {},
    ]
    assert len({hmac_of_totals(KEY, totals) for totals in variants}) == len(variants)
    assert hmac_of_totals(KEY, variants[0]) != hmac_of_totals(bytes(32), variants[0])


def test_floats_have_no_hmac():
    with pytest.raises(TypeError, match="whole numbers"):
        hmac_of_totals(KEY, {"a": np.array([1.0])})
