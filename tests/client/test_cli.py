"""`fedssl device`: from an empty folder to recommendations, with an agent of its own process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import fedssl
from device import CATALOGUE, RUN, SERVER, USER, download_of, make_device, recipe_of, write_policy
from fedssl_client.agent import Agent
from fedssl_client.connection import connect
from fedssl_client.device_folder import app_socket, heads_folder
from fedssl_client.device_trainer import train
from fedssl_client.history import HistoryStore
from fedssl_client.importing import import_model
from fedssl_client.policy import read_policy

from fedssl.catalogue import Catalogue
from fedssl.device_model import write_device_model
from fedssl.errors import CheckpointError, WireError
from fedssl.parts import initial_weights
from fedssl.recipe import Recipe
from fedssl.weights import to_numpy
from fedssl.wire import to_bytes


def write_model(folder: Path, recipe: Recipe, catalogue: Catalogue = CATALOGUE, *, run: str = RUN) -> Path:
    write_device_model(folder, recipe, to_numpy(initial_weights(recipe)), catalogue, None, run=run, round=0)
    return folder


def test_a_new_device_allows_nothing_and_is_not_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "d"
    assert fedssl("device", "init", folder, "--user", "17") == 0
    policy = read_policy(folder)
    assert (policy.user, policy.consent.train, policy.allow.servers) == (17, False, ())
    assert fedssl("device", "init", folder) == 1
    model = write_model(tmp_path / "model", recipe_of())
    capsys.readouterr()
    assert fedssl("device", "would-join", folder, model, "--server", "home") == 1
    assert capsys.readouterr().out.splitlines() == [
        "no: the person has not agreed to training ([consent] train)",
        "no: server 'home' is not one of [allow] servers",
        "no: no privacy plan, and [allow] most_epsilon is 8",
    ]


def test_a_device_that_allows_it_would_join(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_device(tmp_path / "d", recipe_of(privacy={"clip_norm": 1.0, "epsilon": 2.0}, server={"sampling": "poisson"}))
    assert fedssl("device", "would-join", folder, folder / "model" / "recipe.json", "--server", SERVER) == 0
    assert capsys.readouterr().out == "yes; epsilon of the whole run: 2\n"
    assert fedssl("device", "would-join", folder, tmp_path / "nothing", "--server", SERVER) == 1


def test_a_history_comes_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_device(tmp_path / "d", events=[])
    (tmp_path / "events.csv").write_text("who,what,when\nann,i3,20\nbob,i1,5\nann,i7,10\n")
    words = ("device", "import", folder, "--history", tmp_path / "events.csv", "--columns", "who,what,when")
    assert fedssl(*words) == 1
    assert "events of 2 users" in capsys.readouterr().err
    assert fedssl(*words, "--user", "ann") == 0
    assert HistoryStore(folder / "history.sqlite").items() == ["i7", "i3"]
    assert "2 events in the history now" in capsys.readouterr().out
    assert fedssl(*words, "--user", "zoe") == 1
    assert "there is no user 'zoe' in it; its 2 users are like 'ann', and --user names one" in capsys.readouterr().err
    write_policy(folder, retention={"most_events": 3})
    assert fedssl(*words, "--user", "ann") == 0
    assert "3 events in the history now" in capsys.readouterr().out


def test_the_commands_reach_an_agent_that_runs_and_say_so_where_none_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_device(tmp_path / "d", gates={"platform": ""})
    assert fedssl("device", "status", folder) == 1
    assert "no agent runs on it" in capsys.readouterr().err
    code = f"import sys; sys.argv = ['fedssl', 'device', 'run', {str(folder)!r}]; from fedssl_simulations.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        assert fedssl("device", "status", folder, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["events"], found["model_run"], found["servers"], found["trainings_today"]) == ("8", RUN, [SERVER], "0")
        assert fedssl("device", "status", folder) == 0
        assert f"servers: {SERVER}\n" in capsys.readouterr().out
        assert fedssl("device", "leave", folder, SERVER) == 0
        assert fedssl("device", "join", folder, SERVER) == 0
        assert fedssl("device", "join", folder, "stranger") == 1
        assert fedssl("device", "forget", folder) == 2
        assert fedssl("device", "forget", folder, "--item", "i7") == 0
        capsys.readouterr()
        assert fedssl("device", "export", folder) == 0
        exported = json.loads(capsys.readouterr().out)
        assert (len(exported["events"]), exported["trainings"], exported["kept_uploads"]) == (6, [], {"number": 0, "bytes": 0})
        # A model that is brought while the agent runs is the next answer's.
        grown = Catalogue((*CATALOGUE.tokens, "new"))
        assert fedssl("device", "import", folder, "--model", write_model(tmp_path / "model", recipe_of(grown), grown, run="another")) == 0
        with connect(f"unix:{app_socket(folder)}") as app:
            assert "new" in {one.item for one in app.ask("Recommend", {"k": 31}).items}
            assert app.ask("Status").model_run == "another"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()


def test_a_model_of_another_run_takes_heads_and_kept_uploads_of_the_old_one_and_leaves_events_and_charges(tmp_path: Path):
    recipe = recipe_of(head={"name": "user-vector"})
    folder = make_device(tmp_path / "d", recipe, events=["i3", "new", "i1", "new", "i2", "i9"])
    train(to_bytes(download_of(recipe)), folder, SERVER)
    # The same run's newer model: all stays.
    import_model(folder, write_model(tmp_path / "same", recipe))
    assert heads_folder(folder, RUN).exists()
    grown = Catalogue((*CATALOGUE.tokens, "new"))
    wider = recipe_of(grown, head={"name": "user-vector"}, encoder={"name": "gru4rec", "width": 16, "blocks": 1, "hidden": 8})
    import_model(folder, write_model(tmp_path / "other", wider, grown, run="another"))
    assert not heads_folder(folder, RUN).exists()
    agent = Agent(folder)
    assert agent._head is None
    assert agent.status()["uploads"] == 1
    assert "new" not in {one.item for one in agent.recommend(k=31, include_seen=False)}
    agent.close()
    # The old run is over for this device, the new one begins with a head of its own width.
    with pytest.raises(WireError, match="another catalogue"):
        train(to_bytes(download_of(recipe)), folder, SERVER)
    train(to_bytes(download_of(wider, run="another")), folder, SERVER)
    assert (heads_folder(folder, "another") / "user-vector.f32").stat().st_size == 4 * 16
    agent = Agent(folder)
    assert agent._head is not None and agent._head.shape == (16,)
    assert agent.users() == [USER]
    agent.close()


def test_a_model_that_is_not_whole_changes_nothing(tmp_path: Path):
    folder = make_device(tmp_path / "d")
    broken = write_model(tmp_path / "model", recipe_of(), run="another")
    (broken / "recipe.json").unlink()
    with pytest.raises(CheckpointError):
        import_model(folder, broken)
    agent = Agent(folder)
    assert agent.status()["model_run"] == RUN
    agent.close()
