"""The job that the peers get is ours: same loss, same updates, and nothing of ours in their code. The peers themselves are not needed here."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from small import recipe_of, small_config, small_dataset

from fedssl.local_training import make_batch, train_users
from fedssl.parts import initial_weights, make_parts
from fedssl.recipe import Recipe

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "simulations" / "benchmarks"
JOBS = BENCHMARKS / "peer_jobs"
SCRIPTS = sorted(JOBS.glob("*.py"))


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmarks' modules, which are scripts beside one another and no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return {name: importlib.import_module(name) for name in ("peers", "peer_jobs.job_folder", "peer_jobs.plain_sasrec")}


def recipe_with(steps: int) -> Recipe:
    config = small_config({"encoder": {"blocks": 2}, "local": {"steps": steps}, "task": [{"name": "next-item", "negatives": 12}]})
    return recipe_of(config, small_dataset())


@pytest.mark.parametrize("steps", [1, 3])
def test_the_peers_model_has_our_loss_and_our_update(scripts: dict[str, ModuleType], steps: int):
    recipe, histories, users = recipe_with(steps), small_dataset().histories, np.arange(24)
    weights, parts = initial_weights(recipe), make_parts(recipe)
    batch = make_batch(parts.tasks, histories, users, users, base=(recipe.seed, "training", 1), local=recipe.local, window=10, num_items=recipe.num_items)
    ours = train_users(parts.encoder, parts.tasks, weights, batch, local=recipe.local, window=10)
    assert ours.rows_UK is not None
    for user, theirs in enumerate(scripts["peers"].draw_users(recipe, small_dataset(), users)):
        model = scripts["peer_jobs.plain_sasrec"].PlainSASRec(weights, heads=2, blocks=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=recipe.local.lr)
        for step in range(steps):
            optimizer.zero_grad()
            loss = model.loss(*(tensor[step : step + 1] for tensor in theirs))
            loss.backward()
            optimizer.step()
            if step == 0:
                assert loss.item() == pytest.approx(float(ours.loss_U[user]), rel=1e-5)
        moved = {name.replace("-", "."): leaf.detach() - weights[name.replace("-", ".")] for name, leaf in model.named_parameters()}
        items = torch.zeros_like(weights["items"]).index_add_(0, ours.rows_UK[user], ours.items[user])
        expected = {"items": items} | {name: leaf[user] for name, leaf in ours.update.items()}
        assert moved.keys() == expected.keys()
        length = torch.cat([leaf.flatten() for leaf in expected.values()]).norm()
        apart = torch.cat([(moved[name] - expected[name]).flatten() for name in expected]).norm()
        assert length > 0.01 and apart < 1e-5 * length


def test_a_job_comes_back_from_its_folder_as_it_went_in(scripts: dict[str, ModuleType], tmp_path: Path):
    folder = scripts["peer_jobs.job_folder"]
    recipe = recipe_with(3)
    users = scripts["peers"].draw_users(recipe, small_dataset(), np.arange(24))
    values = {"steps": 3, "lr": 0.1, "clip_norm": 1.0, "heads": 2, "blocks": 2, "cohort": 4, "nodes": 5, "rounds": 6}
    settings = folder.Settings(**values, server_lr=0.2, momentum=0.9, beta2=0.98, epsilon=1e-8)
    folder.write_job(tmp_path, settings, initial_weights(recipe), users)
    assert folder.read_settings(tmp_path) == settings
    back = folder.read_users(tmp_path)
    assert len({user.read_SL.shape for user in users}) > 1
    assert all(torch.equal(left, right) for ours, theirs in zip(users, back, strict=True) for left, right in zip(ours, theirs, strict=True))
    weights = folder.read_weights(tmp_path)
    assert all(torch.equal(weights[name], leaf) for name, leaf in initial_weights(recipe).items())


def test_updates_come_back_by_user(scripts: dict[str, ModuleType], tmp_path: Path):
    folder = scripts["peer_jobs.job_folder"]
    folder.write_updates(tmp_path / "found.npz", {1: ({"a": torch.ones(2)}, 0.5), 11: ({"a": torch.zeros(2)}, 0.25)})
    update, loss = folder.read_updates(tmp_path / "found.npz", 1)
    assert update["a"].tolist() == [1.0, 1.0] and loss == 0.5


def test_a_round_waits_for_its_turn_and_says_how_long_it_took():
    program = "from job_folder import Turns; import time; t = Turns(); t.end_and_wait(); time.sleep(0.05); t.end_and_wait(); t.end_and_wait(is_last=True)"
    told = subprocess.run([sys.executable, "-c", program], cwd=JOBS, input="\n\n", capture_output=True, text=True, timeout=60, check=True).stdout.split("\n")
    assert told[0] == "READY" and [line.split()[0] for line in told[1:3]] == ["ROUND", "ROUND"]
    assert 0.05 <= float(told[1].split()[1]) < 5
    alone = subprocess.run([sys.executable, "-c", program], cwd=JOBS, input="", capture_output=True, text=True, timeout=60)
    assert alone.returncode == 1 and alone.stderr == "nobody waits for the next round\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_peers_script_has_nothing_of_ours(script: Path):
    imported = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"), script.name)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert "torch" in imported
    assert not {name for name in imported if name.startswith("fedssl")}


@pytest.mark.parametrize("peer", ["pfl-research", "flower"])
def test_a_peers_environment_has_exact_versions_and_our_torch(peer: str):
    lines = [line for line in (JOBS / f"{peer}.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", line) for line in lines)
    written = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    ours = [line.split(";")[0] for line in written if "== 'aarch64'" not in line]
    shared = {"pfl-research": ("torch", "numpy"), "flower": ("torch", "numpy", "flwr", "ray")}[peer]
    assert {line for line in ours if line.split("==")[0] in shared} <= set(lines)
