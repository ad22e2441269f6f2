"""Every encoder learns from histories what popularity does not know, with the task that suits it, in a whole simulated run."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_beats_popularity(name: str, histories: Dataset, tmp_path: Path):
    task, rounds = SUITABLE.get(name, ("next-item", 60))
    config = read_run(
        {
            "encoder": {"name": name, "width": 16, "hidden": 32, "heads": 1, "window": 20, "blocks": 1},
            "task": [{"name": task}],
            "server": {"rounds": rounds, "cohort": 64, "lr": 0.02, "warmup": 5},
            "system": {"workers": 1, "checkpoint_every": 1000},
        }
    )
    report = simulate(config, out=tmp_path / "run", dataset=histories).report
    popularity = run_baselines(config, histories, names=("popularity",))["popularity"]
    assert report["test"]["unseen"]["ndcg@10"] > 1.3 * popularity["test"]["unseen"]["ndcg@10"]
