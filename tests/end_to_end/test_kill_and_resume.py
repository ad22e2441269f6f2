"""A run is killed (SIGKILL) at chosen points and at random moments, resumed, killed again, and ends with the same bytes.

Everything is on: counts with noise, a clip, heads, dropout, Adam, an average of late rounds, two nodes, a checkpoint every second round. The
run is a forked child; there, and only there, one function is replaced by itself with a kill before, after or within.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fedssl_server import exchange, rounds
from fedssl_simulations import run as run_module
from fedssl_simulations.run import simulate
from small import KEYS, PLAN, learned, small_config, small_dataset

from fedssl import checkpoints, client_round, server_round
from fedssl.config import RunConfig
from fedssl.heads import store as heads_store
from fedssl.privacy import clipping, ledger
from fedssl.privacy.plan import make_plan
from fedssl.round_lines import read_lines

USERS = 16
CONFIG = small_config(
    PLAN,
    {
        "encoder": {"dropout": 0.1},
        "counts": {"clip_norm": 1.0, "lags": 2, "items": 20},
        "distillation": {"steps": 3, "walks": 4, "length": 5},
        "head": {"name": "user-vector", "lr": 0.5},
        "local": {"steps": 2, "lr": 0.1},
        "server": {"rounds": 6, "cohort": 8, "optimizer": "adam", "average_from": 3},
        "privacy": {"counts_noise_multiplier": 0.5},
        "system": {"shards": 2, "workers": 1, "users_per_chunk": 2, "checkpoint_every": 2},
    },
)

Sabotage = Callable[[], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # Another thread may still run until the signal arrives; this one goes no further.


# ---- where a kill may fall ----


def replaced(owner: Any, name: str, call: int, when: str, *, target: str = "", within: Callable[..., None] | None = None) -> None:
    """In this process, kill it at the ``call``-th call of a function: before it, after it, or ``within`` a stand-in that does half of it.

    ``target``: count only calls that name this file.
    """
    real, seen = getattr(owner, name), [0]

    def function(*arguments: Any, **named: Any) -> Any:
        if target and not any(target in str(argument) for argument in arguments):
            return real(*arguments, **named)
        seen[0] += 1
        is_now = seen[0] == call
        if is_now and within is not None:
            within(*arguments, **named)
            die()
        if is_now and when == "before":
            die()
        result = real(*arguments, **named)
        if is_now and when == "after":
            die()
        return result

    setattr(owner, name, function)


def at(owner: Any, name: str, call: int, when: str, **more: Any) -> Sabotage:
    return partial(replaced, owner, name, call, when, **more)


def half_a_line(self: Any, file: Any, entry: Any) -> None:
    """The ledger's line, torn in the middle."""
    file.seek(self._good)
    file.write(b'{"kind":"charge","pha')
    file.flush()


def half_a_metric(path: Path, values: Any) -> None:
    with path.open("a") as file:
        file.write('{"phase": "training", "rou')


def in_heads(call: int, when: str) -> Sabotage:
    """At the ``call``-th change of heads in their file: the journal knows of it, the file not yet, half, or wholly."""
    store = heads_store.HeadStore
    real = store._put

    def half(self: Any, places: Any, heads: Any) -> None:
        some = len(places) // 2 + 1
        real(self, places[:some], heads[:some])

    return at(store, "_put", call, when, within=half if when == "half" else None)


class Kills(NamedTuple):
    """One history of a run: killed at these points one after the other, each time resumed."""

    name: str
    points: tuple[Sabotage, ...]


def once(name: str, *points: Sabotage) -> Kills:
    return Kills(name, points)


# Two nodes: additions 1 and 2 are of the histogram, 3 and 4 of the counts, 5 to 16 of the training's six rounds.
PLACES = ((1, "before"), (2, "after"), (4, "before"), (4, "after"), (5, "after"), (8, "before"), (11, "after"), (16, "after"))
ADD = [at(exchange, "add", call, when) for call, when in PLACES]
HISTORIES = [
    once("before the run is written down", at(os, "replace", 1, "before", target="run.toml")),
    once("after the run is written down", at(os, "replace", 1, "after", target="run.toml")),
    once("while a store of heads is made", at(os, "replace", 1, "before", target="heads.json")),
    *(once(f"inside the fold, {number}", point) for number, point in enumerate(ADD)),
    once("inside the counts of a node", at(client_round, "sum_transitions", 1, "before")),
    once("after the counts of a node", at(client_round, "sum_transitions", 2, "after")),
    once("inside the histogram of a node", at(client_round, "sum_items", 1, "before")),
    once("inside the release of the histogram", at(server_round, "finish_popularity", 1, "before")),
    once("before the release of the counts", at(server_round, "denoise", 1, "before")),
    once("after the release of the counts", at(server_round, "denoise", 1, "after")),
    once("inside the distillation", at(server_round, "distil", 1, "before")),
    once("after the distillation", at(server_round, "distil", 1, "after")),
    once("inside a chunk", at(clipping.GridTotal, "add", 5, "before")),
    once("inside a later chunk", at(clipping.GridTotal, "add", 17, "after")),
    once("before a charge", at(rounds, "begin_attempt", 4, "before")),
    once("between a charge and its cohort", at(rounds, "begin_attempt", 4, "after")),
    once("in the append to the ledger", at(ledger.Ledger, "_write", 7, "", within=half_a_line)),
    once("in the first line of the ledger", at(ledger.Ledger, "_write", 1, "", within=half_a_line)),
    once("between totals and seal", at(rounds, "may_draw_noise", 3, "before")),
    once("between seal and noise", at(rounds, "may_draw_noise", 3, "after")),
    once("between seal and noise of the counts", at(rounds, "may_draw_noise", 2, "after")),
    once("between noise and new weights", at(server_round, "gaussian_steps", 4, "after")),
    once("before a line of metrics", at(run_module, "append_line", 4, "before")),
    once("in a line of metrics", at(run_module, "append_line", 4, "", within=half_a_metric)),
    once("after a line of metrics", at(run_module, "append_line", 5, "after")),
    once("in a checkpoint, first file", at(checkpoints, "put_arrays", 4, "after")),
    once("in a checkpoint with an average, between the model and the weights of training", at(checkpoints, "put_arrays", 7, "after")),
    once("in a checkpoint, before its rename", at(os, "rename", 2, "before", target=".new")),
    once("in a checkpoint, after its rename", at(os, "rename", 2, "after", target=".new")),
    once("before an old checkpoint is taken away", at(os, "rename", 1, "before", target=".old")),
    once("after the last checkpoint, before the one before it is taken away", at(os, "rename", 3, "before", target=".old")),
    once("after the last checkpoint, while the one before it is removed", at(os, "rename", 3, "after", target=".old")),
    once("while an old checkpoint is removed", at(os, "unlink", 3, "before", target="safetensors")),
    once("after an old checkpoint was removed", at(shutil, "rmtree", 1, "after", target=".old")),
    once("between journal and heads", in_heads(5, "before")),
    once("half of the heads written", in_heads(5, "half")),
    once("heads written, journal too", in_heads(5, "after")),
    once("before the journal's rename", at(os, "replace", 1, "before", target="journal")),
    once("after the journal's rename", at(os, "replace", 2, "after", target="journal")),
    once("before the report", at(os, "replace", 1, "before", target="report.json")),
    once("after the report", at(os, "replace", 1, "after", target="report.json")),
    # Killed again while the damage of the first kill is being undone.
    once("while heads are taken back", at(run_module, "append_line", 4, "after"), in_heads(1, "before")),
    once("half of a head taken back", at(run_module, "append_line", 6, "after"), in_heads(2, "after"), in_heads(3, "before")),
    once("in the journal's rename after taking back", at(run_module, "append_line", 6, "before"), at(os, "replace", 1, "before", target="journal")),
    once("while metrics are cut back", at(run_module, "append_line", 6, "after"), at(os, "replace", 1, "before", target="metrics")),
    once("in the fold, again and again", ADD[2], ADD[0], ADD[3], ADD[1]),
    once("sealed, killed, played again, killed again", at(rounds, "may_draw_noise", 4, "after"), at(rounds, "may_draw_noise", 2, "after")),
    once("torn ledger, then torn again", at(ledger.Ledger, "_write", 7, "", within=half_a_line), at(ledger.Ledger, "_write", 1, "", within=half_a_line)),
]


# ---- a run in a child of its own ----


def play(folder: Path, config: RunConfig) -> None:
    dataset, keys = small_dataset(users=USERS), KEYS if config.privacy.has_plan else None
    if (folder / "run.toml").exists():
        simulate(resume=folder, dataset=dataset, keys=keys)
    else:
        simulate(config, out=folder, dataset=dataset, keys=keys)


def start(folder: Path, sabotage: Sabotage | None = None, config: RunConfig = CONFIG) -> int:
    """Begin the run or go on with it, in a forked child; its process number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        # A killed process loses nothing that it gave to the operating system, so waiting for the disk proves nothing here.
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
        if sabotage is not None:
            sabotage()
        play(folder, config)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def wait(child: int) -> int:
    """Its exit code; -9: killed."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


class Reference(NamedTuple):
    learned: dict[str, bytes]
    metrics: list[dict[str, Any]]
    epsilons: list[float]
    seconds: float


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in ("seconds", "epsilon")} for line in read_lines(folder / "metrics.jsonl")]


def epsilons_of(folder: Path) -> list[float]:
    return [line["epsilon"] for line in read_lines(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("never-killed") / "run"
    torch.set_num_threads(1)
    plan = make_plan(CONFIG.privacy, CONFIG.server, CONFIG.counts, USERS)
    assert plan is not None
    # The accountant remembers what it was asked, and a child inherits it: children are then quick.
    for count in range(CONFIG.server.rounds + 1):
        plan.epsilon({"popularity": 1, "counts": 1, "training": count})
    begun = time.monotonic()
    assert wait(start(folder)) == 0
    return Reference(learned(folder), metrics_of(folder), epsilons_of(folder), time.monotonic() - begun)


def check_is_as_if_never_killed(folder: Path, reference: Reference) -> None:
    assert wait(start(folder)) == 0
    found = learned(folder)
    assert found.keys() == reference.learned.keys()
    assert [name for name in found if found[name] != reference.learned[name]] == []
    assert metrics_of(folder) == reference.metrics
    # A round that is played again says what was charged by then, later rounds that were lost included; in the end all is equal.
    assert all(ours >= theirs for ours, theirs in zip(epsilons_of(folder), reference.epsilons, strict=True))
    assert epsilons_of(folder)[-1] == reference.epsilons[-1]
    assert ledger.Ledger(folder / "ledger.jsonl").charged() == {"popularity": 1, "counts": 1, "training": CONFIG.server.rounds}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"round-{CONFIG.server.rounds:06d}"]
    assert (folder / "report.json").exists()


def test_the_reference_learned_something_in_every_part(never_killed: Reference):
    assert never_killed.learned.keys() == {
        *(f"round-000006/{name}.safetensors" for name in ("counts", "optimizer", "popularity", "training", "weights")),
        "node-000/user-vector.f32",
        "node-001/user-vector.f32",
    }
    assert all(any(raw) for raw in never_killed.learned.values())
    assert len(never_killed.metrics) == 3 + CONFIG.server.rounds


def test_at_least_thirty_kills_at_chosen_points(capsys: pytest.CaptureFixture[str]):
    kills = sum(len(history.points) for history in HISTORIES)
    with capsys.disabled():
        print(f" {kills} kills at chosen points in {len(HISTORIES)} histories ", end="")
    assert kills >= 30


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.name)
def test_killed_at_a_chosen_point_and_resumed_it_ends_with_the_same_bytes(history: Kills, never_killed: Reference, tmp_path: Path):
    for point in history.points:
        assert wait(start(tmp_path / "run", point)) == -signal.SIGKILL, "the point was never reached"
    check_is_as_if_never_killed(tmp_path / "run", never_killed)


def kill_at_random_moments(folder: Path, config: RunConfig, chance: random.Random, seconds: float) -> int:
    """Start or resume a run four times and kill it within ``seconds``; how many kills came before its end. Where none did, all anew in half the time."""
    kills = 0
    while not kills:
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(4):
            child = start(folder, config=config)
            time.sleep(chance.random() * seconds)
            os.kill(child, signal.SIGKILL)
            kills += wait(child) == -signal.SIGKILL
        seconds /= 2
    return kills


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bytes(
    seed: int, never_killed: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kills = kill_at_random_moments(tmp_path / "run", CONFIG, random.Random(seed), 0.4 * never_killed.seconds)
    with capsys.disabled():
        print(f" {kills} kills ", end="")
    check_is_as_if_never_killed(tmp_path / "run", never_killed)


def test_killed_with_worker_processes_and_resumed_it_ends_with_the_bytes_of_a_run_without_them(never_killed: Reference, tmp_path: Path):
    config = CONFIG.model_copy(update={"system": CONFIG.system.model_copy(update={"workers": 2})})
    assert wait(start(tmp_path / "run", at(run_module, "append_line", 4, "after"), config)) == -signal.SIGKILL
    check_is_as_if_never_killed(tmp_path / "run", never_killed)


# ---- a run that stops early ----

# Validations after every second round: best after round 4, over after round 10.
PATIENT = small_config(
    {
        "counts": {"lags": 2},
        "head": {"name": "user-vector", "lr": 0.5},
        "server": {"rounds": 12, "cohort": 8, "schedule": "constant", "lr": 0.2},
        "system": {"shards": 2, "users_per_chunk": 2, "checkpoint_every": 3},
        "evaluation": {"every": 2, "patience": 3},
    }
)
# A line for the counts and ten for rounds; two nodes that change heads once a round, then one head at a time on the way back.
LINES, HEADS = 11, 20
EARLY = [
    once("between the best round's line and its checkpoint", at(run_module, "append_line", 5, "after")),
    once("in the best round's checkpoint", at(checkpoints, "put_arrays", 11, "after")),
    once("before the line that ends it", at(run_module, "append_line", LINES, "before")),
    once("between the line that ends it and the last checkpoint", at(run_module, "append_line", LINES, "after")),
    once("before it goes back to its best round", at(run_module, "read_checkpoint", 1, "before")),
    once("while heads go back", in_heads(HEADS + 3, "after")),
    once("while heads go back, twice", in_heads(HEADS + 3, "after"), in_heads(5, "before")),
    once("before the journal forgets that heads went back", at(os, "replace", 6, "before", target="journal")),
    once("before the report", at(os, "replace", 1, "before", target="report.json")),
    once("after the best round, before and after the end", at(run_module, "append_line", 7, "after"), at(run_module, "append_line", 6, "after")),
]


class Early(NamedTuple):
    learned: dict[str, bytes]
    metrics: list[dict[str, Any]]
    model: dict[str, Any]
    seconds: float


def early_of(folder: Path, seconds: float = 0.0) -> Early:
    """All that is left of a run that stopped early, both its checkpoints included."""
    files = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted((folder / "checkpoints").glob("*/*.safetensors"))}
    return Early(learned(folder) | files, metrics_of(folder), json.loads((folder / "report.json").read_text())["model"], seconds)


@pytest.fixture(scope="module")
def never_killed_early(tmp_path_factory: pytest.TempPathFactory) -> Early:
    folder = tmp_path_factory.mktemp("never-killed") / "run"
    begun = time.monotonic()
    assert wait(start(folder, config=PATIENT)) == 0
    found = early_of(folder, time.monotonic() - begun)
    assert found.model["round"] == 4 and found.model["stopped_early"] and len(found.metrics) == LINES
    assert {name.split("/")[0] for name in found.learned} == {"round-000004", "round-000010", "node-000", "node-001"}
    return found


def check_stops_as_if_never_killed(folder: Path, reference: Early) -> None:
    assert wait(start(folder, config=PATIENT)) == 0
    found = early_of(folder)
    assert [name for name in {*found.learned, *reference.learned} if found.learned.get(name) != reference.learned.get(name)] == []
    assert (found.metrics, found.model) == (reference.metrics, reference.model)


@pytest.mark.parametrize("history", EARLY, ids=lambda history: history.name)
def test_killed_at_a_chosen_point_and_resumed_it_stops_after_the_same_round_with_the_same_bytes(history: Kills, never_killed_early: Early, tmp_path: Path):
    for point in history.points:
        assert wait(start(tmp_path / "run", point, PATIENT)) == -signal.SIGKILL, "the point was never reached"
    check_stops_as_if_never_killed(tmp_path / "run", never_killed_early)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_and_resumed_it_stops_after_the_same_round(seed: int, never_killed_early: Early, tmp_path: Path):
    kill_at_random_moments(tmp_path / "run", PATIENT, random.Random(seed), 0.6 * never_killed_early.seconds)
    check_stops_as_if_never_killed(tmp_path / "run", never_killed_early)
