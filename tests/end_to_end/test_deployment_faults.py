"""The script that holds a deployed server to what a node may send, here with the worst of it: the model is the honest nodes' own, to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "simulations" / "benchmarks" / "deployment_uploads.py"


@pytest.mark.timeout(420)
def test_no_upload_that_a_deployed_server_refuses_touches_the_model_and_no_stranger_joins():
    done = subprocess.run([sys.executable, str(SCRIPT), "--short", "--dry"], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    kinds = {"nan": "form", "1e30": "form", "one coordinate more": "form", "another round": "exchange", "an older version": "version"}
    assert found["refused_as"] == kinds
    assert found["files_unlike"] == [] and found["refused_when_honest"] == 0
    assert found["nodes_joined"] == 3
