"""Gates: every reading has one, and Linux' readings are those of the system's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fedssl_client.gates import MB, LinuxReadings, Readings, closed_gates, platform_of
from fedssl_client.policy import GateSettings

from fedssl.errors import ConfigError

GOOD = Readings(on_power=True, unmetered=True, busy=0.1, free_disk=10_000 * MB, free_memory=10_000 * MB)
SETTINGS = GateSettings(rounds_a_day=3)


@pytest.mark.parametrize(
    ("readings", "trainings", "words"),
    [
        ({}, 2, []),
        ({"on_power": False}, 0, ["on battery"]),
        ({"unmetered": False}, 0, ["on a mobile network"]),
        ({"busy": 0.51}, 0, ["busy: others use 51% of the processor"]),
        ({"free_disk": 499 * MB}, 0, ["499 MB of disk free"]),
        ({"free_memory": 699 * MB}, 0, ["699 MB of memory free"]),
        # A training takes memory itself.
        ({"free_memory": 141 * MB}, None, []),
        ({"free_memory": 139 * MB}, None, ["139 MB of memory free"]),
        ({}, 3, ["3 trainings in 24 hours"]),
        ({}, None, []),
        ({"on_power": False, "unmetered": False}, 3, ["on battery", "on a mobile network", "3 trainings in 24 hours"]),
    ],
)
def test_a_gate_closes_on_its_own_reading(readings: dict[str, Any], trainings: int | None, words: list[str]):
    assert closed_gates(SETTINGS, replace(GOOD, **readings), trainings=trainings) == words


def test_a_gate_that_is_switched_off_stays_open():
    off = GateSettings(charging=False, unmetered=False, most_busy=1.0, least_disk_mb=0, least_memory_mb=0)
    assert closed_gates(off, Readings(False, False, 1.0, 0, 0), trainings=0) == []


def test_a_way_out_over_a_mobile_device_is_metered(tmp_path: Path):
    routes = tmp_path / "proc" / "net" / "route"
    routes.parent.mkdir(parents=True)
    for name, kind in (("eth0", ""), ("modem0", "DEVTYPE=wwan\nINTERFACE=modem0\n"), ("wlan0", "DEVTYPE=wlan\n")):
        folder = tmp_path / "sys" / "class" / "net" / name
        folder.mkdir(parents=True)
        (folder / "uevent").write_text(kind)
    head = "Iface\tDestination\tGateway\n"
    for route, unmetered in (
        ("eth0\t00000000\t0102A8C0\n", True),
        ("wlan0\t00000000\t0102A8C0\n", True),
        ("modem0\t00000000\t0102A8C0\n", False),
        ("modem0\t0002A8C0\t00000000\neth0\t00000000\t0102A8C0\n", True),
        ("eth0\t00000000\t0102A8C0\nppp0\t00000000\t0102A8C0\n", False),
        ("", True),
    ):
        routes.write_text(head + route)
        assert LinuxReadings(tmp_path)(tmp_path, None).unmetered is unmetered


def test_what_the_training_uses_is_not_what_keeps_others_busy():
    readings = LinuxReadings()
    readings._before = (100.0, 40.0, None, 0.0)
    # Another training begins from nothing.
    seen = [(200.0, 100.0, 7, 30.0), (300.0, 190.0, 7, 110.0), (400.0, 240.0, 8, 20.0), (500.0, 290.0, None, 0.0)]
    assert [readings._busy_since(times) for times in seen] == pytest.approx([0.3, 0.1, 0.3, 0.5])


def test_a_look_spans_neither_an_instant_nor_the_hours_since_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    readings = LinuxReadings()
    looks = iter([(1000.0, 500.0, None, 0.0), (1001.0, 500.1, None, 0.0)])
    monkeypatch.setattr(readings, "_times", lambda training: next(looks))
    # The first look of all is over its own fifth of a second; one that follows at once repeats it.
    assert [readings(tmp_path, None).busy for _ in range(3)] == pytest.approx([0.1, 0.1, 0.1])


def test_readings_of_this_machine_are_numbers_that_can_be(tmp_path: Path):
    own = psutil.Process()
    readings = LinuxReadings()
    before = own.cpu_times().user
    while own.cpu_times().user < before + 0.05:
        pass
    found = readings(tmp_path, own)
    assert 0 <= found.busy <= 1
    assert 0 < found.free_memory <= psutil.virtual_memory().total
    assert found.free_disk > 0
    assert readings._times(own)[3] >= before


def test_a_platform_of_ones_own_is_found_by_name():
    assert isinstance(platform_of(GateSettings()), LinuxReadings)
    assert platform_of(GateSettings(platform="device:good_machine"))(Path("/"), None).on_power
    with pytest.raises(ConfigError, match="platform 'nowhere:to_be' cannot be loaded"):
        platform_of(GateSettings(platform="nowhere:to_be"))
