"""What docker/compose.yaml shows, without containers: three devices record, train over a SuperLink, and recommend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "demo" / "without_containers.py"


@pytest.mark.skipif("FEDSSL_FEDERATION" not in os.environ, reason="it takes minutes on both cores; `make federation` runs it")
@pytest.mark.timeout(1200)
def test_three_devices_record_train_and_recommend_without_containers(capsys: pytest.CaptureFixture[str]):
    command, environment = [sys.executable, "-u", str(SCRIPT)], {**os.environ, "OMP_NUM_THREADS": "1"}
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            with capsys.disabled():
                print(("" if said[1:] else "\n") + line, end="", flush=True)
    assert process.returncode == 0
    for person in ("anna", "ben", "cleo"):
        lines = [json.loads(line.partition(": ")[2]) for line in said if line.startswith(f"{person}: ")]
        (recorded,) = (line["events"] for line in lines if line["app"] == "recorded")
        recommended = [line for line in lines if line["app"] == "recommended"]
        assert recorded >= 5 and all(len(line["items"]) == 3 for line in recommended)
        # From the model that came along to the one of the server's run.
        assert len({line["model_run"] for line in recommended}) == 2
        assert len({tuple(line["items"]) for line in recommended}) > 1
    rounds = [line.split(":")[1].strip() for line in said if line.startswith("server: ")]
    assert rounds == ["counts, round 1", "training, round 1", "training, round 2", "training, round 3"]
    assert "three devices recorded, trained 3 rounds" in said[-1]
