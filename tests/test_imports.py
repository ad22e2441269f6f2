"""What may be imported without what: floors are held by import-linter, and here by importing for real."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
WITHOUT_TORCH = next(contract["source_modules"] for contract in CONTRACTS if contract.get("forbidden_modules") == ["torch"])


def run_without(blocked: str, code: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process of its own where importing ``blocked`` fails."""
    return subprocess.run([sys.executable, "-c", f"import sys; sys.modules[{blocked!r}] = None\n{code}"], capture_output=True, text=True, check=False)


def test_words_data_and_the_thin_doors_import_without_torch():
    assert "fedssl.privacy.ledger" in WITHOUT_TORCH
    done = run_without("torch", "\n".join(f"import {name}" for name in [*WITHOUT_TORCH, "fedssl_server.app", "fedssl_simulations.cli"]))
    assert done.returncode == 0, done.stderr


def test_the_block_bites():
    assert "torch" in run_without("torch", "import fedssl.weights").stderr


def test_a_node_trains_without_what_only_the_server_and_the_roof_need():
    done = run_without("dp_accounting", "sys.modules['scipy'] = sys.modules['pandas'] = sys.modules['jinja2'] = None\nimport fedssl_client.trainer")
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(120)
def test_the_floors_hold():
    """The contracts of pyproject.toml, as `make lint` reads them."""
    done = subprocess.run([str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
