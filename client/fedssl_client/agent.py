"""What the resident agent of a device does, without the sockets: record, recommend, forget, and have a child train. Never torch."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedssl import __version__, heap
from fedssl.device_model import ENCODER_FILE, settle
from fedssl.errors import FedSSLError
from fedssl.heads.store import HeadStore
from fedssl.log_lines import note, note_failure
from fedssl_client.device_folder import HISTORY, MODEL, heads_folder, opened_ledger
from fedssl_client.gates import platform_of
from fedssl_client.history import HistoryStore, now
from fedssl_client.policy import OutsidePolicy, Policy, read_policy
from fedssl_client.recommender import DeviceRecommender, Recommendation
from fedssl_client.store import locked
from fedssl_client.training import Trainer, command_of

DEFAULT_K = 10
LONGEST_STEP = 0.002
"""Seconds that `record` waits for the head's step at most. A longer one goes on alone, and counts when it is done."""
MOST_AT_HAND = 1000
"""Recommendations that are kept at most: a longer list is made when it is asked for."""
_NO_MODEL = (0, 0)


LOG = logging.getLogger("fedssl.device")
"""What happens on the device, without anything that the person met, or when."""


class _Answer(NamedTuple):
    """Recommendations, and all that they were made from. Histories and heads are never changed but for others: they are compared by identity."""

    made: tuple[int, int]
    items: list[str]
    head: NDArray[np.float32] | None
    k: int
    include_seen: bool
    found: list[Recommendation]


class NoModel(FedSSLError):
    """There is nothing to recommend with yet."""


class Agent:
    """The agent of the device in ``folder``. Its methods may be called from many threads.

    ``command``: what trains, given the server's name. Raises ConfigError without a policy, DataError for a history or a ledger that cannot be trusted.
    """

    def __init__(self, folder: Path, *, command: Callable[[str], list[str]] | None = None):
        self.folder = folder
        self.policy = read_policy(folder)
        self._history = HistoryStore(folder / HISTORY)
        with opened_ledger(folder, self._history):
            pass  # One that is missing or was put back shows at the start, not at the first training.
        self._trainer = Trainer(folder, platform_of(self.policy.gates), command or command_of(folder))
        self._model_lock = threading.Lock()
        self._recommender: DeviceRecommender | None = None
        self._head: NDArray[np.float32] | None = None
        self._stored: NDArray[np.float32] | None = None
        self._begun = self._steps = self._failed_steps = 0
        self._stepping = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._answer_lock = threading.Lock()
        self._answer: _Answer | None = None
        self._asked: tuple[int, bool] | None = None
        self._made = _NO_MODEL
        with locked(folder):
            settle(folder / MODEL)  # Not while an import exchanges the names.
        self.load_model()

    def record(self, item: str, when: float | None, value: float | None) -> None:
        """Keep something the person met; on the disk when this returns. Raises DataError for what is no event, DiskError.

        Under a recipe with `[head] adapt` the head takes a step from the newest event, for which this waits `LONGEST_STEP` at most. Where
        recommendations were asked for since the event before, the next ones are then made ahead.
        """
        begun = self._begun  # Before the event is there: else one that is forgotten next could still be learned from.
        before = self._history.record(item, now() if when is None else when, 1.0 if value is None else value, self.policy.retention)
        steps: list[Future[None]] = []
        if before and self._recommender is not None and self._recommender.recipe.head.adapt:
            step = self._stepping.submit(self._step, before, item, begun)
            wait([step], LONGEST_STEP)
            step.cancel()  # Where it is still behind another one.
            steps.append(step)
        asked, self._asked = self._asked, None
        if asked is not None and asked[0] <= MOST_AT_HAND:
            self._ahead.submit(self._make_ahead, steps, *asked)

    def recommend(self, *, k: int, include_seen: bool) -> list[Recommendation]:
        """The best items after the person's history; at hand where nothing has changed since they were made. Raises NoModel."""
        self._asked = k or DEFAULT_K, include_seen
        return self._recommended(*self._asked)

    def _make_ahead(self, steps: list[Future[None]], k: int, include_seen: bool) -> None:
        """Recommendations for who asks next, after these steps. What fails does so again when they are asked for, and is told then."""
        wait(steps)
        self._recommended(k, include_seen)

    def _recommended(self, k: int, include_seen: bool) -> list[Recommendation]:
        with self._answer_lock:
            if self._model_on_disk() != self._made:
                self.load_model()
            with self._model_lock:
                recommender, head, made = self._recommender, self._head, self._made
            if recommender is None:
                raise NoModel("this device has no model yet; `fedssl device import --model DIR` brings one")
            items, last = self._history.items(), self._answer
            if last is not None and last.items is items and last.head is head and (last.made, last.k, last.include_seen) == (made, k, include_seen):
                return last.found
            found = recommender.recommend(items, k=k, exclude_seen=not include_seen, head_D=head)
            self._answer = _Answer(made, items, head, k, include_seen, found) if len(found) <= MOST_AT_HAND else None
            return found

    def status(self) -> dict[str, Any]:
        """How the agent is, by the names of StatusReply."""
        recommender = self._recommender
        with opened_ledger(self.folder, self._history) as device:
            joined, uploads = device.ledger.joined(), sum(device.ledger.uploads().values())
        policy, trainings = self._policy(), self._history.trainings(now())
        is_training = self._trainer.is_training
        return {
            "version": __version__,
            "events": len(self._history.items()),
            "model_run": recommender.run if recommender else "",
            "model_round": recommender.round if recommender else 0,
            "is_training": is_training,
            "may_train": policy.consent.train,
            "servers": self._history.servers(),
            "closed_gates": self._trainer.closed(policy.gates, None if is_training else trainings),
            "epsilon": sum(joined.values()),
            "uploads": uploads,
            "trainings_today": trainings,
            "steps": self._steps,
            "failed_steps": self._failed_steps,
        }

    def forget(self, item: str | None) -> int:
        """Remove one item's events, or all (None), and all that was learned from them: head, kept uploads. How many events were removed.

        A training that runs is ended. What was charged stays charged. Raises DiskError where bytes could not be overwritten: forget again.
        """
        with self._trainer.paused():
            removed = self._history.forget(item)
            self._forget_learned()
        note(LOG, "forgot", everything=item is None)
        return removed

    def export(self) -> dict[str, Any]:
        """All that is kept about the person, for a JSON file. Of uploads that are kept for a retry their number and bytes: the server got them."""
        user, delta = self.policy.user, 1e-6
        with opened_ledger(self.folder, self._history) as device:
            ledger = {
                "runs_joined": device.ledger.joined(),
                "uploads": sum(device.ledger.uploads().values()),
                "epsilon_of_uploads_with_own_noise": {"delta": delta, "epsilon": device.ledger.spent(user, delta)},
            }
            number, kept_bytes = device.ledger.kept_answers()
        heads = {path.name: np.fromfile(path / "user-vector.f32", "<f4").tolist() for path in sorted((self.folder / "heads").glob("*"))}
        return {
            "format": 1,
            "user": user,
            "events": [event._asdict() for event in self._history.events()],
            "heads": heads,
            "servers": self._history.servers(),
            "trainings": self._history.training_times(),
            "ledger": ledger,
            "kept_uploads": {"number": number, "bytes": kept_bytes},
        }

    def join(self, server: str) -> None:
        """Take part in this server's trainings. Raises OutsidePolicy where the person's file does not allow it."""
        policy = self._policy()
        if not policy.consent.train:
            raise OutsidePolicy("the person has not agreed to training ([consent] train in device.toml)")
        if server not in policy.allow.servers:
            raise OutsidePolicy(f"server '{server}' is not one of [allow] servers in device.toml")
        self._history.join(server)
        note(LOG, "joined", server=server)

    def leave(self, server: str) -> bool:
        """Take part no longer: a training that runs is ended, uploads that were kept for a retry are erased. Whether the person had joined."""
        with self._trainer.paused():
            had_joined = self._history.leave(server)
            self._erase_outbox()
            self._begin_anew()
        note(LOG, "left", server=server)
        return had_joined

    def users(self) -> list[int]:
        """The number under which the server knows this device."""
        return [self.policy.user]

    def train(
        self, download: bytes, server: str, *, seconds: float, is_wanted: Callable[[], bool] = lambda: True, known: tuple[int, bytes] | None = None
    ) -> bytes:
        """The Upload that answers a Download. Raises NotNow, OutsidePolicy or TrainingFailed, whose words may leave the device.

        ``known``: the head of the ledger as the server last heard of it. Raises LedgerBehind where the ledger does not hold it.
        """
        policy = self._policy()
        if not policy.consent.train or server not in policy.allow.servers or server not in self._history.servers():
            # The child would say so too, but a process that nobody asked for is not started.
            raise OutsidePolicy("this device's person has not agreed to train for this server")
        try:
            upload = self._train(download, server, policy, seconds, is_wanted, known)
        except FedSSLError:
            note_failure(LOG, "no training", server=server)
            raise
        note(LOG, "trained", server=server, download_bytes=len(download), upload_bytes=len(upload))
        return upload

    def _train(self, download: bytes, server: str, policy: Policy, seconds: float, is_wanted: Callable[[], bool], known: tuple[int, bytes] | None) -> bytes:
        if known is not None:
            with opened_ledger(self.folder, self._history) as device:
                device.ledger.check_holds(*known)
        started = now()
        try:
            return self._trainer.run(
                download,
                server,
                policy.gates,
                trainings=self._history.trainings(started),
                seconds=seconds,
                begin=lambda: self._history.begin_training(started),
                is_wanted=is_wanted,
            )
        finally:
            self.load_model()
            heap.give_back()  # what a download took

    def ledger_head(self) -> tuple[int, bytes]:
        """How many rows the ledger has, and the chain of the last one."""
        with opened_ledger(self.folder, self._history) as device:
            return device.ledger.head

    def close(self) -> None:
        """End the training that runs, and close the history."""
        self._ahead.shutdown(cancel_futures=True)
        with self._trainer.paused():
            self._history.close()
        self._stepping.shutdown()

    def load_model(self) -> None:
        """Recommend with what is in the folder now: another model, or newer weights of the same. Without one, those at hand stay.

        Steps that the head has taken end with the model or the stored head that they began from. Raises CheckpointError where it is not whole.
        """
        with self._model_lock:
            made = self._model_on_disk()
            is_other = made != self._made and made != _NO_MODEL
            if is_other:
                if self._recommender is not None and made[0] == self._made[0]:
                    self._recommender.refresh()
                else:
                    self._recommender = DeviceRecommender(self.folder / MODEL)
                self._made = made
            stored = self._read_head()
            if is_other or _bytes(stored) != _bytes(self._stored):
                self._begin_from(stored)

    def _step(self, before: list[str], item: str, begun: int) -> None:
        """One step of gradient descent on the head alone, in memory, unless it has begun anew. Whatever fails, the event is kept."""
        try:
            with self._model_lock:
                recommender, head, is_due = self._recommender, self._head, self._begun == begun
            assert recommender is not None
            row, rows = recommender.catalogue.rows.get(item), recommender.rows(before)
            if not is_due or row is None or not len(rows):
                return
            step = np.float32(recommender.recipe.head.adapt) * recommender.step(rows, row, head)
            with self._model_lock:
                if self._begun == begun:
                    self._head = step if head is None else head + step
                    self._steps += 1
        except Exception:  # What onnxruntime raises has no common base. Not a line of the log, which would say when.
            self._failed_steps += 1

    def _begin_anew(self) -> None:
        """Forget what the head learned since it was stored."""
        with self._model_lock:
            self._begin_from(self._read_head())

    def _begin_from(self, stored: NDArray[np.float32] | None) -> None:
        self._stored = self._head = stored
        self._begun, self._steps = self._begun + 1, 0

    def _model_on_disk(self) -> tuple[int, int]:
        """Which model folder there is, and which encoder in it."""
        try:
            return (self.folder / MODEL).stat().st_ino, (self.folder / MODEL / ENCODER_FILE).stat().st_mtime_ns
        except FileNotFoundError:
            return _NO_MODEL

    def _read_head(self) -> NDArray[np.float32] | None:
        """The person's head of the run that the model comes from; None where that run has none here."""
        recommender = self._recommender
        if recommender is None or recommender.recipe.head.name == "none":
            return None
        folder = heads_folder(self.folder, recommender.run)
        if not (folder / "heads.json").exists():
            return None
        user = np.array([self.policy.user], dtype=np.int64)
        heads_UD = HeadStore(folder, user, recommender.recipe.encoder.width).read(user)
        return heads_UD.reshape(-1)

    def _forget_learned(self) -> None:
        shutil.rmtree(self.folder / "heads", ignore_errors=True)
        self._begin_anew()
        with self._answer_lock:
            self._answer = None
        self._erase_outbox()

    def _erase_outbox(self) -> None:
        with opened_ledger(self.folder, self._history) as device:
            device.ledger.forget_answers()

    def _policy(self) -> Policy:
        """The person's file as it is now: consent that was taken back holds at once."""
        self.policy = read_policy(self.folder)
        return self.policy


def _bytes(head: NDArray[np.float32] | None) -> bytes:
    return b"" if head is None else head.tobytes()


def as_json(exported: dict[str, Any]) -> str:
    """An export as text. Epsilon of a run without a plan is null: JSON has no infinity."""
    runs = {run: epsilon if np.isfinite(epsilon) else None for run, epsilon in exported["ledger"]["runs_joined"].items()}
    return json.dumps({**exported, "ledger": {**exported["ledger"], "runs_joined": runs}}, ensure_ascii=False, indent=1)
