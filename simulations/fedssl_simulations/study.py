"""Many runs from one STUDY.toml: a grid kept in Optuna's storage, commands in processes of their own, resumed after any end.

The study's folder holds everything: `study.db` (SQLite, Optuna's), `runs/` and `attacks/` (a folder each), `logs/`, and the page. A point that was
being made when its process or the study ended is taken up again where its run folder left off.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedssl.disk import write_whole, writing
from fedssl.errors import DiskError, FedSSLError, RunFolderError
from fedssl.run_lock import held
from fedssl_simulations.study_file import Point, StudyConfig, points_of

STOP_SECONDS = 60.0
"""How long a command that was asked to stop may take for its last round and checkpoint."""

_COMMAND = [sys.executable, "-c", "from fedssl_simulations.cli import main; main()"]


@dataclass(frozen=True)
class Done:
    """A point that was made: its `report.json` (a run) or what the attack found, and the seconds that it took, all attempts together."""

    point: Point
    found: dict[str, Any]
    seconds: float


@dataclass
class Outcome:
    """Where a study stands: what is there, what is left to do, and what failed, with its last words."""

    done: list[Done] = field(default_factory=list)
    left: list[Point] = field(default_factory=list)
    failed: list[tuple[Point, str]] = field(default_factory=list)


@dataclass
class _Running:
    point: Point
    process: subprocess.Popen[bytes]
    began: float
    was_stopped: bool = False

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began


def run_study(
    study: StudyConfig,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    budget_minutes: float = math.inf,
    processes: int = 1,
    on_point: Callable[[Point, str], None] = lambda point, news: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Make what the study has not made yet, ``processes`` commands at once, and say where it stands.

    ``budget_minutes``: nothing is begun that is not expected to end in time (by what its method took so far), and what still runs
    then is stopped after its round. ``on_point``: told what becomes of each ("begins", "done", "failed", "stopped").
    Raises RunFolderError where ``out`` holds another study or another process is at it.
    """
    points = points_of(study, tuple(overrides))
    with _claimed(out, study, overrides):
        trials = _Trials(out / "study.db", points)
        deadline = time.monotonic() + 60.0 * budget_minutes
        running: list[_Running] = []
        took: dict[tuple[str, str], list[float]] = {}
        for point in points:
            if (seconds := trials.seconds(point)) is not None:
                took.setdefault((point.what, point.method), []).append(seconds)
        is_over = False
        try:
            while True:
                is_over = is_over or should_stop() or time.monotonic() >= deadline
                while not is_over and len(running) < processes and (new := trials.begin()) is not None:
                    known = took.get((new.what, new.method))
                    if known and time.monotonic() + statistics.median(known) > deadline:
                        continue  # Left for another time; what is shorter may still fit.
                    running.append(_Running(new, _start(new, out), time.monotonic()))
                    on_point(new, "begins")
                if should_stop() or time.monotonic() >= deadline:
                    _ask_to_stop(running)
                if not running:
                    break
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    news = _take(one, trials, out)
                    if news == "done":
                        took.setdefault((one.point.what, one.point.method), []).append(one.seconds)
                    on_point(one.point, news)
                time.sleep(0.05)
        finally:
            _ask_to_stop(running)
            for one in running:
                try:
                    one.process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    one.process.kill()
                    one.process.wait()
                trials.end(one.point, None, one.seconds)
        outcome = _outcome(out, points, trials)
        write_whole(out / "study.json", json.dumps(as_json(study, outcome), indent=1))
        return outcome


def _outcome(out: Path, points: Sequence[Point], trials: _Trials) -> Outcome:
    outcome = Outcome()
    for point in points:
        path, seconds = result_of(point, out), trials.seconds(point)
        if seconds is not None and path.exists():
            outcome.done.append(Done(point, json.loads(path.read_text()), seconds))
        elif error := trials.error(point):
            outcome.failed.append((point, error))
        else:
            outcome.left.append(point)
    return outcome


def result_of(point: Point, out: Path) -> Path:
    """The file that says that a point is made."""
    return out / point.folder / ("report.json" if point.what == "run" else f"{point.what}.json")


def as_json(study: StudyConfig, outcome: Outcome) -> dict[str, Any]:
    """The study as plain values: `study.json`."""
    rows = [
        {"what": point.what, "method": point.method, "epsilon": f"{point.epsilon:g}", "seed": point.seed, "seconds": one.seconds, "found": one.found}
        for one in outcome.done
        for point in [one.point]
    ]
    left = [point.folder for point in outcome.left]
    return {"title": study.title, "metric": study.metric, "done": rows, "left": left, "failed": [point.folder for point, _ in outcome.failed]}


class _Tried(NamedTuple):
    """One attempt at a point."""

    is_complete: bool
    seconds: float
    error: str


class _Trials:
    """The attempts at points in Optuna's storage, each a trial that is complete or failed. The process that holds the folder alone writes it."""

    def __init__(self, path: Path, points: Sequence[Point]):
        try:
            import optuna
        except ModuleNotFoundError:
            raise FedSSLError("a study keeps its trials with Optuna, which is not installed; pip install 'fedssl[study]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._make, self._states = optuna.trial.create_trial, optuna.trial.TrialState
        described = [self._params(point) for point in points]
        self._choices: dict[str, Any] = {
            name: optuna.distributions.CategoricalDistribution(tuple(dict.fromkeys(params[name] for params in described))) for name in described[0]
        }
        self._path = path
        with _storing(path):
            self._study = optuna.create_study(study_name="grid", storage=f"sqlite:///{path}", load_if_exists=True, direction="maximize")
            kept = self._study.get_trials(deepcopy=False)
        # This process alone writes the storage, so it is read once.
        self._tried: dict[tuple[Any, ...], list[_Tried]] = {}
        for trial in kept:
            self._note(trial.params, trial.state == self._states.COMPLETE, trial.user_attrs)
        self._waiting = [point for point in points if self.seconds(point) is None]
        self._made = {point.folder for point in points} - {point.folder for point in self._waiting}

    def begin(self) -> Point | None:
        """What is next, no longer waiting: the first that does not itself wait for a run that is not there yet."""
        ready = next((point for point in self._waiting if point.what != "attributes" or point.source in self._made), None)
        if ready is not None:
            self._waiting.remove(ready)
        return ready

    def end(self, point: Point, value: float | None, seconds: float, *, error: str = "") -> None:
        """It is complete with this value, or failed (or was stopped) without one."""
        state = self._states.COMPLETE if value is not None else self._states.FAIL
        about = {"seconds": seconds, "error": error}
        with _storing(self._path):
            self._study.add_trial(self._make(state=state, value=value, params=self._params(point), distributions=self._choices, user_attrs=about))
        self._note(self._params(point), value is not None, about)
        if value is not None:
            self._made.add(point.folder)

    def seconds(self, point: Point) -> float | None:
        """The seconds of all attempts at a point that is complete; None for one that is not."""
        tried = self._of(point)
        return sum(one.seconds for one in tried) if any(one.is_complete for one in tried) else None

    def error(self, point: Point) -> str:
        """The last words of a point whose newest attempt failed; empty where it did not."""
        tried = self._of(point)
        return tried[-1].error if tried else ""

    def _of(self, point: Point) -> list[_Tried]:
        return self._tried.get(tuple(self._params(point).values()), [])

    def _note(self, params: Mapping[str, Any], is_complete: bool, about: Mapping[str, Any]) -> None:
        key = tuple(params[name] for name in ("what", "method", "epsilon", "seed"))
        self._tried.setdefault(key, []).append(_Tried(is_complete, float(about["seconds"]), str(about["error"])))

    def _params(self, point: Point) -> dict[str, str | int]:
        return {"what": point.what, "method": point.method, "epsilon": f"{point.epsilon:g}", "seed": point.seed}


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """Around what Optuna's storage writes: where it cannot, a DiskError that names it."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DatabaseError

    try:
        yield
    except (StorageInternalError, DatabaseError) as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise DiskError(f"{path}: cannot be written ({why}); make room, or get the right to write there, and give the same command again") from None


@contextmanager
def _claimed(out: Path, study: StudyConfig, overrides: Sequence[str]) -> Iterator[None]:
    """The study's folder, held by this process: a new one, or one of the same study."""
    with writing(out):
        (out / "logs").mkdir(parents=True, exist_ok=True)
    with held(out, "study.lock"):
        asked = json.dumps({"study": study.model_dump(mode="json"), "overrides": list(overrides)}, indent=1)
        path = out / "study.asked.json"
        if path.exists() and path.read_text() != asked:
            raise RunFolderError(f"{out}: holds another study, or the same with other settings; choose another --out, or remove it")
        if not path.exists():
            write_whole(path, asked)
        yield


def _start(point: Point, out: Path) -> subprocess.Popen[bytes]:
    folder = out / point.folder
    settings = [word for text in (*point.overrides, "system.workers=1") for word in ("--set", text)]
    if point.what == "attributes":
        words = ["attack", "attributes", str(out / point.source), "--out", str(folder), *point.options]
    elif point.what != "run":
        words = ["attack", point.what, point.source, *settings, "--seed", str(point.seed), "--out", str(folder), "--quiet", *point.options]
    elif (folder / "run.toml").exists():
        words = ["simulate", "--resume", str(folder), "--quiet"]
    else:
        words = ["simulate", point.source, *settings, "--seed", str(point.seed), "--out", str(folder), "--quiet"]
    log = out / "logs" / f"{folder.name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with writing(log), log.open("ab") as file:
        # A group of its own: a Ctrl-C reaches the study alone, which stops its commands in order.
        return subprocess.Popen([*_COMMAND, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, process_group=0)


def _ask_to_stop(running: Sequence[_Running]) -> None:
    for one in running:
        if not one.was_stopped and one.process.poll() is None:
            one.was_stopped = True
            one.process.send_signal(signal.SIGINT)


def _take(one: _Running, trials: _Trials, out: Path) -> str:
    """Note how a command ended."""
    code, path = one.process.returncode, result_of(one.point, out)
    if code == 0 and path.exists():
        trials.end(one.point, headline(one.point, json.loads(path.read_text())), one.seconds)
        return "done"
    if one.was_stopped:
        trials.end(one.point, None, one.seconds)
        return "stopped"
    log = out / "logs" / f"{Path(one.point.folder).name}.log"
    lines = log.read_text(errors="replace").strip().splitlines()
    trials.end(one.point, None, one.seconds, error=(lines[-1] if lines else f"exit code {code}")[:500])
    return "failed"


def headline(point: Point, found: dict[str, Any]) -> float:
    """The one number that Optuna keeps: a run's NDCG@10 `unseen`, an attack's first figure."""
    if point.what == "run":
        return float(test_of(found)["unseen"]["ndcg@10"])
    first = found["rows"][0]
    return next(float(value["value"]) for value in first.values() if isinstance(value, dict))


def test_of(report: dict[str, Any]) -> dict[str, Any]:
    """The test of a run's report; under a plan it is for the researcher alone."""
    found: dict[str, Any] = report.get("test") or report["researcher_only"]["test"]
    return found
