"""Devices of one person each, with agents: the checkpoint and the heads of a simulation, byte for byte, with everything on."""

from __future__ import annotations

import tomllib
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from device import SERVER, write_policy
from everything_on import SETTINGS, TEST_KEYS, give_keys, learned
from fedssl_client.app import app
from fedssl_client.device_folder import HISTORY, MODEL, heads_folder, make_device_folder, training_socket
from fedssl_client.history import Event, HistoryStore
from fedssl_client.policy import Retention, read_policy
from fedssl_client.recommender import DeviceRecommender
from fedssl_client.service import serving
from fedssl_server.serve import serve
from fedssl_simulations.grids import InProcessGrid
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run, write_run

from fedssl.catalogue import write_catalogue
from fedssl.checkpoints import list_checkpoints, read_checkpoint
from fedssl.config import DataConfig
from fedssl.data.dataset import make_dataset
from fedssl.data.synthetic import synthesize
from fedssl.device_model import write_device_model
from fedssl.parts import initial_weights
from fedssl.privacy.uploads import open_device
from fedssl.weights import to_numpy


@pytest.mark.timeout(420)
def test_three_devices_with_agents_reach_the_bytes_of_the_simulation_with_everything_on(tmp_path: Path):
    config = read_run(tomllib.loads(SETTINGS), ["server.rounds=2", "server.cohort=2.0", "system.shards=3"])
    dataset = make_dataset(synthesize(users=3, items=100, seed=3, mean_events=12.0), DataConfig(min_events=1))
    catalogue = dataset.catalogue
    simulate(config, out=tmp_path / "simulated", dataset=dataset, keys=TEST_KEYS)
    simulated = learned(tmp_path / "simulated", sorted((tmp_path / "simulated" / "heads").glob("node-*")))
    run = tmp_path / "run"
    run.mkdir()
    write_run(config, run / "run.toml")
    write_catalogue(catalogue, run / "catalogue.jsonl")
    give_keys(run, TEST_KEYS)
    recipe = read_checkpoint(list_checkpoints(tmp_path / "simulated" / "checkpoints")[-1]).recipe

    folders = [tmp_path / f"d{number}" for number in range(3)]
    with ExitStack() as agents:
        nodes = []
        for number, folder in enumerate(folders):
            make_device_folder(folder, user=number)
            write_policy(folder, allow={"most_delta": 0.01})
            (folder / "device.toml").write_text((folder / "device.toml").read_text().replace("user = 5", f"user = {number}"))
            write_device_model(folder / MODEL, recipe, to_numpy(initial_weights(recipe)), catalogue, None, run="before", round=0)
            history = HistoryStore(folder / HISTORY)
            history.join(SERVER)
            rows = dataset.histories.of(number).tolist()
            history.add([Event(catalogue.tokens[row - 1], float(when), 1.0) for when, row in enumerate(rows)], Retention())
            history.close()
            agents.enter_context(serving(folder))
            nodes.append({"agent-socket": str(training_socket(folder, read_policy(folder))), "server": SERVER})
        # The ClientApp, agents and children are the real ones; only Flower's processes are not there.
        with InProcessGrid(app, dict(enumerate(nodes, start=1))) as grid:
            serve(grid, {node: np.array([node - 1]) for node in (1, 2, 3)}, run)

    last = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    asked = [open_device(folder).ledger for folder in folders]
    # Who was never asked in training has no head on the device, and one of zeros in the simulation.
    heads = []
    for folder in folders:
        place = heads_folder(folder, last.run)
        if not place.exists():
            place.mkdir(parents=True)
            np.zeros(config.encoder.width, "<f4").tofile(place / "user-vector.f32")
        heads.append(place)
    assert learned(run, heads) == simulated
    assert any(np.fromfile(place / "user-vector.f32", "<f4").any() for place in heads)
    # A run's whole promise is charged to whoever was asked at all, and the model of a round is the device's next one.
    assert [list(ledger.joined()) for ledger in asked] == [[last.run]] * 3
    assert {DeviceRecommender(folder / MODEL).run for folder in folders} <= {last.run, "before"}
    assert last.run in {DeviceRecommender(folder / MODEL).run for folder in folders}
