"""What a device and a server need resolves for 64-bit ARM from wheels alone, without CUDA; where a package index can be asked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ARM = {"platform_machine": "aarch64"}


def resolved(extra: str, platform: str) -> list[str]:
    """What uv would install, as NAME==VERSION. Skips where no index answers."""
    uv = Path(sys.executable).parent / "uv"
    if not uv.exists():
        pytest.skip("uv is not installed; it comes with flwr")
    chosen = ["--extra", extra, "--constraint", "constraints.txt", "--python-version", "3.11", "--python-platform", platform, "--only-binary", ":all:"]
    command = [str(uv), "pip", "compile", "pyproject.toml", *chosen, "--no-header", "--no-annotate", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode and re.search("Failed to fetch|error sending request|Connect", done.stderr):
        pytest.skip("no package index answers")
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_versions_that_the_tests_ran_with_name_one_torch_a_platform():
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line.startswith("torch==")]
    asked = [Requirement(line) for line in lines]
    assert [str(one.specifier) for one in asked if one.marker and one.marker.evaluate(ARM)] == ["==2.10.0"]
    assert [str(one.specifier) for one in asked if one.marker and one.marker.evaluate({"platform_machine": "x86_64"})] == ["==2.13.0"]


@pytest.mark.parametrize("extra", ["agent", "client", "server"])
def test_arm64_resolves_without_cuda(extra: str):
    found = resolved(extra, "aarch64-manylinux_2_28")
    assert not [line for line in found if re.match("nvidia|cuda|triton", line)]
    assert [line for line in found if line.startswith("torch==")] == ([] if extra == "agent" else ["torch==2.10.0"])


def test_x86_keeps_its_torch():
    assert "torch==2.13.0" in resolved("client", "x86_64-manylinux_2_28")
