"""Three devices with agents on a server as an operator runs it, with everything on: the bytes and the charges of a simulation, halted and killed or not."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import fedssl_client
import numpy as np
import psutil
import pytest
from device import SERVER, write_policy
from everything_on import SETTINGS, TEST_KEYS, give_keys, learned
from fedssl_client.device_folder import HISTORY, MODEL, app_socket, heads_folder, make_device_folder, training_socket
from fedssl_client.history import Event, HistoryStore
from fedssl_client.policy import Retention, promised_epsilon, read_policy
from fedssl_client.recommender import DeviceRecommender
from fedssl_client.service import serving
from fedssl_server.processes import program
from fedssl_simulations.federation import Federation, federation
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run, write_run
from other_user import UID, NoOtherUser, other_user

from fedssl.catalogue import write_catalogue
from fedssl.checkpoints import list_checkpoints, read_checkpoint
from fedssl.config import DataConfig, PrivacyConfig, RunConfig
from fedssl.data.dataset import make_dataset
from fedssl.data.synthetic import synthesize
from fedssl.device_model import write_device_model
from fedssl.parts import initial_weights
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.manifest import check_manifest
from fedssl.privacy.uploads import open_device
from fedssl.recipe import Recipe, make_recipe
from fedssl.records import Address, Download
from fedssl.server_round import first_state, phases_of
from fedssl.weights import to_numpy
from fedssl.wire import to_bytes, upload_from_bytes

HOSTILE = Path(__file__).parent / "hostile_app"
DEVICES = 3
pytestmark = pytest.mark.skipif("FEDSSL_FEDERATION" not in os.environ, reason="they take minutes on both cores; `make federation` runs them")

SECONDS = 900.0
"""The longest that a run may take on a machine that is busy."""


@dataclass
class Fleet:
    """Devices in ``folders`` whose nodes are there, and the server that ``deployed`` runs; what a simulation of the same ``config`` learned."""

    deployed: Federation
    place: Path
    folders: list[Path]
    config: RunConfig
    simulated: dict[str, bytes]
    no_other_user: str
    """Why the last device's node runs as the person here; empty where it runs as another user."""

    def begin(self, name: str) -> Operated:
        """A new run, by `fedssl server run`."""
        run = self.place / name
        run.mkdir()
        give_keys(run, TEST_KEYS)
        return self.operate("run", str(self.place / "run.toml"), "--catalogue", str(self.place / "catalogue.jsonl"), "--out", str(run), run=run)

    def resume(self, run: Path) -> Operated:
        """Go on with it."""
        return self.operate("run", "--resume", str(run), run=run)

    def operate(self, *words: str, run: Path) -> Operated:
        """A command of the server's operator."""
        command = [program("fedssl"), "server", words[0], str(self.deployed.link.folder), *words[1:]]
        pipe = subprocess.PIPE
        return Operated(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=self.deployed.processes.environment, text=True), run)

    def learned(self, run: Path) -> dict[str, bytes]:
        """The newest checkpoint of a run, and the heads on the devices. Who was never asked in training has none, and one of zeros in the simulation."""
        last = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
        heads = [heads_folder(folder, last.run) for folder in self.folders]
        for place in heads:
            if not place.exists():
                place.mkdir(parents=True)
                np.zeros(self.config.encoder.width, "<f4").tofile(place / "user-vector.f32")
        assert any(np.fromfile(place / "user-vector.f32", "<f4").any() for place in heads)
        return learned(run, heads)


@dataclass
class Operated:
    """A command that runs, and the run's folder."""

    process: subprocess.Popen[str]
    run: Path

    def until(self, is_true: Callable[[], object]) -> None:
        """Wait."""
        deadline = time.monotonic() + SECONDS
        while not is_true():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"{self.process.args} ended, or did not come so far:\n{self.process.communicate()}")
            time.sleep(0.1)

    def finished(self) -> int:
        """How many rounds are over, of whatever phase."""
        path = self.run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def asks(self, phase: str, round: int) -> bool:
        """Whether a round was charged, so that its nodes are being asked."""
        path = self.run / "ledger.jsonl"
        return path.exists() and f'"kind":"charge","phase":"{phase}","round":{round},' in path.read_text()

    def kill(self, name: str, above: int) -> None:
        """`kill -9` the process of this name that one started."""
        (found,) = [one for one in psutil.Process(above).children(recursive=True) if any(name in word for word in one.cmdline()[:3])]
        os.kill(found.pid, signal.SIGKILL)

    def end(self) -> tuple[str, str]:
        """Wait for its end: what it wrote, and said."""
        written, said = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0, said
        return written, said


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with ExitStack() as stack:
        # Not pytest's own folder, which other users could not enter whatever the rights of a device's folder are.
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedssl-devices-", ignore_cleanup_errors=True)))
        place.chmod(0o755)
        config = read_run(tomllib.loads(SETTINGS), ["server.rounds=2", "server.cohort=2.0", f"system.shards={DEVICES}"])
        dataset = make_dataset(synthesize(users=DEVICES, items=100, seed=3, mean_events=12.0), DataConfig(min_events=1))
        catalogue = dataset.catalogue
        simulate(config, out=place / "simulated", dataset=dataset, keys=TEST_KEYS)
        simulated = learned(place / "simulated", sorted((place / "simulated" / "heads").glob("node-*")))
        write_run(config, place / "run.toml")
        write_catalogue(catalogue, place / "catalogue.jsonl")
        recipe = read_checkpoint(list_checkpoints(place / "simulated" / "checkpoints")[-1]).recipe

        folders, nodes = [place / f"d{number}" for number in range(DEVICES)], []
        for number, folder in enumerate(folders):
            make_device_folder(folder, user=number)
            # The last one's node, with all that a server ships to it, is another user where that can be: its socket is where both may enter.
            shared = place / f"shared-{number}"
            shared.mkdir()
            shared.chmod(0o711)
            write_policy(folder, user=number, allow={"most_delta": 0.01}, agent={"training_socket": str(shared / "train.sock")})
            write_device_model(folder / MODEL, recipe, to_numpy(initial_weights(recipe)), catalogue, None, run="before", round=0)
            history = HistoryStore(folder / HISTORY)
            history.join(SERVER)
            rows = dataset.histories.of(number).tolist()
            history.add([Event(catalogue.tokens[row - 1], float(when), 1.0) for when, row in enumerate(rows)], Retention())
            history.close()
            stack.enter_context(serving(folder))
            nodes.append({"agent-socket": str(training_socket(folder, read_policy(folder))), "server": SERVER})
        as_user, no_other_user = {}, ""
        try:
            as_user[DEVICES - 1] = other_user(place / "python")
        except NoOtherUser as error:
            no_other_user = str(error)
        deployed = stack.enter_context(federation(nodes, None, environment={"OMP_NUM_THREADS": "1"}, as_user=as_user, start_seconds=300.0))
        yield Fleet(deployed, place, folders, config, simulated, no_other_user)


@pytest.mark.timeout(1800)
def test_killed_halted_and_killed_again_a_run_on_devices_ends_with_the_bytes_and_charges_of_the_simulation(fleet: Fleet, capsys: pytest.CaptureFixture[str]):
    began = time.monotonic()
    operated = fleet.begin("run")
    operated.until(lambda: operated.asks("counts", 1))
    operated.kill("flwr-serverapp", above=operated.process.pid)
    operated.until(lambda: operated.finished() >= 2)
    assert fleet.operate("halt", run=operated.run).end()[0] == f"{operated.run}: stops after this round\n"
    written, said = operated.end()
    assert "halted" in written
    assert said.count(" Flower run ") == 2 and "lost: the ServerApp of run" in said
    finished = operated.finished()
    assert finished in (2, 3)

    resumed = fleet.resume(operated.run)
    resumed.until(lambda: resumed.asks("training", finished - 1))
    found = json.loads(fleet.operate("status", "--json", run=operated.run).end()[0])
    assert (found["superlink"], found["run"], len(found["nodes"])) == ("up", str(operated.run), DEVICES)
    resumed.kill("flower-superlink", above=fleet.deployed.processes.running["start"].pid)
    written, said = resumed.end()
    assert "done" in written
    assert said.count(" Flower run ") == 2 and "the run ended as lost; going on from round-" in said
    with capsys.disabled():
        print(f" a run with two kills and a halt: {time.monotonic() - began:.0f} s ", end="")

    assert fleet.learned(operated.run) == fleet.simulated
    # Under a plan a lost round that was never sealed is played again under the same charge, on the server and on every device.
    assert Ledger(operated.run / "ledger.jsonl").charged() == {"popularity": 1, "counts": 1, "training": fleet.config.server.rounds}
    name = (operated.run / "name").read_text()
    for folder in fleet.folders:
        with closing(open_device(folder).ledger) as ledger:
            assert list(ledger.joined()) == [name]
            asked = ledger._file.execute("SELECT kind, phase, round FROM uploads").fetchall()
            assert len(set(asked)) == len(asked) and {("charge", "popularity", 1), ("charge", "counts", 1)} <= set(asked)
    # The model of a round is the device's next one.
    assert {DeviceRecommender(folder / MODEL).run for folder in fleet.folders} <= {name, "before"}
    assert name in {DeviceRecommender(folder / MODEL).run for folder in fleet.folders}


@pytest.mark.timeout(900)
def test_a_hostile_app_that_a_server_ships_gets_what_the_policy_permits_and_no_more(fleet: Fleet, tmp_path: Path):
    if fleet.no_other_user:
        pytest.skip(fleet.no_other_user)
    recipe = read_checkpoint(list_checkpoints(fleet.place / "simulated" / "checkpoints")[-1]).recipe
    careless, other, target = fleet.folders[0], fleet.folders[1], fleet.folders[-1]
    with closing(open_device(target).ledger) as ledger:
        spent, promised = sum(ledger.joined().values()), promised_epsilon(recipe)
    most = spent + 1.5 * promised
    (target / "device.toml").write_text((target / "device.toml").read_text().replace("most_epsilon = inf", f"most_epsilon = {most}"))
    no_plan = make_recipe(fleet.config.model_copy(update={"privacy": PrivacyConfig()}), num_items=recipe.num_items, catalogue=recipe.catalogue)
    # Of the run it was let into, with a plan that promises the same and clips nothing.
    unclipped = recipe.model_copy(update={"privacy": recipe.privacy.model_copy(update={"clip_norm": 1e6})})
    permitted = {"server": SERVER, "download": encoded(question(recipe, "taken"))}
    trainings = {
        "without a plan": {"server": SERVER, "download": encoded(question(no_plan, "no plan"))},
        "for a stranger": {"server": "stranger", "download": encoded(question(recipe, "stranger's"))},
        "what is permitted": permitted,
        "it again": permitted,
        "under another plan": {"server": SERVER, "download": encoded(question(unclipped, "taken"))},
        "in one run more": {"server": SERVER, "download": encoded(question(recipe, "one more"))},
    }
    files = ["history.sqlite", "uploads.sqlite", "device.key", "device.toml", "token", "heads", "model/encoder.onnx"]
    devices = [
        {
            "folder": str(folder),
            "agent": os.getpid(),
            "app_socket": str(app_socket(folder)),
            "training_socket": str(training_socket(folder, read_policy(folder))),
            "files": files,
            "trainings": trainings if folder == target else {},
        }
        for folder in (careless, other, target)
    ]
    (tmp_path / "targets.json").write_text(json.dumps({"nodes": DEVICES, "devices": devices}))
    link, processes = fleet.deployed.link, fleet.deployed.processes
    link.start_superexec(processes, tmp_path)
    outcome = fleet.deployed.run(seconds=SECONDS, app=HOSTILE)
    assert outcome.is_completed, outcome.log
    found = json.loads((tmp_path / "found.json").read_text())
    got = found[devices[-1]["training_socket"]]

    # It was the server's own code that ran, before the package of that name on the device, as the user of the node.
    assert got["user"] == UID and Path(got["shadows"]).parents[1] != Path(fedssl_client.__file__).parents[1]
    for name in ("list the folder", "reach the app's socket", "write the policy", "take the training socket's place", "signal the agent"):
        assert got[name][0] == "PermissionError", (name, got[name])
    for name in ("read the agent's memory", "read the agent's environment", *(f"read {name}" for name in files)):
        assert got[name][0] == "PermissionError", (name, got[name])
    assert got["hello"] == ["got", [DEVICES - 1]]
    for method in ("Export", "Recommend", "Status", "Forget", "Record", "Join", "Leave"):
        assert got[f"call {method}"] == ["AgentError", "Method not found!"]
    # Of training it gets what any server that the person joined gets: by the policy, declared and clipped, charged, and once.
    assert got["train without a plan"] == ["AgentError", f"this device's policy refuses the recipe: no privacy plan, and [allow] most_epsilon is {most:g}"]
    assert got["train for a stranger"] == ["AgentError", "this device's person has not agreed to train for this server"]
    assert "joined under another recipe" in got["train under another plan"][1]
    assert "of runs before, and [allow] most_epsilon is" in got["train in one run more"][1]
    assert got["train it again"] == got["train what is permitted"]
    how, upload = got["train what is permitted"]
    assert how == "got"
    sums = upload_from_bytes(base64.b64decode(upload)).sums
    declared = next(phase for phase in phases_of(recipe) if phase.name == "training").declared(first_state(recipe), 0)
    check_manifest(sums, declared, most_users=1)
    with closing(open_device(target).ledger) as ledger:
        assert sum(ledger.joined().values()) == pytest.approx(spent + promised)

    # Where a node runs as the person, the same app has the history: what holds it back is the other user.
    with_all = found[devices[0]["training_socket"]]
    assert with_all["user"] == os.geteuid() and with_all["read history.sqlite"] == ["got", "SQLite format 3\x00"]
    assert with_all["reach the app's socket"] == ["got", None]


def question(recipe: Recipe, run: str) -> bytes:
    """A first round's Download of a run."""
    training = next(phase for phase in phases_of(recipe) if phase.name == "training")
    return to_bytes(Download(Address(run, "training", 1), recipe, training.tensors(first_state(recipe))))


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
