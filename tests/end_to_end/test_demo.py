"""The demo's claim in small: order is what the federated model learns, and nothing else gives its lead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fedssl_simulations.baselines import run_baselines
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run

from fedssl.config import DataConfig
from fedssl.data.dataset import Dataset, make_dataset
from fedssl.data.histories import shuffled_in_time
from fedssl.data.synthetic import synthesize

SMALL = ["encoder.width=16", "encoder.hidden=32", "encoder.window=30", "server.rounds=240", "server.cohort=64", "evaluation.every=0"]


def ndcg(report: dict, name: str | None = None) -> float:
    row = report["test"] if name is None else report["baselines"][name]["test"]
    return row["unseen"]["ndcg@10"]


def trained(dataset: Dataset, folder: Path) -> dict:
    config = read_run("demo", [*SMALL, "system.workers=1"])
    report = simulate(config, out=folder, dataset=dataset).report
    return {**report, "baselines": run_baselines(config, dataset, names=("popularity", "markov", "co-occurrence"))}


@pytest.fixture(scope="module")
def histories() -> Dataset:
    return make_dataset(synthesize(800, 200, seed=3, mean_events=30), DataConfig(path="synthetic"))


def test_the_federated_model_beats_popularity_and_markov(histories: Dataset, tmp_path: Path):
    report = trained(histories, tmp_path / "run")
    assert ndcg(report) > 1.05 * ndcg(report, "markov")
    assert ndcg(report) > 1.5 * ndcg(report, "popularity")
    assert ndcg(report) > 1.5 * ndcg(report, "co-occurrence")


def test_with_histories_shuffled_in_time_its_lead_over_co_occurrence_disappears(histories: Dataset, tmp_path: Path):
    shuffled = replace(histories, histories=shuffled_in_time(histories.histories, seed=1))
    report = trained(shuffled, tmp_path / "run")
    assert ndcg(report) < 1.05 * ndcg(report, "co-occurrence")
