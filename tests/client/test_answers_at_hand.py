"""Recommendations that an agent has at hand: those that it would make now, made ahead where they were asked for, and gone when forgotten."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device import CATALOGUE, EVENTS, make_device, recipe_of
from fedssl_client import agent as agent_file
from fedssl_client.agent import Agent
from fedssl_client.history import Event, HistoryStore
from fedssl_client.importing import import_model
from fedssl_client.policy import Retention
from fedssl_client.recommender import DeviceRecommender, Recommendation
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.device_model import write_device_model, write_encoder
from fedssl.parts import initial_weights
from fedssl.weights import to_numpy

RECIPE = recipe_of(head={"name": "user-vector", "adapt": 0.5})


@pytest.fixture(autouse=True, scope="module")
def _patience() -> Iterator[None]:
    """Every step of the head is waited for, however busy the machine that runs the tests is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_file, "LONGEST_STEP", 60.0)
        yield


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(make_device(tmp_path / "d", RECIPE))
    yield agent
    agent.close()


def other_weights(number: int) -> dict[str, Any]:
    return {name: array + np.float32(0.1) * number for name, array in to_numpy(initial_weights(RECIPE)).items()}


def another_model(agent: Agent, number: int) -> None:
    made = agent.folder.parent / f"model-{number}"
    write_device_model(made, RECIPE, other_weights(number), CATALOGUE, None, run=f"run {number}", round=0)
    import_model(agent.folder, made)


def newer_weights(agent: Agent, number: int) -> None:
    write_encoder(agent.folder / "model", RECIPE, other_weights(number), run=agent.status()["model_run"], round=number)


def beside_the_agent(agent: Agent, number: int) -> None:
    """Another process adds to the history, as `fedssl device import --history` does."""
    other = HistoryStore(agent.folder / "history.sqlite")
    other.add([Event(f"i{number}", 1e9, 1.0)], Retention())
    other.close()


CHANGES: dict[str, Callable[[Agent, int], object]] = {
    "record": lambda agent, number: agent.record(f"i{number}", None, None),
    "an older event": lambda agent, number: agent.record(f"i{number}", 0.5, None),
    "forget one": lambda agent, number: agent.forget(f"i{number}"),
    "forget all": lambda agent, number: agent.forget(None),
    "another model": another_model,
    "newer weights": newer_weights,
    "beside the agent": beside_the_agent,
    "nothing": lambda agent, number: None,
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(1, 30), st.sampled_from([1, 5, 40]), st.booleans()), min_size=1, max_size=8))
def test_what_is_at_hand_is_what_would_be_made_anew_whatever_happened_since(happened: list[tuple[str, int, int, bool]]):
    with tempfile.TemporaryDirectory() as folder:
        agent = Agent(make_device(Path(folder) / "d", RECIPE))
        for name, number, k, include_seen in happened:
            CHANGES[name](agent, number)
            for _ in range(2):
                found = agent.recommend(k=k, include_seen=include_seen)
                anew = DeviceRecommender(agent.folder / "model")
                items = [event.item for event in agent._history.events()]
                assert found == anew.recommend(items, k=k, exclude_seen=not include_seen, head_D=agent._head)
        agent.close()


class Counted:
    """Counts how often recommendations are made, each of which begins when it may."""

    def __init__(self, agent: Agent):
        assert agent._recommender is not None
        self.times, self.may_begin, self._make = 0, threading.Event(), agent._recommender.recommend
        self.may_begin.set()
        agent._recommender.recommend = self  # type: ignore[method-assign, assignment]

    def __call__(self, *asked: Any, **how: Any) -> list[Recommendation]:
        self.times += 1
        assert self.may_begin.wait(60)
        return self._make(*asked, **how)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_was_asked_for_is_made_ahead_once_an_event_and_for_nobody_who_does_not_ask(agent: Agent):
    made = Counted(agent)
    agent.record("i20", None, None)
    agent.recommend(k=3, include_seen=True)
    agent.recommend(k=3, include_seen=True)
    assert made.times == 1
    agent.record("i21", None, None)
    until(lambda: agent._answer is not None and agent._answer.items[-1] == "i21")
    found = agent.recommend(k=3, include_seen=True)
    assert made.times == 2 and len(found) == 3
    for item in ("i22", "i23", "i24"):
        agent.record(item, None, None)
    agent._ahead.submit(lambda: None).result()
    assert made.times == 3


def test_a_long_list_is_neither_kept_nor_made_ahead(agent: Agent, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agent_file, "MOST_AT_HAND", 20)
    made = Counted(agent)
    for _ in range(2):
        assert len(agent.recommend(k=21, include_seen=True)) == 21 and agent._answer is None
    agent.record("i20", None, None)
    agent._ahead.submit(lambda: None).result()
    assert made.times == 2 and len(agent.recommend(k=20, include_seen=True)) == 20 and agent._answer is not None


def test_who_asks_while_they_are_made_waits_for_them(agent: Agent):
    agent.recommend(k=3, include_seen=False)
    made = Counted(agent)
    made.may_begin.clear()
    agent.record("i20", None, None)
    until(lambda: made.times == 1)
    found: list[list[Recommendation]] = []
    asking = threading.Thread(target=lambda: found.append(agent.recommend(k=3, include_seen=False)))
    asking.start()
    time.sleep(0.05)
    assert not found
    made.may_begin.set()
    asking.join(60)
    assert len(found) == 1 and made.times == 1


def test_what_fails_ahead_fails_no_record_and_shows_when_it_is_asked_for(agent: Agent):
    agent.recommend(k=3, include_seen=False)
    assert agent._recommender is not None
    agent._recommender.recommend = lambda *asked, **how: 1 / 0  # type: ignore[method-assign, assignment]
    agent.record("i20", None, None)
    agent._ahead.submit(lambda: None).result()
    with pytest.raises(ZeroDivisionError):
        agent.recommend(k=3, include_seen=False)


@pytest.mark.parametrize("what", [None, "i7"], ids=["all", "one item"])
def test_forgetting_leaves_nothing_at_hand_also_of_what_was_being_made(what: str | None, agent: Agent):
    agent.recommend(k=3, include_seen=False)
    made = Counted(agent)
    made.may_begin.clear()
    agent.record("i7", None, None)
    until(lambda: made.times == 1)
    forgetting = threading.Thread(target=agent.forget, args=(what,))
    forgetting.start()
    until(lambda: agent._history.items() == [item for item in EVENTS if what is not None and item != what])
    made.may_begin.set()
    forgetting.join(60)
    assert agent._answer is None
