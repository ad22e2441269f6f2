"""What the benchmarks print is what their rows hold, and their statistics are those they name."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from fedssl_simulations.run_files import read_run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

BENCHMARKS = Path(__file__).parents[2] / "simulations" / "benchmarks"
NAMES = ("curves", "encoders", "paired", "parts", "quality", "tables")


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The benchmarks' modules, which are scripts beside one another and no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return {name: importlib.import_module(name) for name in NAMES}


def test_the_readme_holds_the_tables_of_todays_results(scripts: dict[str, ModuleType]):
    text = scripts["tables"].README.read_text()
    assert scripts["tables"].with_tables(text) == text, "run simulations/benchmarks/tables.py"


def test_the_plot_holds_the_curves_of_todays_results(scripts: dict[str, ModuleType]):
    assert scripts["curves"].page() == scripts["curves"].PAGE.read_text(), "run simulations/benchmarks/curves.py"


def test_the_page_of_encoders_holds_todays_results(scripts: dict[str, ModuleType]):
    assert scripts["encoders"].page() == scripts["encoders"].PAGE.read_text(), "run simulations/benchmarks/encoders.py"


def test_ndcg_is_the_mean_over_users_and_seeds(scripts: dict[str, ModuleType]):
    assert scripts["paired"].ndcg(np.array([[1.0, 3.0], [11.0, 10.0]])) == pytest.approx((1 + 1 / 2 + 0 + 1 / np.log2(11)) / 4)


@settings(max_examples=30, deadline=None)
@given(ranks_SU=arrays(float, st.tuples(st.integers(1, 3), st.integers(1, 35)), elements=st.integers(1, 50).map(float)))
def test_the_worst_tenth_is_each_seeds_own_rounded_up(scripts: dict[str, ModuleType], ranks_SU: np.ndarray):
    tenth = -(-ranks_SU.shape[1] // 10)
    slow = [1 / rank for seed in ranks_SU.tolist() for rank in sorted(seed)[-tenth:]]
    assert scripts["paired"].worst_tenth(ranks_SU) == pytest.approx(sum(slow) / len(slow))


def test_a_gain_is_a_share_of_what_was_before_with_an_interval_over_users(scripts: dict[str, ModuleType]):
    paired = scripts["paired"]
    rng = np.random.default_rng(0)
    before = rng.integers(1, 30, (2, 400)).astype(float)
    after = np.maximum(before - rng.integers(0, 3, before.shape), 1)
    found = paired.gain(paired.ndcg, before, after)
    assert found["gain"] == pytest.approx(paired.ndcg(after) / paired.ndcg(before) - 1)
    assert found["interval"][0] < found["gain"] < found["interval"][1]
    assert found["seeds"] == pytest.approx(sorted(paired.ndcg(after[[seed]]) / paired.ndcg(before[[seed]]) - 1 for seed in (0, 1)))
    # The ratio of two means of the same users, by the delta method.
    gains = {name: np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean(0) for name, ranks in (("before", before), ("after", after))}
    left = gains["after"] - gains["after"].mean() / gains["before"].mean() * gains["before"]
    width = 2 * 1.96 * left.std() / np.sqrt(400) / gains["before"].mean()
    assert found["interval"][1] - found["interval"][0] == pytest.approx(width, rel=0.15)


def test_nothing_gained_is_no_gain_and_no_interval(scripts: dict[str, ModuleType]):
    ranks = np.arange(1.0, 41.0)[None]
    found = scripts["paired"].gain(scripts["paired"].ndcg, ranks, ranks)
    assert (found["gain"], found["interval"]) == (0.0, [0.0, 0.0])


def test_a_person_with_many_targets_counts_as_one_in_the_interval(scripts: dict[str, ModuleType]):
    interval = scripts["paired"].clustered_interval
    values = np.random.default_rng(0).standard_normal(300)
    one_by_one, thrice = interval(values, np.arange(300)), interval(np.repeat(values, 3), np.repeat(np.arange(300), 3))
    assert one_by_one == pytest.approx(thrice)
    assert np.diff(one_by_one) == pytest.approx(2 * 1.96 * values.std() / np.sqrt(300), rel=0.1)
    assert np.diff(interval(np.repeat(values, 3), np.arange(900))) < 0.7 * np.diff(thrice), "as if each target were another person's"


def test_each_arm_counts_at_the_rate_that_validates_best(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch):
    def row(name, preset, config, dataset, runs):
        return {"seed": config.seed, "lr": config.server.lr, "validation": {"unseen": {"ndcg@10": {0.1: 0.2, 0.2: 0.4, 0.3: 0.3}[config.server.lr]}}}

    monkeypatch.setattr(scripts["paired"], "row_of", row)
    configs = [read_run("demo", ["data.path=people.txt"], seed=seed) for seed in (1, 2)]
    tried, rows = scripts["paired"].arm_of("an arm", "demo", configs, None, Namespace(lr=[0.1, 0.2, 0.3], runs=None))
    assert tried == {"best": 0.2, "validated": pytest.approx({"0.1": 0.2, "0.2": 0.4, "0.3": 0.3})}
    assert [(found["seed"], found["lr"]) for found in rows] == [(1, 0.2), (2, 0.2)]


def test_an_arm_without_a_part_is_the_preset_but_for_that_part(scripts: dict[str, ModuleType]):
    parts, config = scripts["parts"], read_run("ml-100k-counts", ["head.history=3.0"])
    fewer = {name: parts.without(name, config) for name in parts.PARTS}
    assert all(one != config for one in fewer.values())
    for name, section in zip(parts.PARTS, ("encoder", "encoder", "encoder", "counts", "task", "head"), strict=True):
        assert fewer[name].model_copy(update={section: getattr(config, section)}) == config
    plain = read_run("ml-100k", [])
    assert all(parts.without(name, plain) == plain for name in parts.PARTS)


def test_a_preset_with_a_part_has_no_second_arm_with_it(scripts: dict[str, ModuleType]):
    quality = scripts["quality"]
    arms = quality.jobs(read_run("ml-100k-counts", []), None, None).keys()
    assert quality.PLAIN in arms and quality.HISTORY in arms and not {quality.PREVIOUS, quality.BOTH} & arms
    arms = quality.jobs(read_run("ml-1m", []), None, None).keys()
    assert quality.PLAIN not in arms and {quality.PREVIOUS, quality.HISTORY, quality.BOTH} <= arms
