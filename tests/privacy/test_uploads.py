"""The ledger of users who add their own noise: charged before, kept before it leaves, the same answer to the same question."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.gaussian_privacy import gaussian_epsilon
from small import recipe_of, small_config, small_dataset

from fedssl.errors import BudgetSpent, DataError, WireError
from fedssl.privacy import keys as keys_module
from fedssl.privacy.uploads import UploadLedger, open_device, question_of
from fedssl.records import Address, Download

KEY = bytes(range(32))
HERE = Address("run", "training", 1)
USERS = np.array([3, 5])


def opened(folder: Path, *, may_be_new: bool = True, key: bytes = KEY) -> UploadLedger:
    return UploadLedger(folder / "uploads.sqlite", key, may_be_new=may_be_new)


def charge(ledger: UploadLedger, question: str, users: Any = USERS, *, z: float = 2.0, promised: float | None = None, round: int = 1) -> None:
    ledger.charge(question, replace(HERE, round=round), users, cost=z**-2, promised=promised, delta=1e-5)


def test_uploads_of_a_user_add_up_to_one_gaussian_and_others_are_not_charged(tmp_path: Path):
    ledger = opened(tmp_path)
    for number in range(3):
        charge(ledger, f"q{number}", np.array([3, 5]) if number else np.array([5]))
    assert ledger.uploads() == {3: 2, 5: 3}
    assert ledger.spent(3, 1e-5) == pytest.approx(gaussian_epsilon(2.0, 2, 1e-5), abs=1e-6)
    assert ledger.spent(5, 1e-5) == pytest.approx(gaussian_epsilon(2.0, 3, 1e-5), abs=1e-6)
    assert ledger.spent(4, 1e-5) == 0.0


def test_uploads_with_other_noise_add_up_too(tmp_path: Path):
    ledger = opened(tmp_path)
    charge(ledger, "a", z=3.0)
    charge(ledger, "b", z=4.0)
    assert ledger.spent(3, 1e-6) == pytest.approx(gaussian_epsilon(2.4, 1, 1e-6), abs=1e-6)


def test_a_question_that_is_asked_again_is_charged_once_and_answered_with_the_bytes_that_left_first(tmp_path: Path):
    ledger = opened(tmp_path)
    charge(ledger, "a")
    assert ledger.answer("a") is None
    assert ledger.keep("a", HERE, b"first") == b"first"
    charge(ledger, "a")
    assert ledger.keep("a", HERE, b"second") == b"first"
    again = opened(tmp_path, may_be_new=False)
    charge(again, "a")
    assert again.keep("a", HERE, b"third") == b"first"
    assert again.uploads() == {3: 1, 5: 1}


def test_the_same_question_to_other_users_is_refused(tmp_path: Path):
    ledger = opened(tmp_path)
    charge(ledger, "a")
    for others in (np.array([3]), np.array([3, 5, 6])):
        with pytest.raises(WireError, match="asked of other users before"):
            charge(ledger, "a", others)
    assert ledger.uploads() == {3: 1, 5: 1}


def test_an_answer_that_a_checkpoint_holds_is_forgotten_and_never_drawn_anew(tmp_path: Path):
    ledger = opened(tmp_path)
    for number in (1, 2):
        charge(ledger, f"q{number}", round=number)
        ledger.keep(f"q{number}", replace(HERE, round=number), b"upload")
    ledger.forget("another run", 2)
    ledger.forget("run", 1)
    assert ledger.answer("q1") is None and ledger.answer("q2") == b"upload"
    for one in (ledger, opened(tmp_path)):
        with pytest.raises(WireError, match="no longer kept"):
            charge(one, "q1")
        charge(one, "q2", round=2)


def test_an_upload_that_would_break_the_promise_to_one_of_the_users_is_refused_and_charged_to_nobody(tmp_path: Path):
    ledger = opened(tmp_path)
    promised = gaussian_epsilon(2.0, 2, 1e-5)
    charge(ledger, "a", np.array([5]), promised=promised)
    charge(ledger, "b", promised=promised)
    before = ledger.uploads()
    with pytest.raises(BudgetSpent, match="round 7 would spend epsilon"):
        charge(ledger, "c", promised=promised, round=7)
    assert ledger.uploads() == before == opened(tmp_path).uploads() == {3: 1, 5: 2}
    charge(ledger, "d", np.array([3]), promised=promised)


def test_what_was_charged_or_kept_is_on_disk_before_the_call_returns(tmp_path: Path):
    ledger = opened(tmp_path)
    assert ledger._file.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    charge(ledger, "a")
    assert sqlite3.connect(tmp_path / "uploads.sqlite").execute("SELECT kind, question FROM uploads").fetchall() == [("charge", "a")]
    ledger.keep("a", HERE, b"upload")
    assert sqlite3.connect(tmp_path / "uploads.sqlite").execute("SELECT upload FROM answers").fetchall() == [(b"upload",)]


def test_an_answer_leaves_only_after_its_question_was_charged(tmp_path: Path):
    with pytest.raises(AssertionError, match="charged"):
        opened(tmp_path).keep("a", HERE, b"upload")


CHANGES = {
    "a cost made smaller": "UPDATE uploads SET cost = 0.0 WHERE number = 1",
    "another user": "UPDATE uploads SET users = x'0100000000000000' WHERE number = 2",
    "another kind": "UPDATE uploads SET kind = 'charge' WHERE number = 3",
    "a row taken out": "DELETE FROM uploads WHERE number = 1",
    "a row taken out and the rest renumbered": "DELETE FROM uploads WHERE number = 1; UPDATE uploads SET number = number - 1",
    "a row said twice": "INSERT INTO uploads SELECT 4, kind, question, run, phase, round, users, cost, rate, steps, chain FROM uploads WHERE number = 1",
    "a table gone": "DROP TABLE uploads",
    "another format": "PRAGMA user_version = 3",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_ledger_that_was_changed_is_refused(change: str, tmp_path: Path):
    ledger = opened(tmp_path)
    charge(ledger, "a")
    charge(ledger, "b", np.array([7]))
    ledger.keep("a", HERE, b"upload")
    ledger.close()
    opened(tmp_path).close()
    file = sqlite3.connect(tmp_path / "uploads.sqlite")
    file.executescript(CHANGES[change])
    file.close()
    with pytest.raises(DataError, match=r"unknown, so nothing is trained|ledger format 3"):
        opened(tmp_path)


def test_a_file_that_is_no_ledger_and_one_of_another_key_are_refused(tmp_path: Path):
    ledger = opened(tmp_path)
    charge(ledger, "a")
    ledger.close()
    with pytest.raises(DataError, match="not what this node wrote"):
        opened(tmp_path, key=bytes(32))
    (tmp_path / "uploads.sqlite").write_bytes(b"no ledger" * 1000)
    with pytest.raises(DataError, match="nothing is trained"):
        opened(tmp_path)


def test_a_node_whose_ledger_or_key_is_gone_is_refused_and_one_with_neither_begins(tmp_path: Path):
    device = open_device(tmp_path)
    assert (tmp_path / "device.key").read_bytes() == device.key and (tmp_path / "device.key").stat().st_mode & 0o777 == 0o600
    charge(device.ledger, "a")
    device.ledger.close()
    assert open_device(tmp_path).key == device.key
    os.rename(tmp_path / "device.key", tmp_path / "elsewhere")
    with pytest.raises(DataError, match="not what this node wrote"):
        open_device(tmp_path)
    assert not (tmp_path / "device.key").exists()
    os.rename(tmp_path / "elsewhere", tmp_path / "device.key")
    for path in tmp_path.glob("uploads.sqlite*"):
        path.unlink()
    with pytest.raises(DataError, match="missing"):
        open_device(tmp_path)


def test_a_crash_between_ledger_and_key_leaves_a_node_that_can_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(keys_module.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            open_device(tmp_path)
    assert len(open_device(tmp_path).key) == 32


@pytest.mark.parametrize("bad", [b"short", b""])
def test_a_key_of_another_length_is_refused(bad: bytes, tmp_path: Path):
    open_device(tmp_path)
    (tmp_path / "device.key").write_bytes(bad)
    with pytest.raises(DataError, match="wanted 32 bytes"):
        open_device(tmp_path)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path):
    open_device(tmp_path)
    (tmp_path / "device.key").chmod(0o644)
    with pytest.raises(DataError, match="mode 0644"):
        open_device(tmp_path)


def test_two_questions_are_one_only_where_all_is_equal_but_who_is_asked():
    recipe = recipe_of(small_config(), small_dataset())
    weights = {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), dtype=np.float32)}
    one = Download(HERE, recipe, weights, np.array([1]), settled=3, clip_norm=0.5)
    assert question_of(replace(one, users=None, settled=0, tensors=dict(reversed(weights.items())))) == question_of(one)
    others = [
        replace(one, address=replace(HERE, run="other")),
        replace(one, address=replace(HERE, round=2)),
        replace(one, address=replace(HERE, attempt=1)),
        replace(one, address=replace(HERE, exchange=1)),
        replace(one, recipe=recipe_of(small_config({"local": {"lr": 0.25}}), small_dataset())),
        replace(one, clip_norm=0.25),
        replace(one, tensors={**weights, "a": np.array([0, 1, 2, np.nextafter(np.float32(3), 4)], dtype=np.float32)}),
        replace(one, tensors={"a": weights["b"].reshape(4) * weights["a"], "b": weights["b"], "c": weights["a"]}),
        replace(one, tensors={"b": weights["a"], "a": weights["b"]}),
    ]
    assert len({question_of(each) for each in [one, *others]}) == 1 + len(others)


def test_a_run_that_is_joined_is_charged_whole_and_once(tmp_path: Path):
    ledger = opened(tmp_path)
    for _ in range(2):
        ledger.join("first", epsilon=2.0, delta=1e-6, recipe="r" * 64)
    ledger.join("open", epsilon=float("inf"), delta=1e-6, recipe="s" * 64)
    for one in (ledger, opened(tmp_path, may_be_new=False)):
        assert one.joined() == {"first": 2.0, "open": float("inf")}
        assert one.head[0] == 2
        with pytest.raises(WireError, match="joined under another recipe"):
            one.join("first", epsilon=1.0, delta=1e-6, recipe="t" * 64)
    # A run that was joined says nothing of uploads with noise.
    assert ledger.spent(3, 1e-5) == 0.0
    assert ledger.uploads() == {}


def test_a_ledger_that_was_put_back_to_an_older_one_does_not_hold_what_was_there(tmp_path: Path):
    ledger = opened(tmp_path)
    ledger.check_holds(*ledger.head)
    charge(ledger, "a")
    ledger.close()
    older = (tmp_path / "uploads.sqlite").read_bytes()
    ledger = opened(tmp_path)
    ledger.keep("a", HERE, b"upload")
    head = ledger.head
    charge(ledger, "b")
    ledger.check_holds(*head)
    ledger.close()
    for rest in tmp_path.glob("uploads.sqlite-*"):
        rest.unlink()
    (tmp_path / "uploads.sqlite").write_bytes(older)
    behind = opened(tmp_path)
    with pytest.raises(DataError, match="put back to an older one"):
        behind.check_holds(*head)
    charge(behind, "c")  # As many rows, but another one.
    with pytest.raises(DataError, match="put back to an older one"):
        behind.check_holds(*head)


def test_answers_that_are_forgotten_are_in_no_byte_of_the_files_and_are_never_given_again(tmp_path: Path):
    ledger = opened(tmp_path)
    for number in range(50):
        charge(ledger, f"q{number}", round=number + 1)
        ledger.keep(f"q{number}", replace(HERE, round=number + 1), b"UPLOADED" * 1000)
    assert any(b"UPLOADED" in path.read_bytes() for path in tmp_path.iterdir())
    ledger.forget_answers(but_of="run")
    assert ledger.answer("q7") is not None
    ledger.forget_answers(but_of="another")
    assert not any(b"UPLOADED" in path.read_bytes() for path in tmp_path.iterdir())
    with pytest.raises(WireError, match="no longer kept"):
        charge(ledger, "q1", round=2)
    assert opened(tmp_path, may_be_new=False).uploads() == {3: 50, 5: 50}
