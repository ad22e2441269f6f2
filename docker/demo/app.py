"""The app on a device, as a person's own program would be: it joins, records what was met, and shows recommendations before and after training."""

from __future__ import annotations

import json
import sys
import time

from fedssl_client.connection import AgentError, Connection, connect

from fedssl.data.synthetic import synthesize

SOCKET = "unix:/var/lib/fedssl/device/app/agent.sock"
SECONDS = 5.0


def say(what: str, **facts: object) -> None:
    """A line of JSON."""
    print(json.dumps({"app": what, **facts}), flush=True)


def history_of(number: int) -> list[str]:
    """What person ``number`` met: someone of the world that the first model knows, who was not there when it was made."""
    people = synthesize(users=300, items=200, seed=1, mean_events=30.0)
    return [people.item_tokens[item] for item in people.items[people.users == 200 + number]]


def follow(agent: Connection, number: int) -> None:
    """Join and record once, then one line whenever the model is another."""
    agent.ask("Join", {"server": "demo"})
    if not agent.ask("Status").events:
        events = history_of(number)
        for item in events:
            agent.ask("Record", {"item": item})
        say("recorded", events=len(events))
    shown = None
    while True:
        status = agent.ask("Status")
        model = (status.model_run, status.model_round)
        if model != shown:
            items = [one.item for one in agent.ask("Recommend", {"k": 3}).items]
            say("recommended", items=items, model_run=status.model_run, round=status.model_round, trainings=status.trainings_today)
            shown = model
        time.sleep(SECONDS)


if __name__ == "__main__":
    with connect(sys.argv[2] if len(sys.argv) > 2 else SOCKET) as agent:
        while True:
            try:
                follow(agent, int(sys.argv[1]))
            except AgentError as error:  # The agent starts again: so do we.
                say("waits", reason=str(error))
                time.sleep(SECONDS)
