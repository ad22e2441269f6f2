"""The catalogue grows and the encoder changes while three devices are in use: what becomes of what they hold of the old version."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from device import SERVER, write_policy
from fedssl_client.agent import Agent
from fedssl_client.device_folder import HISTORY, heads_folder, make_device_folder
from fedssl_client.device_trainer import train
from fedssl_client.history import Event, HistoryStore
from fedssl_client.importing import import_model
from fedssl_client.policy import Retention
from fedssl_server.run_settings import read_settings
from fedssl_server.serve import serve
from fedssl_simulations.grids import InProcessGrid
from flwr.app import Context, Error, Message

from fedssl import wire
from fedssl.catalogue import Catalogue, read_catalogue, write_catalogue
from fedssl.checkpoints import list_checkpoints, read_checkpoint
from fedssl.device_model import write_device_model
from fedssl.errors import AllUploadsRefused, FedSSLError
from fedssl.parts import initial_weights
from fedssl.privacy.uploads import open_device
from fedssl.recipe import Recipe, make_recipe
from fedssl.weights import to_numpy

OLD = Catalogue(tuple(f"i{row}" for row in range(1, 31)))
GROWN = Catalogue((*OLD.tokens, "new"))
SETTINGS = """
[encoder]
{encoder}
blocks = 1
heads = 1
hidden = 8
window = 8
[[task]]
name = "next-item"
[head]
name = "user-vector"
[server]
rounds = {rounds}
cohort = 3
"""
OLD_ENCODER, NEW_ENCODER = "width = 8", 'name = "gru4rec"\nwidth = 16'
EVENTS = [f"i{item}" for item in (3, 7, 1, 30, 7, 2, 9, 4)]


def devices_of(place: Path) -> list[Path]:
    folders = [place / f"d{user}" for user in range(3)]
    for user, folder in enumerate(folders):
        make_device_folder(folder, user=user)
        write_policy(folder, user=user)
        history = HistoryStore(folder / HISTORY)
        history.join(SERVER)
        history.add([Event(item, float(number), 1.0) for number, item in enumerate(EVENTS)], Retention())
        history.close()
    return folders


def run_folder(run: Path, catalogue: Catalogue, encoder: str, *, rounds: int = 1) -> Path:
    run.mkdir(exist_ok=True)
    (run / "run.toml").write_text(SETTINGS.format(encoder=encoder, rounds=rounds))
    write_catalogue(catalogue, run / "catalogue.jsonl")
    return run


def play(run: Path, folders: list[Path], *, rounds: int | None = None) -> None:
    """Serve what is left of a run, or ``rounds`` of it, to these devices. Between Flower's messages and a device's trainer there is no process here."""

    def answer(message: Message, context: Context) -> Message:
        try:
            upload = train(wire.to_bytes(wire.download_from_record_dict(message.content)), folders[context.node_id - 1], SERVER)
        except FedSSLError as error:
            return Message(Error(1, str(error)), reply_to=message)
        return Message(wire.to_record_dict(wire.upload_from_bytes(upload)), reply_to=message)

    left = iter(range(rounds)) if rounds is not None else None
    with InProcessGrid(answer, {1: {}, 2: {}, 3: {}}) as grid:
        serve(grid, {node: np.array([node - 1]) for node in (1, 2, 3)}, run, should_stop=lambda: left is not None and next(left, None) is None)


def exported(place: Path, recipe: Recipe, catalogue: Catalogue, run: str) -> Path:
    """What the operator hands out: a model folder of a run."""
    write_device_model(place, recipe, to_numpy(initial_weights(recipe)), catalogue, None, run=run, round=0)
    return place


def hand_out(folders: list[Path], run: Path, *, name: str = "before") -> None:
    """Import a model of a run's recipe on these devices. ``name``: of the run that it says it is from."""
    catalogue = read_catalogue(run / "catalogue.jsonl")
    recipe = make_recipe(read_settings(run / "run.toml"), num_items=catalogue.num_items, catalogue=catalogue.hash)
    for folder in folders:
        import_model(folder, exported(run / "model", recipe, catalogue, name))


def facts(folder: Path) -> tuple[str, set[str], set[str]]:
    """By whose model a device recommends, which items, and of which runs it holds uploads for a retry."""
    agent = Agent(folder)
    try:
        items = {one.item for one in agent.recommend(k=40, include_seen=True)}
        model = agent.status()["model_run"]
    finally:
        agent.close()
    ledger = open_device(folder).ledger
    kept = {run for (run,) in ledger._file.execute("SELECT DISTINCT run FROM answers")}
    ledger.close()
    return model, items, kept


def head_of(folder: Path, run: str) -> bytes | None:
    path = heads_folder(folder, run) / "user-vector.f32"
    return path.read_bytes() if path.exists() else None


def newest(run: Path) -> tuple[str, Recipe]:
    checkpoint = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    return checkpoint.run, checkpoint.recipe


def test_a_new_encoder_leaves_the_old_model_and_head_in_use_until_its_model_is_imported(tmp_path: Path):
    folders, run = devices_of(tmp_path), run_folder(tmp_path / "old", OLD, OLD_ENCODER, rounds=2)
    hand_out(folders, run)
    play(run, folders)
    old, _ = newest(run)
    old_head = head_of(folders[0], old)
    assert old_head is not None and facts(folders[0]) == (old, set(OLD.tokens), {old})

    run = run_folder(tmp_path / "new", OLD, NEW_ENCODER, rounds=2)
    play(run, folders, rounds=1)
    new, recipe = newest(run)
    # It trains for the new run beside the old model: recommendations, and the head in them, are those of the old one.
    assert facts(folders[0]) == (old, set(OLD.tokens), {old, new})
    assert head_of(folders[0], old) == old_head
    new_head = head_of(folders[0], new)
    assert new_head is not None and len(new_head) == 4 * 16

    import_model(folders[0], exported(tmp_path / "model", recipe, OLD, new))
    # ONNX, head and kept uploads of the old version are gone; what the device learned for the new run before the import stays.
    assert facts(folders[0]) == (new, set(OLD.tokens), {new})
    assert (head_of(folders[0], old), head_of(folders[0], new)) == (None, new_head)
    play(run, folders)
    assert newest(run)[0] == new and head_of(folders[0], new) != new_head
    ledger = open_device(folders[0]).ledger
    assert list(ledger.joined()) == [old, new]
    ledger.close()


def test_a_catalogue_that_grew_waits_for_each_device_and_does_not_wait_for_all(tmp_path: Path):
    folders, run = devices_of(tmp_path), run_folder(tmp_path / "old", OLD, OLD_ENCODER, rounds=2)
    hand_out(folders, run)
    play(run, folders, rounds=1)
    old, _ = newest(run)
    for folder in folders:
        history = HistoryStore(folder / HISTORY)
        history.add([Event("new", 100.0, 1.0), Event("i5", 101.0, 1.0), Event("i6", 102.0, 1.0)], Retention())
        history.close()

    grown = run_folder(tmp_path / "grown", GROWN, OLD_ENCODER, rounds=2)
    with pytest.raises(AllUploadsRefused, match=r"another catalogue \(31 items\) than this device has \(30\); it needs a newer model"):
        play(grown, folders)
    # Nothing was charged for it, and nothing changed.
    ledger = open_device(folders[2]).ledger
    assert list(ledger.joined()) == [old]
    ledger.close()
    assert facts(folders[2]) == (old, set(OLD.tokens), {old})

    name = (grown / "name").read_text()
    hand_out(folders[:2], grown, name=name)
    play(grown, folders, rounds=1)
    line = json.loads((grown / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["refused_for"] == {"failed": 1} and "it needs a newer model" in line["refused"]["3"]
    # Who took the model trains on events that were recorded before its catalogue listed them, and has left the old run; who did not goes on as before.
    assert facts(folders[0]) == (name, set(GROWN.tokens), {name}) and head_of(folders[0], old) is None
    assert facts(folders[2]) == (old, set(OLD.tokens), {old}) and head_of(folders[2], old) is not None
    play(run, folders)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(line["refused"]) == {"1", "2"} and "another catalogue (30 items) than this device has (31)" in line["refused"]["1"]

    hand_out(folders[2:], grown, name=name)
    play(grown, folders)
    assert json.loads((grown / "metrics.jsonl").read_text().splitlines()[-1])["refused"] == {}
    assert facts(folders[2]) == (name, set(GROWN.tokens), {name})
