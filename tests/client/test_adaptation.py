"""What a head learns between two trainings: one step an event, in memory, within its time; gone with the head or model it began from."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from device import CATALOGUE, EVENTS, RUN, SERVER, USER, download_of, make_device, recipe_of
from fedssl_client import agent as agent_file
from fedssl_client.agent import Agent
from fedssl_client.device_folder import heads_folder
from fedssl_client.device_trainer import train
from fedssl_client.importing import import_model
from numpy.typing import NDArray

from fedssl.config import HeadConfig
from fedssl.device_model import write_device_model
from fedssl.heads.store import HeadStore
from fedssl.parts import initial_weights
from fedssl.recipe import read_recipe
from fedssl.weights import to_numpy
from fedssl.wire import to_bytes

RATE = 0.5
RECIPE = recipe_of(head={"name": "user-vector", "adapt": RATE})


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is waited for, however busy the machine that runs the tests is."""
    monkeypatch.setattr(agent_file, "LONGEST_STEP", 60.0)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(make_device(tmp_path / "d", RECIPE))
    yield agent
    agent.close()


def share_of(agent: Agent, item: str) -> float:
    """What the recommender expects of an item next."""
    scores = {one.item: one.score for one in agent.recommend(k=30, include_seen=True)}
    return float(np.exp(scores[item]) / sum(np.exp(score) for score in scores.values()))


def vector_of(agent: Agent) -> NDArray[np.float32]:
    assert agent._head is not None
    return agent._head


class Held:
    """A step that takes until it is let go."""

    def __init__(self, agent: Agent):
        assert agent._recommender is not None
        self.begun, self.may_end, self._step = threading.Event(), threading.Event(), agent._recommender.step
        agent._recommender.step = self  # type: ignore[method-assign, assignment]

    def __call__(self, *asked: object) -> NDArray[np.float32]:
        self.begun.set()
        assert self.may_end.wait(60)
        return self._step(*asked)  # type: ignore[arg-type]


def test_an_event_raises_what_is_expected_of_its_item_next_time(agent: Agent, tmp_path: Path):
    other = Agent(make_device(tmp_path / "e", recipe_of(head={"name": "user-vector"})))
    assert share_of(agent, "i20") == share_of(other, "i20")
    for each in (agent, other):
        each.record("i20", None, None)
    assert share_of(agent, "i20") > share_of(other, "i20")
    other.close()


def test_the_head_is_the_stored_one_and_a_step_from_each_event_after_those_before_it(tmp_path: Path):
    folder = make_device(tmp_path / "d", RECIPE)
    train(to_bytes(download_of(RECIPE)), folder, SERVER)
    agent = Agent(folder)
    head, recommender, met = vector_of(agent), agent._recommender, list(EVENTS)
    assert recommender is not None and head.any()
    for item in ("i20", "i5", "i20"):
        agent.record(item, None, None)
        head = head + np.float32(RATE) * recommender.step(recommender.rows(met), CATALOGUE.rows[item], head)
        met.append(item)
        assert np.array_equal(vector_of(agent), head)
    assert agent.status()["steps"] == 3
    agent.close()


def test_the_stored_head_is_not_touched_and_a_training_begins_from_it_as_in_a_simulation(tmp_path: Path):
    folder, other = (make_device(tmp_path / name, RECIPE) for name in "de")
    downloads = [to_bytes(download_of(RECIPE, round=round)) for round in (1, 2)]
    assert train(downloads[0], folder, SERVER) == train(downloads[0], other, SERVER)
    agent, silent = Agent(folder), Agent(other)
    stored = {path.name: path.read_bytes() for path in heads_folder(folder, RUN).iterdir()}
    for item in ("i20", "i5"):
        agent.record(item, 100.0, None)
        silent._history.record(item, 100.0, 1.0, silent.policy.retention)
    assert agent.status()["steps"] == 2
    assert {path.name: path.read_bytes() for path in heads_folder(folder, RUN).iterdir()} == stored
    assert train(downloads[1], folder, SERVER) == train(downloads[1], other, SERVER)
    agent.load_model()
    head = HeadStore(heads_folder(folder, RUN), np.array([USER]), 8).read(np.array([USER]))[0]
    assert np.array_equal(vector_of(agent), head)
    assert agent.status()["steps"] == 0
    agent.close()
    silent.close()


def test_a_training_that_changed_nothing_takes_no_steps_back_and_a_restart_does(agent: Agent):
    agent.record("i20", None, None)
    before = vector_of(agent)
    agent.load_model()
    assert vector_of(agent) is before
    agent.close()
    again = Agent(agent.folder)
    assert again._head is None
    again.close()


@pytest.mark.parametrize("what", [None, "i20"], ids=["all", "one item"])
def test_forgetting_leaves_nothing_of_the_steps(what: str | None, agent: Agent, tmp_path: Path):
    agent.record("i20", None, None)
    assert agent._head is not None
    agent.forget(what)
    assert (agent._head, agent.status()["steps"]) == (None, 0)
    other = Agent(make_device(tmp_path / "e", RECIPE, events=EVENTS if what else []))
    assert agent.recommend(k=30, include_seen=True) == other.recommend(k=30, include_seen=True)
    other.close()


def test_a_step_that_is_under_way_while_the_person_forgets_comes_to_nothing(agent: Agent):
    held = Held(agent)
    recording = threading.Thread(target=agent.record, args=("i20", None, None))
    recording.start()
    assert held.begun.wait(60)
    agent.forget("i20")
    held.may_end.set()
    recording.join()
    assert (agent._head, agent.status()["steps"]) == (None, 0)


def test_an_event_that_is_forgotten_before_its_step_begins_is_not_learned(agent: Agent, monkeypatch: pytest.MonkeyPatch):
    record = agent._history.record

    def recorded_and_forgotten(*event: object) -> list[str] | None:
        before = record(*event)  # type: ignore[arg-type]
        agent.forget("i20")
        return before

    monkeypatch.setattr(agent._history, "record", recorded_and_forgotten)
    agent.record("i20", None, None)
    assert agent._head is None


def test_leaving_and_another_model_leave_nothing_of_the_steps(agent: Agent, tmp_path: Path):
    agent.record("i20", None, None)
    assert agent.leave(SERVER) and agent._head is None
    agent.record("i20", None, None)
    assert agent._head is not None
    write_device_model(tmp_path / "model", RECIPE, to_numpy(initial_weights(RECIPE)), CATALOGUE, None, run="another", round=0)
    import_model(agent.folder, tmp_path / "model")
    agent.recommend(k=1, include_seen=False)
    assert (agent._head, agent.status()["steps"]) == (None, 0)


@pytest.mark.parametrize("head", [{}, {"name": "user-vector"}], ids=["none", "no step size"])
def test_a_recipe_that_does_not_ask_for_steps_gets_none(head: dict[str, str], tmp_path: Path):
    agent = Agent(make_device(tmp_path / "d", recipe_of(head=head)))
    agent.record("i20", None, None)
    assert (agent._head, agent.status()["steps"], agent.status()["failed_steps"]) == (None, 0, 0)
    agent.close()


def test_no_step_comes_from_an_unknown_item_an_older_event_or_a_first_one(agent: Agent, tmp_path: Path):
    agent.record("elsewhere", None, None)
    agent.record("i20", -1.0, None)
    assert (agent.status()["events"], agent._head) == (len(EVENTS) + 2, None)
    first = Agent(make_device(tmp_path / "e", RECIPE, events=[]))
    first.record("elsewhere", None, None)
    first.record("i20", None, None)
    assert (first.status()["events"], first._head) == (2, None)
    first.record("i5", None, None)
    assert first.status()["steps"] == 1
    first.close()


def test_without_a_model_an_event_is_kept_and_nothing_learned(tmp_path: Path):
    folder = make_device(tmp_path / "d", RECIPE)
    (folder / "model").rename(tmp_path / "away")
    agent = Agent(folder)
    agent.record("i20", None, None)
    assert (agent.status()["events"], agent._head) == (len(EVENTS) + 1, None)
    agent.close()


def test_a_step_that_fails_fails_no_record_and_is_counted(agent: Agent):
    assert agent._recommender is not None
    agent._recommender.step = lambda *asked: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    agent.record("i20", None, None)
    assert agent._history.items()[-1] == "i20"
    assert (agent._head, agent.status()["steps"], agent.status()["failed_steps"]) == (None, 0, 1)


def test_record_waits_for_a_step_no_longer_than_its_bound_and_no_steps_pile_up_behind_it(agent: Agent, monkeypatch: pytest.MonkeyPatch):
    bound = 0.02
    monkeypatch.setattr(agent_file, "LONGEST_STEP", bound)
    held = Held(agent)
    waits, began = [], time.monotonic()
    for _ in range(20):
        agent.record("i20", None, None)
        waits.append(time.monotonic() - began)
        began = time.monotonic()
    assert held.begun.wait(60) and not held.may_end.is_set()
    # Each was answered while the first step had not ended; the quickest says what is waited for, the others also how busy this machine is.
    assert bound <= min(waits) < bound + 0.5
    assert agent._history.items()[-20:] == ["i20"] * 20
    held.may_end.set()
    agent._stepping.submit(lambda: None).result(60)
    assert agent.status()["steps"] == 1


def test_events_from_many_threads_each_take_their_step(agent: Agent):
    def record(first: int) -> None:
        for number in range(first, first + 20):
            agent.record(f"i{1 + number % 30}", 100.0, None)

    threads = [threading.Thread(target=record, args=(20 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agent.status()["events"] == len(EVENTS) + 80
    assert (agent.status()["steps"], agent.status()["failed_steps"]) == (80, 0)
    assert np.isfinite(vector_of(agent)).all()


def test_a_step_size_without_a_vector_to_move_is_refused():
    with pytest.raises(ValueError, match=r"adapt = 0\.5 moves a user-vector, and name is none"):
        HeadConfig(adapt=0.5)


def test_a_recipe_without_steps_is_the_text_that_it_was_before_there_were_any():
    plain = recipe_of(head={"name": "user-vector"})
    assert "adapt" not in plain.canonical
    assert read_recipe(RECIPE.canonical, where="here") == RECIPE
    assert RECIPE.hash != plain.hash
