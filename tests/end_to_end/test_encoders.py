"""Every encoder learns from histories what popularity does not know, with the task that suits it and what stands beside, in a whole simulated run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fedssl_simulations.baselines import run_baselines
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run

from fedssl.config import DataConfig
from fedssl.data.dataset import Dataset, make_dataset
from fedssl.data.synthetic import make_world, synthesize
from fedssl.parts import ENCODERS

SUITABLE = {"bert4rec": ("masked-item", 160)}
"""Task and rounds where they are not next-item and 60; a cloze learns slowly."""


@pytest.fixture(scope="module")
def histories() -> Dataset:
    """Few items and strong habits, so that a hundred rounds are enough."""
    world = make_world(60, 3, topics=2, focus=0.8, habit=0.95, look_back=0.1)
    return make_dataset(synthesize(600, 60, seed=3, mean_events=12, world=world, repeats=True), DataConfig(path="synthetic"))


BESIDE: dict[str, dict[str, Any]] = {
    "previous item": {"task": [{"name": "next-item"}, {"name": "previous-item", "weight": 0.5}]},
    "contrast": {"task": [{"name": "next-item"}, {"name": "contrastive", "weight": 0.1, "negatives": 8}]},
    "history's mean": {"head": {"history": 1.0}},
    "user vector": {"head": {"name": "user-vector"}},
    "first items of counts": {"encoder": {"first_items": "counts"}, "counts": {"strength": 0.0}},
}


def settings_of(name: str, rounds: int, **more: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": [{"name": "next-item"}],
        **more,
        "encoder": {"name": name, "width": 16, "hidden": 32, "heads": 1, "window": 20, "blocks": 1, **more.get("encoder", {})},
        "server": {"rounds": rounds, "cohort": 64, "lr": 0.02, "warmup": 5},
        "system": {"workers": 1, "checkpoint_every": 1000},
    }


def over_popularity(settings: dict[str, Any], histories: Dataset, folder: Path) -> float:
    """NDCG@10 `unseen` of the test, as a multiple of popularity's."""
    config = read_run(settings)
    report = simulate(config, out=folder / "run", dataset=histories).report
    popularity = run_baselines(config, histories, names=("popularity",))["popularity"]
    return float(report["test"]["unseen"]["ndcg@10"] / popularity["test"]["unseen"]["ndcg@10"])


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_beats_popularity(name: str, histories: Dataset, tmp_path: Path):
    task, rounds = SUITABLE.get(name, ("next-item", 60))
    assert over_popularity(settings_of(name, rounds, task=[{"name": task}]), histories, tmp_path) > 1.3


@pytest.mark.parametrize("name", BESIDE)
def test_a_run_beats_popularity_with_each_task_head_and_start_beside(name: str, histories: Dataset, tmp_path: Path):
    assert over_popularity(settings_of("hgrn", 60, **BESIDE[name]), histories, tmp_path) > 1.3
