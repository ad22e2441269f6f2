"""docker/compose.yaml, built and run for real: a server, a proxy and three devices that record, train and recommend; what is out of a device's reach."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DEVICES = ("anna", "ben", "cleo")
ROUNDS = 3
PROJECT = "fedssl-test"
IMAGES = ("fedssl-server", "fedssl-client", "fedssl-agent", "fedssl-proxy")

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("FEDSSL_ENGINE") != "docker",
        reason="builds images of 3 GB and runs 13 containers: `make containers`, where `docker` and `docker compose` (or docker-compose) reach an engine",
    ),
    pytest.mark.timeout(3600),
]


def said(*command: str, text: str | None = None, check: bool = True, seconds: float = 120) -> str:
    """What a command says on standard output. Fails with all it said where it ends with an error."""
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=seconds, check=False)
    assert not check or done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


@dataclass
class Composed:
    """The services of the compose file, up."""

    command: Sequence[str]

    def compose(self, *words: str, seconds: float = 120) -> str:
        """What a command of compose says."""
        return said(*self.command, "-p", PROJECT, "-f", "docker/compose.yaml", *words, seconds=seconds)

    def remove(self) -> None:
        """Everything of it but the images."""
        self.compose("rm", "-fs", "run")  # It lives in the superlink's network, and podman lets nothing go that another one lives in.
        self.compose("down", "-v", "--remove-orphans", seconds=300)

    @cached_property
    def names(self) -> list[str]:
        """All services."""
        return sorted(self.compose("config", "--services").split())

    def container(self, service: str) -> str:
        """The number of a service's container, running or not; empty before there is one."""
        labels = [f"label=com.docker.compose.project={PROJECT}", f"label=com.docker.compose.service={service}"]
        return said("docker", "ps", "-aq", *(word for label in labels for word in ("--filter", label))).split("\n")[0]

    def state(self, service: str) -> tuple[str, int]:
        """Whether a service's container is running or exited, and with which code."""
        found = json.loads(said("docker", "inspect", self.container(service)))[0]["State"]
        return found["Status"], found["ExitCode"]

    def inside(self, service: str, *command: str, text: str | None = None, check: bool = True) -> str:
        """What a command says in a service's container, as its user."""
        return said("docker", "exec", "-i", self.container(service), *command, text=text, check=check)

    def lines(self, service: str) -> list[dict[str, Any]]:
        """What an app of a device said."""
        logs = said("docker", "logs", self.container(service))
        return [json.loads(line) for line in logs.splitlines() if line.startswith("{")]

    def reach(self, service: str, **urls: str) -> dict[str, int | str]:
        """What answers at urls, asked from inside a service's container."""
        asked = [f"{name}={url}" for name, url in urls.items()]
        found: dict[str, int | str] = json.loads(self.inside(service, "python", "-", *asked, text=(ROOT / "tests/docker/reach.py").read_text()))
        return found


@contextmanager
def asked_how_they_are(composed: Composed) -> Iterator[None]:
    """Podman without systemd has no timer for health checks: with PODMAN (its command) in the environment they are run from here."""
    podman, end = shlex.split(os.environ.get("PODMAN", "")), threading.Event()

    def ask() -> None:
        while not end.wait(2.0):
            for service in composed.names:
                container = composed.container(service)
                if container:
                    subprocess.run([*podman, "healthcheck", "run", container], capture_output=True, check=False)

    thread = threading.Thread(target=ask)
    if podman:
        thread.start()
    yield
    end.set()
    if podman:
        thread.join()


@pytest.fixture(scope="module")
def composed() -> Iterator[Composed]:
    """All is built (FEDSSL_BUILD=no: the images at hand are taken), and up until the run has ended."""
    has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    assert has_plugin or shutil.which("docker-compose"), "neither `docker compose` nor docker-compose"
    found = Composed(["docker", "compose"] if has_plugin else ["docker-compose"])
    found.remove()  # What a test left here that was killed.
    start = time.monotonic()
    if os.environ.get("FEDSSL_BUILD") != "no":
        found.compose("build", seconds=3000)
    built = time.monotonic()
    try:
        with asked_how_they_are(found):
            found.compose("up", "-d", seconds=900)
            up = time.monotonic()
            while found.state("run")[0] != "exited":
                assert time.monotonic() - up < 900, found.compose("logs", "--tail=40")
                time.sleep(3)
            print(f"\nbuilt in {built - start:.0f} s, up in {up - built:.0f} s, the run ended after {time.monotonic() - up:.0f} s more")
            yield found
    except BaseException:
        print(found.compose("logs", "--tail=60"))
        raise
    finally:
        found.remove()


def test_three_devices_record_train_and_recommend(composed: Composed):
    assert composed.state("run") == ("exited", 0)
    assert "done" in said("docker", "logs", composed.container("run"))
    first = []
    for device in DEVICES:
        deadline = time.monotonic() + 60
        while not any(line.get("trainings", 0) >= ROUNDS for line in composed.lines(f"{device}-app")):
            assert time.monotonic() < deadline, composed.lines(f"{device}-app")
            time.sleep(3)
        lines = composed.lines(f"{device}-app")
        recorded = [line for line in lines if line["app"] == "recorded"]
        recommended = [line for line in lines if line["app"] == "recommended"]
        assert len(recorded) == 1 and recorded[0]["events"] >= 5
        assert all(len(line["items"]) == 3 for line in recommended)
        # From the model that came along to the one of the server's run.
        assert len({line["model_run"] for line in recommended}) == 2
        assert len({tuple(line["items"]) for line in recommended}) > 1
        print(f"{device}: {recorded[0]['events']} events; {json.dumps(recommended[0]['items'])} before, {json.dumps(recommended[-1]['items'])} after")
        first.append(tuple(recommended[-1]["items"]))
    assert len(set(first)) > 1
    lines = [json.loads(line) for line in composed.inside("superlink", "cat", "/var/lib/fedssl/runs/first/metrics.jsonl").splitlines()]
    assert [(line["phase"], line["round"]) for line in lines] == [("counts", 1), *(("training", number) for number in range(1, ROUNDS + 1))]
    assert [line["users"] for line in lines] == [3] * len(lines) and not any(line["refused"] for line in lines)
    nodes = json.loads(composed.inside("superlink", "fedssl", "server", "status", "/var/lib/fedssl/server", "--json"))["nodes"]
    assert nodes == dict.fromkeys(DEVICES, "online")


def test_a_device_reaches_the_fleet_api_and_no_other(composed: Composed):
    addresses = json.loads(said("docker", "inspect", composed.container("superlink")))[0]["NetworkSettings"]["Networks"]
    (address,) = (network["IPAddress"] for network in addresses.values())
    calls = {
        "health": "/health",
        "fleet": "/v1/fleet/pull-messages",
        "control": "/v1/control/list-runs",
        "start_run": "/v1/control/start-run",
        "runtime": "/v1/runtime/acquire-task",
    }
    for device in DEVICES:
        through = composed.reach(f"{device}-node", **{name: f"https://proxy:8443{path}" for name, path in calls.items()})
        assert through["health"] == 200
        # The SuperLink's own answer to who does not sign.
        assert through["fleet"] == 401
        assert {name: through[name] for name in ("control", "start_run", "runtime")} == {"control": 404, "start_run": 404, "runtime": 404}
        around = composed.reach(f"{device}-node", name="https://superlink:8000/health", address=f"https://{address}:8000/health")
        assert set(around.values()) <= {"gaierror", "TimeoutError", "timeout", "OSError", "ConnectionRefusedError"}, around
        # The agent has no network at all.
        alone = composed.reach(device, proxy="https://proxy:8443/health", address=f"https://{address}:8000/health")
        assert set(alone.values()) <= {"gaierror", "OSError"}, alone
    # The same calls where the run is: the Control API answers whoever asks, and only the proxy keeps it in.
    beside = composed.reach("superlink", **{name: f"https://127.0.0.1:8000{path}" for name, path in calls.items()})
    assert beside["control"] == 200 and beside["runtime"] == 401
    print(f"from a device: {through}, past the proxy: {around}; beside the SuperLink: {beside}")


def test_containers_run_as_nobody_and_write_their_volumes_alone(composed: Composed):
    up = [name for name in composed.names if composed.state(name)[0] == "running"]
    assert set(up) == {"superlink", "proxy", *(f"{device}{what}" for device in DEVICES for what in ("", "-node", "-app"))}
    for name in up:
        user = composed.inside(name, "id", "-u")
        assert user == ("10002" if name in DEVICES or name.endswith("-app") else "10001")
        for folder in ("/", "/opt/fedssl", "/usr/local/bin"):
            composed.inside(name, "sh", "-c", f"! touch {folder}/x 2>/dev/null")
        capabilities = composed.inside(name, "sh", "-c", "grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/1/status")
        assert [line.split()[1] for line in capabilities.splitlines()] == ["0" * 16, "0" * 16, "1"]
    for device in DEVICES:
        # What a server ships runs beside the node: neither the history nor the model of the agent is there, only its socket.
        composed.inside(f"{device}-node", "sh", "-c", 'test -S /run/fedssl/train.sock && test -z "$(ls /var/lib/fedssl/device 2>/dev/null)"')
        composed.inside(f"{device}-node", "sh", "-c", "! touch /run/fedssl/x 2>/dev/null")
        composed.inside(f"{device}-node", "python", "-c", "import importlib.util, onnxruntime; assert importlib.util.find_spec('torch') is None")


def test_what_is_up_is_well(composed: Composed):
    sizes = {image: int(json.loads(said("docker", "image", "inspect", image))[0]["Size"]) for image in IMAGES}
    assert sizes["fedssl-agent"] < sizes["fedssl-client"] / 2
    print("images, MB: " + ", ".join(f"{image} {size / 1e6:.0f}" for image, size in sizes.items()))
    for name in ("superlink", "proxy", *DEVICES, *(f"{device}-node" for device in DEVICES)):
        found = json.loads(said("docker", "inspect", composed.container(name)))[0]["State"]
        assert found.get("Health", found.get("Healthcheck"))["Status"] == "healthy", name
        print(f"{name}: {memory(composed, name):.0f} MB")


def memory(composed: Composed, service: str) -> float:
    """Resident MB of all processes in a service's container."""
    statuses = composed.inside(service, "sh", "-c", "cat /proc/[0-9]*/status 2>/dev/null || true")
    return sum(int(line.split()[1]) for line in statuses.splitlines() if line.startswith("VmRSS:")) / 1000
