"""The child of an agent: the simulation's bytes for the person's history, and nothing before policy and ledger."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device import CATALOGUE, EVENTS, RUN, SERVER, USER, download_of, make_device, recipe_of, write_policy
from fedssl_client.device_folder import heads_folder
from fedssl_client.device_trainer import histories_of, train
from fedssl_client.history import Event, HistoryStore
from fedssl_client.policy import OutsidePolicy
from fedssl_client.recommender import DeviceRecommender

from fedssl.catalogue import Catalogue
from fedssl.client_round import Shard, client_round
from fedssl.data.histories import Histories
from fedssl.errors import DataError, WireError
from fedssl.heads.store import HeadStore
from fedssl.privacy.uploads import open_device
from fedssl.wire import to_bytes, upload_from_bytes

EVERYTHING: dict[str, Any] = {
    "head": {"name": "user-vector"},
    "encoder": {"width": 8, "blocks": 1, "heads": 1, "hidden": 8, "window": 10, "dropout": 0.2},
    "privacy": {"clip_norm": 0.5},
    "local": {"steps": 2},
}


def simulated(recipe: Any, heads: Path | None = None) -> bytes:
    """What a simulated shard answers whose one user has the same history."""
    rows = np.array([CATALOGUE.rows[item] for item in EVENTS], dtype=np.int32)
    histories = Histories(rows, np.array([0, len(rows)]), None, ("me",))
    return to_bytes(client_round(download_of(recipe), Shard(histories, np.array([USER]), heads)))


def test_a_device_answers_with_the_bytes_of_the_simulation_with_everything_on(tmp_path: Path):
    recipe = recipe_of(**EVERYTHING)
    folder = make_device(tmp_path / "device", recipe)
    upload = train(to_bytes(download_of(recipe)), folder, SERVER)
    assert upload == simulated(recipe, tmp_path / "heads")
    assert upload_from_bytes(upload).sums["update"].any()
    here, there = heads_folder(folder, RUN), tmp_path / "heads"
    assert (here / "user-vector.f32").read_bytes() == (there / "user-vector.f32").read_bytes()


def test_asked_again_the_kept_bytes_leave_whatever_has_been_recorded_since(tmp_path: Path):
    recipe = recipe_of()
    folder = make_device(tmp_path / "device", recipe)
    first = train(to_bytes(download_of(recipe)), folder, SERVER)
    store = HistoryStore(folder / "history.sqlite")
    store.add([Event(f"i{row}", 100.0 + row, 1.0) for row in range(10, 20)], store_retention())
    assert train(to_bytes(download_of(recipe)), folder, SERVER) == first
    assert train(to_bytes(download_of(recipe, round=2)), folder, SERVER) != first
    assert open_device(folder).ledger.uploads() == {USER: 2}


def store_retention() -> Any:
    from fedssl_client.policy import Retention

    return Retention()


@pytest.mark.parametrize("server", ["stranger", "home"])
def test_outside_the_policy_nothing_is_charged_and_no_torch_is_loaded(server: str, tmp_path: Path):
    folder = make_device(tmp_path / "device", allow={"most_epsilon": 1.0})
    (tmp_path / "download").write_bytes(to_bytes(download_of(recipe_of())))
    words = ["trainer", "--folder", str(folder), "--server", server, "--agent", str(os.getpid())]
    code = f"import sys; sys.modules['torch'] = None; sys.argv = {words!r}; "
    code += "from fedssl_client.device_trainer import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], input=(tmp_path / "download").read_bytes(), capture_output=True, timeout=60, check=False)
    reason = {"stranger": "the person has not joined server 'stranger'", "home": "no privacy plan, and [allow] most_epsilon is 1"}[server]
    assert done.returncode == 3, done.stderr
    assert reason in done.stdout.decode()
    ledger = open_device(folder).ledger
    assert (ledger.joined(), ledger.uploads()) == ({}, {})


def test_a_run_is_charged_whole_when_its_first_download_comes_and_the_policy_counts_all_runs(tmp_path: Path):
    recipe = recipe_of(privacy={"clip_norm": 1.0, "epsilon": 2.0}, server={"sampling": "poisson"})
    folder = make_device(tmp_path / "device", recipe, allow={"most_epsilon": 5.0})
    for number in (1, 2):
        for round in (1, 2):
            train(to_bytes(download_of(recipe, run=f"run {number}", round=round)), folder, SERVER)
    assert open_device(folder).ledger.joined() == {"run 1": 2.0, "run 2": 2.0}
    with pytest.raises(OutsidePolicy, match=r"epsilon 2 beside 4 of runs before, and .* most_epsilon is 5"):
        train(to_bytes(download_of(recipe, run="run 3")), folder, SERVER)


def test_noise_of_the_devices_own_is_charged_by_the_round_and_kept(tmp_path: Path):
    recipe = recipe_of(privacy={"clip_norm": 1.0, "noise_multiplier": 30.0, "mode": "local"})
    folder = make_device(tmp_path / "device", recipe)
    first = train(to_bytes(download_of(recipe)), folder, SERVER)
    assert train(to_bytes(download_of(recipe)), folder, SERVER) == first
    ledger = open_device(folder).ledger
    assert ledger.uploads() == {USER: 1}
    assert ledger.spent(USER, 1e-6) > 0


def test_a_ledger_that_is_missing_or_was_put_back_stops_the_device(tmp_path: Path):
    recipe = recipe_of()
    folder = make_device(tmp_path / "device", recipe)
    train(to_bytes(download_of(recipe)), folder, SERVER)
    path = folder / "uploads.sqlite"
    older = path.read_bytes()
    train(to_bytes(download_of(recipe, round=2)), folder, SERVER)
    for rest in folder.glob("uploads.sqlite-*"):
        rest.unlink()
    path.write_bytes(older)
    with pytest.raises(DataError, match="put back to an older one"):
        train(to_bytes(download_of(recipe, round=3)), folder, SERVER)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        train(to_bytes(download_of(recipe, round=3)), folder, SERVER)


def test_a_rounds_weights_reach_the_model_on_the_device_where_the_recipe_is_the_models(tmp_path: Path):
    recipe = recipe_of()
    folder = make_device(tmp_path / "device", recipe)
    download = download_of(recipe, round=3)
    turned = replace(download, tensors={name: -leaf for name, leaf in download.tensors.items()})
    before = DeviceRecommender(folder / "model").scores(np.array([4]))
    train(to_bytes(turned), folder, SERVER)
    model = DeviceRecommender(folder / "model")
    assert (model.round, model.run) == (3, RUN)
    assert not np.allclose(model.scores(np.array([4])), before)
    other = recipe_of(local={"steps": 2})
    train(to_bytes(download_of(other, run="another")), folder, SERVER)
    assert (DeviceRecommender(folder / "model").run, DeviceRecommender(folder / "model").round) == (RUN, 3)


def test_a_recipe_for_another_catalogue_is_refused_before_anything_is_charged(tmp_path: Path):
    folder = make_device(tmp_path / "device")
    grown = Catalogue((*CATALOGUE.tokens, "new"))
    with pytest.raises(WireError, match=r"another catalogue \(31 items\) than this device has \(30\)"):
        train(to_bytes(download_of(recipe_of(grown))), folder, SERVER)
    assert open_device(folder).ledger.joined() == {}


def test_a_catalogue_that_grew_finds_the_events_that_were_recorded_before_it_knew_them():
    events = [Event("i3", 1.0, 1.0), Event("new", 2.0, 1.0), Event("i1", 3.0, 1.0)]
    assert histories_of(events, CATALOGUE).items.tolist() == [3, 1]
    assert histories_of(events, Catalogue((*CATALOGUE.tokens, "new"))).items.tolist() == [3, 31, 1]


def test_a_download_beyond_the_allowed_bytes_is_not_even_read(tmp_path: Path):
    folder = make_device(tmp_path / "device", allow={"most_bytes": 1000})
    with pytest.raises(OutsidePolicy, match="a download of 2000 bytes"):
        train(b"x" * 2000, folder, SERVER)


def test_consent_that_was_taken_back_holds_at_once(tmp_path: Path):
    folder = make_device(tmp_path / "device")
    write_policy(folder, consent={"train": False})
    with pytest.raises(OutsidePolicy, match="not agreed to training"):
        train(to_bytes(download_of(recipe_of())), folder, SERVER)


def test_a_head_of_a_run_is_that_runs_alone(tmp_path: Path):
    recipe = recipe_of(head={"name": "user-vector"})
    folder = make_device(tmp_path / "device", recipe)
    train(to_bytes(download_of(recipe)), folder, SERVER)
    train(to_bytes(download_of(recipe, run="another")), folder, SERVER)
    read = [HeadStore(heads_folder(folder, run), np.array([USER]), 8).read(np.array([USER])) for run in (RUN, "another")]
    assert read[0].any() and read[1].any()
    assert heads_folder(folder, RUN) != heads_folder(folder, "../" + RUN)
