"""A whole simulation: the same numbers again, stopped and resumed, and what its files say under a plan."""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedssl_simulations.run import Run, simulate
from fedssl_simulations.run_files import read_run
from fedssl_simulations.run_folder import claim
from fedssl_simulations.simulated_nodes import heads_of, make_shards
from small import BOMB, KEYS, PLAN, dataset_of, learned, small_config, small_dataset

from fedssl.checking import check
from fedssl.checkpoints import list_checkpoints, read_checkpoint
from fedssl.config import RunConfig
from fedssl.errors import BudgetSpent, CatalogueMismatch, ConfigError, RunFolderError
from fedssl.evaluation import evaluate
from fedssl.privacy import accounting
from fedssl.privacy.ledger import Ledger
from fedssl.recipe import make_recipe
from fedssl.recommender import Recommender
from fedssl.round_lines import read_lines

CONFIG = small_config(
    {
        "counts": {"lags": 2},
        "head": {"name": "user-vector", "lr": 0.5},
        "server": {"rounds": 5},
        "system": {"shards": 2, "checkpoint_every": 2},
        "evaluation": {"every": 2, "users": 10},
    }
)
PRIVATE = small_config(
    PLAN,
    {
        "counts": {"clip_norm": 1.0},
        "head": {"name": "user-vector"},
        "privacy": {"counts_noise_multiplier": 2.0},
        "server": {"rounds": 3},
        "system": {"shards": 2, "checkpoint_every": 1},
        "evaluation": {"every": 1},
    },
)


def stop_after(rounds: int) -> Any:
    """Asked before each round, the counts' included."""
    asked = iter(range(100))
    return lambda: next(asked) >= rounds


def run(config: RunConfig, out: Path, **more: Any) -> Run:
    return simulate(config, out=out, dataset=small_dataset(), keys=KEYS if config.privacy.has_plan else None, **more)


def resume(folder: Path, config: RunConfig, **more: Any) -> Run:
    return simulate(resume=folder, dataset=small_dataset(), keys=KEYS if config.privacy.has_plan else None, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(CONFIG, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(PRIVATE, tmp_path_factory.mktemp("private") / "run")


def without_seconds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_a_run_leaves_its_files_and_says_what_it_found(whole: Run):
    assert whole.is_finished
    names = {path.name for path in whole.folder.iterdir()}
    assert names == {"run.toml", "run.lock", "metrics.jsonl", "report.json", "checkpoints", "heads"}
    assert [path.name for path in list_checkpoints(whole.folder / "checkpoints")] == ["round-000005"]
    report = json.loads((whole.folder / "report.json").read_text())
    assert report == json.loads(json.dumps(whole.report))
    assert report["data"] == {"users": 24, "items": 36, "events": small_dataset().histories.num_events, "fingerprint": small_dataset().histories.fingerprint}
    assert report["test"].keys() >= {"all", "unseen", "parts"} and report["test"]["parts"].keys() == {"encoder", "counts"}
    assert report["privacy"] is None
    assert report["cost"]["rounds"] == 5 and report["cost"]["users_trained"] == 5 * 12
    assert report["cost"]["upload_bytes_per_user"] > 0


def test_metrics_have_a_line_a_round_and_validations_between(whole: Run):
    lines = read_lines(whole.folder / "metrics.jsonl")
    assert [(line["phase"], line["round"]) for line in lines] == [("counts", 1), *(("training", number) for number in range(1, 6))]
    assert [line["round"] for line in lines if "validation" in line] == [2, 4]
    assert [line["round"] for line in lines if "encodings" in line] == [2, 4, 5]
    assert all(1 <= line["encodings"]["effective_rank"] <= line["encodings"]["width"] for line in lines if "encodings" in line)
    assert all(line["users"] == 12 and np.isfinite(line["loss"]) for line in lines[1:])
    assert whole.metrics["round"].tolist() == [1, 1, 2, 3, 4, 5]


def test_the_same_run_twice_ends_with_the_same_bytes_and_metrics(whole: Run, tmp_path: Path):
    again = run(CONFIG, tmp_path / "again")
    assert learned(again.folder) == learned(whole.folder)
    assert without_seconds(read_lines(again.folder / "metrics.jsonl")) == without_seconds(read_lines(whole.folder / "metrics.jsonl"))
    assert again.report["test"] == whole.report["test"]


def test_the_run_toml_of_a_run_begins_it_anew_to_the_same_bytes(whole: Run, tmp_path: Path):
    again = run(read_run(whole.folder / "run.toml"), tmp_path / "again")
    assert learned(again.folder) == learned(whole.folder)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 5])
def test_stopped_and_resumed_a_run_ends_with_the_same_bytes_and_metrics(rounds: int, whole: Run, tmp_path: Path):
    stopped = run(CONFIG, tmp_path / "run", should_stop=stop_after(rounds))
    assert not stopped.is_finished and stopped.report == {} and not (stopped.folder / "report.json").exists()
    # A stop leaves a checkpoint of the newest round, however long ago the last one was due.
    found = list_checkpoints(stopped.folder / "checkpoints")
    assert len(found) == min(rounds, 1)
    if rounds:
        state = read_checkpoint(found[0]).state
        assert (state.phase, state.round) == (("counts", 1) if rounds == 1 else ("training", rounds - 1))
    done = resume(tmp_path / "run", CONFIG)
    assert done.is_finished
    assert learned(done.folder) == learned(whole.folder)
    assert without_seconds(read_lines(done.folder / "metrics.jsonl")) == without_seconds(read_lines(whole.folder / "metrics.jsonl"))
    assert done.report["test"] == whole.report["test"]


def test_a_node_that_was_not_asked_is_not_in_the_line_of_a_round(tmp_path: Path):
    # Every user on a node of their own, three asked a round.
    config = small_config({"system": {"shards": 24}, "server": {"cohort": 3, "rounds": 3}, "task": [{"name": "small:next_item_with_a_bomb"}]})
    rows = [[1, 2, 3, 4, BOMB, 5, 6], *([1 + user, 3, 2, 4, 5, 6, 7] for user in range(23))]
    done = simulate(config, out=tmp_path / "run", dataset=dataset_of(*rows, num_items=BOMB))
    lines = read_lines(done.folder / "metrics.jsonl")
    assert sum(line["broken_users"] for line in lines) <= 1
    alone = simulate(config, out=tmp_path / "stopped", dataset=dataset_of(*rows, num_items=BOMB), should_stop=stop_after(2))
    resumed = simulate(resume=alone.folder, dataset=dataset_of(*rows, num_items=BOMB))
    assert without_seconds(read_lines(resumed.folder / "metrics.jsonl")) == without_seconds(lines)


class Crash(Exception):
    pass


def crash_at(round: int) -> Any:
    """An error of the caller's own, out of the middle of a run: no checkpoint is written then."""

    def on_progress(progress: Any) -> None:
        if (progress.facts.phase, progress.facts.round) == ("training", round):
            raise Crash

    return on_progress


def test_a_crash_loses_the_rounds_since_the_checkpoint_and_their_lines(whole: Run, tmp_path: Path):
    with pytest.raises(Crash):
        run(CONFIG, tmp_path / "run", on_progress=crash_at(3))
    assert [line["round"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 1, 2, 3]
    stopped = resume(tmp_path / "run", CONFIG, should_stop=lambda: True)
    assert [line["round"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 1, 2]
    assert stopped.state.round == 2
    done = resume(tmp_path / "run", CONFIG)
    assert learned(done.folder) == learned(whole.folder)


def test_a_resume_takes_heads_back_at_once_not_when_their_users_are_next_asked(tmp_path: Path):
    stopped = run(CONFIG, tmp_path / "reference", should_stop=stop_after(3))
    with pytest.raises(Crash):
        run(CONFIG, tmp_path / "run", on_progress=crash_at(3))
    assert learned(tmp_path / "run") != learned(stopped.folder)
    resume(tmp_path / "run", CONFIG, should_stop=lambda: True)
    assert learned(tmp_path / "run") == learned(stopped.folder)


def test_a_finished_run_resumed_trains_no_more_and_reports_again(whole: Run, tmp_path: Path):
    shutil.copytree(whole.folder, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    again = resume(tmp_path / "run", CONFIG, should_stop=lambda: pytest.fail("no round is left"))
    assert again.is_finished and again.report["test"] == whole.report["test"]
    assert learned(again.folder) == learned(whole.folder)


def test_a_taken_folder_is_refused(whole: Run):
    with pytest.raises(RunFolderError, match="not empty"):
        run(CONFIG, whole.folder)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path):
    run(CONFIG, tmp_path / "run", should_stop=lambda: True)
    with claim(tmp_path / "run", resume=True), pytest.raises(RunFolderError, match="another process"):
        resume(tmp_path / "run", CONFIG)


def test_a_resume_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(RunFolderError, match="no run to resume"):
        resume(tmp_path, CONFIG)


def test_changed_histories_are_refused(tmp_path: Path):
    rows = [[1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 1], [6, 5, 4, 3, 2, 1]]
    config = small_config({"server": {"rounds": 1, "cohort": 3}})
    simulate(config, out=tmp_path / "run", dataset=dataset_of(*rows, num_items=6), should_stop=lambda: True)
    with pytest.raises(RunFolderError, match="the histories have changed since this run began"):
        simulate(resume=tmp_path / "run", dataset=dataset_of(*rows[:2], rows[2][::-1], num_items=6))
    with pytest.raises(CatalogueMismatch, match="another catalogue"):
        simulate(resume=tmp_path / "run", dataset=dataset_of(*rows, num_items=7))
    assert simulate(resume=tmp_path / "run", dataset=dataset_of(*rows, num_items=6)).is_finished


def changed(folder: Path, before: str, after: str) -> None:
    text = (folder / "run.toml").read_text()
    assert text.count(before) == 1
    (folder / "run.toml").write_text(text.replace(before, after))


def test_changed_settings_are_refused_and_those_of_speed_are_not(whole: Run, tmp_path: Path):
    run(CONFIG, tmp_path / "run", should_stop=stop_after(3))
    changed(tmp_path / "run", "rounds = 5", "rounds = 6")
    with pytest.raises(RunFolderError, match=r"made with other settings than run.toml has"):
        resume(tmp_path / "run", CONFIG)
    changed(tmp_path / "run", "rounds = 6", "rounds = 5")
    changed(tmp_path / "run", "workers = 1", "workers = 3")
    assert learned(resume(tmp_path / "run", CONFIG).folder) == learned(whole.folder)


@pytest.mark.parametrize("shards", [1, 2, 30])
def test_heads_are_found_whichever_node_holds_them(tmp_path: Path, shards: int):
    config = small_config({"head": {"name": "user-vector"}, "system": {"shards": shards}})
    dataset = small_dataset()
    recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash)
    nodes = make_shards(dataset, config, tmp_path)
    for shard in nodes.values():
        store = shard.heads(recipe)
        assert store is not None
        store.write(shard.users, np.repeat(shard.users[:, None], recipe.encoder.width, axis=1).astype(np.float32), round=1)
    read = heads_of(nodes, recipe)
    assert read is not None
    users = np.array([23, 0, 11, 12, 5])
    assert read(users)[:, -1].tolist() == users.tolist()


def test_more_shards_than_users_are_no_obstacle(tmp_path: Path):
    config = small_config({"system": {"shards": 30, "users_per_chunk": 1}, "head": {"name": "user-vector"}, "server": {"rounds": 1}})
    assert run(config, tmp_path / "run").is_finished


def test_a_model_recommends_with_what_was_learned(whole: Run):
    scores = whole.model([small_dataset().histories.of(3)], np.array([3]))
    assert scores["score"].shape == (1, 37)
    assert scores.keys() == {"score", "encoder", "counts"}


# ---- an average of late rounds ----

AVERAGED = small_config({"server": {"rounds": 5, "average_from": 3, "schedule": "constant"}, "system": {"checkpoint_every": 2}, "evaluation": {"every": 2}})


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(AVERAGED, tmp_path_factory.mktemp("averaged") / "run")


def test_what_a_run_reports_and_leaves_is_the_average(averaged: Run):
    found = read_checkpoint(list_checkpoints(averaged.folder / "checkpoints")[-1])
    mean, last = (Recommender(found.recipe, weights) for weights in (found.state.released(found.recipe), found.state.weights(found.recipe)))
    of_run, of_mean, of_last = (evaluate(model, small_dataset().histories, "test").all["score"] for model in (averaged.model, mean, last))
    assert np.array_equal(of_run, of_mean) and not np.array_equal(of_run, of_last)
    assert averaged.report["test"] == evaluate(mean, small_dataset().histories, "test").summary()


def test_validations_between_rounds_are_of_the_average_where_it_has_begun(averaged: Run, tmp_path: Path):
    stopped = run(AVERAGED, tmp_path / "run", should_stop=stop_after(4))
    (line,) = [line for line in read_lines(averaged.folder / "metrics.jsonl") if line["round"] == 4]
    assert stopped.state.average_P is not None
    assert line["validation"] == evaluate(stopped.model, small_dataset().histories, "validation").summary()


@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_stopped_before_or_within_its_average_a_run_ends_with_the_same_bytes(rounds: int, averaged: Run, tmp_path: Path):
    run(AVERAGED, tmp_path / "run", should_stop=stop_after(rounds))
    done = resume(tmp_path / "run", AVERAGED)
    assert learned(done.folder) == learned(averaged.folder) and "round-000005/training.safetensors" in learned(done.folder)
    assert done.report["test"] == averaged.report["test"]


# ---- early stop ----

# Its validations are best after round 4, and the third that is no better follows round 10.
PATIENT = small_config(
    {
        "counts": {"lags": 2},
        "head": {"name": "user-vector", "lr": 0.5},
        "server": {"rounds": 12, "schedule": "constant", "lr": 0.1},
        "system": {"shards": 2, "checkpoint_every": 3},
        "evaluation": {"every": 2, "patience": 3},
    }
)


def with_evaluation(config: RunConfig, **values: Any) -> RunConfig:
    return small_config(config.model_dump(), {"evaluation": {**config.evaluation.model_dump(), **values}})


def kept(folder: Path) -> dict[str, bytes]:
    """All that a run learned, and its best checkpoint too."""
    return learned(folder) | {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted((folder / "checkpoints").glob("*/*.safetensors"))}


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(PATIENT, tmp_path_factory.mktemp("patient") / "run")


def test_a_run_stops_when_its_patience_ends_and_is_that_of_its_best_round(patient: Run, tmp_path: Path):
    lines = read_lines(patient.folder / "metrics.jsonl")
    seen = [(line["round"], line["validation"]["unseen"]["ndcg@10"]) for line in lines if "validation" in line]
    assert [round for round, _ in seen] == [2, 4, 6, 8, 10] and max(seen, key=lambda pair: pair[1])[0] == 4 and lines[-1]["round"] == 10
    assert patient.is_finished and patient.state.round == 4
    assert patient.report["model"] == {"checkpoint": "round-000004", "round": 4, "average_from": None, "stopped_early": True}
    assert patient.report["cost"]["rounds"] == 10 and patient.report["cost"]["users_trained"] == 10 * 12
    assert [path.name for path in list_checkpoints(patient.folder / "checkpoints")] == ["round-000004", "round-000010"]
    # A run of four rounds, whose step sizes are the same: weights, counts, heads, and what is reported of them.
    short = run(small_config(PATIENT.model_dump(), {"server": {"rounds": 4}, "evaluation": {"every": 0, "patience": 0}}), tmp_path / "short")
    for name, raw in learned(short.folder).items():
        assert kept(patient.folder)[name] == raw
    assert {name: patient.report[name] for name in ("test", "validation", "groups")} == {name: short.report[name] for name in ("test", "validation", "groups")}


def assert_is_as_if_never_stopped(done: Run, reference: Run) -> None:
    assert done.is_finished and kept(done.folder) == kept(reference.folder)
    assert without_seconds(read_lines(done.folder / "metrics.jsonl")) == without_seconds(read_lines(reference.folder / "metrics.jsonl"))
    assert done.report["model"] == reference.report["model"] and done.report["test"] == reference.report["test"]


@pytest.mark.parametrize("rounds", [0, 1, 4, 5, 8, 10])
def test_stopped_and_resumed_a_run_stops_early_after_the_same_round(rounds: int, patient: Run, tmp_path: Path):
    stopped = run(PATIENT, tmp_path / "run", should_stop=stop_after(rounds))
    assert not stopped.is_finished
    assert_is_as_if_never_stopped(resume(tmp_path / "run", PATIENT), patient)


@pytest.mark.parametrize("round", [2, 4, 5, 8, 9, 10])
def test_after_a_crash_a_run_stops_early_after_the_same_round(round: int, patient: Run, tmp_path: Path):
    with pytest.raises(Crash):
        run(PATIENT, tmp_path / "run", on_progress=crash_at(round))
    assert_is_as_if_never_stopped(resume(tmp_path / "run", PATIENT), patient)


def test_a_run_that_stopped_early_trains_no_more_and_reports_again(patient: Run, tmp_path: Path):
    shutil.copytree(patient.folder, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    again = resume(tmp_path / "run", PATIENT, should_stop=lambda: pytest.fail("it is over"))
    assert_is_as_if_never_stopped(again, patient)


def test_with_patience_to_the_end_the_model_is_still_that_of_the_best_round(tmp_path: Path):
    done = run(with_evaluation(PATIENT, patience=20), tmp_path / "run")
    assert done.report["model"] == {"checkpoint": "round-000004", "round": 4, "average_from": None, "stopped_early": False}
    assert [line["round"] for line in read_lines(done.folder / "metrics.jsonl") if "validation" in line] == [2, 4, 6, 8, 10, 12]
    assert done.report["cost"]["rounds"] == 12


def test_the_last_round_is_validated_too_where_it_may_be_the_best(tmp_path: Path):
    config = small_config(PATIENT.model_dump(), {"server": {"rounds": 4}, "evaluation": {"every": 3}})
    done = run(config, tmp_path / "run")
    assert [line["round"] for line in read_lines(done.folder / "metrics.jsonl") if "validation" in line] == [3, 4]
    assert done.report["model"]["round"] == 4 and not done.report["model"]["stopped_early"]


def test_an_average_and_patience_go_together(tmp_path: Path):
    config = small_config(PATIENT.model_dump(), {"server": {"average_from": 3}})
    done = run(config, tmp_path / "run")
    found = read_checkpoint(done.folder / "checkpoints" / done.report["model"]["checkpoint"])
    assert done.report["model"]["average_from"] == 3 and found.state.average_P is not None and done.state.average_P is not None
    assert done.state.average_P.equal(found.state.average_P)
    with pytest.raises(Crash):
        run(config, tmp_path / "crashed", on_progress=crash_at(5))
    assert_is_as_if_never_stopped(resume(tmp_path / "crashed", config), done)


def test_patience_that_was_set_after_the_best_round_is_refused(tmp_path: Path):
    run(with_evaluation(PATIENT, patience=0), tmp_path / "run", should_stop=stop_after(9))
    changed(tmp_path / "run", "patience = 0", "patience = 3")
    with pytest.raises(RunFolderError, match="its best round 4 has no checkpoint; was patience set after it began"):
        resume(tmp_path / "run", PATIENT)


def test_more_patience_for_a_run_that_went_back_to_its_best_round_is_refused(patient: Run, tmp_path: Path):
    shutil.copytree(patient.folder, tmp_path / "run")
    changed(tmp_path / "run", "patience = 3", "patience = 4")
    with pytest.raises(RunFolderError, match="ended after round 10, and is now at its best, 4; start a new one"):
        resume(tmp_path / "run", PATIENT)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"evaluation": {"patience": 2}}, r"\[evaluation\] patience = 2 needs validations between rounds; set every"),
        ({"evaluation": {"patience": 2, "every": 1, "ks": [5]}}, r"looks at NDCG@10, and ks = \[5\] has no 10"),
        ({**PLAN, "evaluation": {"patience": 2, "every": 1}}, r"\[evaluation\] patience would stop where people's held-out events say so.*under a plan set"),
    ],
)
def test_patience_without_anything_to_look_at_or_under_a_plan_is_refused(values: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        check(RunConfig, values, where="run.toml")


# ---- under a plan ----


def public(value: Any) -> Any:
    """What is left of a file when everything for the researcher is cut out."""
    if isinstance(value, dict):
        return {name: public(inner) for name, inner in value.items() if name != "researcher_only"}
    return value


def test_under_a_plan_a_line_tells_nothing_that_was_not_released(private: Run):
    lines = read_lines(private.folder / "metrics.jsonl")
    for line in lines:
        assert public(line).keys() == {"phase", "round", "attempt", "seconds", "users", "epsilon"}
        assert line["users"] == (12 if line["phase"] == "training" else 24)
    hidden = [line["researcher_only"] for line in lines]
    assert hidden[0].keys() == {"loss", "broken_users", "cohort", "upload_bytes", "download_bytes", "refused"}
    assert {"loss", "update_norm", "cohort", "upload_bytes", "validation"} <= hidden[2].keys()
    # The true cohorts differ from the expected one, and are there for the researcher.
    assert [one["cohort"] for one in hidden[2:]] != [12, 12, 12]


def test_under_a_plan_a_report_keeps_what_was_measured_for_the_researcher(private: Run):
    report = json.loads((private.folder / "report.json").read_text())
    assert public(report).keys() == {"data", "cost", "privacy", "model"}
    assert report["researcher_only"].keys() == {"test", "validation", "groups", "beyond_accuracy"}
    assert report["cost"]["users_trained"] == 3 * 12
    # The size of the model, whoever was asked and whatever their histories are.
    assert report["cost"]["upload_bytes_per_user"] == report["cost"]["download_bytes_per_user"] == 4 * private.state.weights_P.numel()
    items = small_dataset().catalogue.num_items
    assert report["cost"]["counts_upload_bytes_per_user"] == 4 * (items + 1 + items**2)


def test_the_reported_epsilon_is_that_of_all_charges_together(private: Run):
    noise = private.report["privacy"]["noise_multiplier"]
    # 2.0 for both sums of the counts together: a twentieth of 1/z^2 to the histogram.
    assert noise == {"popularity": pytest.approx(2.0 * 20**0.5, rel=1e-4), "counts": pytest.approx(2.0 * (20 / 19) ** 0.5, rel=1e-4), "update": 1.0}
    counted = [(1.0, noise["popularity"], 1), (1.0, noise["counts"], 1)]
    assert private.report["privacy"]["epsilon"] == pytest.approx(accounting.epsilon([*counted, (0.5, 1.0, 3)], 1e-3))
    lines = read_lines(private.folder / "metrics.jsonl")
    partial = [accounting.epsilon(counted[:1], 1e-3), *(accounting.epsilon([*counted, (0.5, 1.0, count)], 1e-3) for count in range(4))]
    assert [line["epsilon"] for line in lines] == pytest.approx(partial)


def test_under_a_plan_a_resume_costs_nothing_more_and_ends_with_the_same_bytes(private: Run, tmp_path: Path):
    with pytest.raises(Crash):
        run(PRIVATE.model_copy(update={"system": PRIVATE.system.model_copy(update={"checkpoint_every": 5})}), tmp_path / "run", on_progress=crash_at(3))
    done = resume(tmp_path / "run", PRIVATE)
    assert learned(done.folder) == learned(private.folder)
    assert done.state.charged == {"popularity": 1, "counts": 1, "training": 3}
    assert done.report["privacy"] == private.report["privacy"]


@pytest.mark.parametrize("damage", ["gone", "behind", "changed"])
def test_with_a_ledger_that_is_gone_behind_or_changed_nothing_is_trained_and_nothing_charged(damage: str, tmp_path: Path):
    stopped = run(PRIVATE, tmp_path / "run", should_stop=stop_after(4))
    assert read_checkpoint(list_checkpoints(stopped.folder / "checkpoints")[-1]).state.charged == {"popularity": 1, "counts": 1, "training": 2}
    path = stopped.folder / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    else:
        changed = lines[-1].replace(b'"round":2', b'"round":1')
        path.write_bytes(b"".join(lines[:5]) if damage == "behind" else b"".join([*lines[:-1], changed]))
        assert path.read_bytes() != b"".join(lines)
    before = {file: file.read_bytes() for file in stopped.folder.rglob("*") if file.is_file()}
    with pytest.raises(RunFolderError, match="corrupt" if damage == "changed" else "behind"):
        resume(stopped.folder, PRIVATE)
    assert {file: file.read_bytes() for file in stopped.folder.rglob("*") if file.is_file()} == before


def test_a_resume_that_would_overspend_is_refused_and_releases_nothing(tmp_path: Path):
    stopped = run(PRIVATE, tmp_path / "run", should_stop=stop_after(4))
    ledger = Ledger(stopped.folder / "ledger.jsonl")
    ledger.charge("training", 2)
    before = learned(stopped.folder)
    with pytest.raises(BudgetSpent, match="round 3 would spend epsilon"):
        resume(stopped.folder, PRIVATE)
    assert learned(stopped.folder) == before
    assert Ledger(stopped.folder / "ledger.jsonl").charged() == {"popularity": 1, "counts": 1, "training": 3}
    assert [line["round"] for line in read_lines(stopped.folder / "metrics.jsonl")] == [1, 1, 1, 2]


def test_a_plan_changed_before_the_first_checkpoint_is_refused_too(tmp_path: Path):
    with pytest.raises(Crash):
        run(PRIVATE.model_copy(update={"counts": None}), tmp_path / "run", on_progress=crash_at(1))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    changed(tmp_path / "run", "\nnoise_multiplier = 1.0", "\nnoise_multiplier = 0.9")
    with pytest.raises(RunFolderError, match="charged under another privacy plan"):
        resume(tmp_path / "run", PRIVATE)


def test_keys_are_made_for_their_owner_alone_and_never_copied(tmp_path: Path):
    done = simulate(PRIVATE, out=tmp_path / "run", dataset=small_dataset())
    secrets = list((done.folder / "secrets").iterdir())
    assert sorted(path.name for path in secrets) == ["cohort.key", "noise.key"]
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600} and (done.folder / "secrets").stat().st_mode & 0o777 == 0o700
    keys = [path.read_bytes() for path in secrets]
    for path in done.folder.rglob("*"):
        if path.is_file() and path.parent.name != "secrets":
            raw = path.read_bytes()
            assert not any(key in raw or key.hex().encode() in raw for key in keys)


def test_two_private_runs_of_one_seed_have_other_noise(private: Run, tmp_path: Path):
    other = simulate(PRIVATE, out=tmp_path / "run", dataset=small_dataset())
    assert learned(other.folder)["round-000003/weights.safetensors"] != learned(private.folder)["round-000003/weights.safetensors"]


def test_a_private_run_goes_on_with_its_own_keys_or_not_at_all(tmp_path: Path):
    stopped = simulate(PRIVATE, out=tmp_path / "run", dataset=small_dataset(), should_stop=stop_after(3))
    keys = (stopped.folder / "secrets" / "noise.key").read_bytes()
    assert simulate(resume=stopped.folder, dataset=small_dataset(), should_stop=stop_after(1)).state.round == 2
    assert (stopped.folder / "secrets" / "noise.key").read_bytes() == keys
    shutil.rmtree(stopped.folder / "secrets")
    with pytest.raises(RunFolderError, match="resumes only with its own keys"):
        simulate(resume=stopped.folder, dataset=small_dataset())


def test_a_private_run_killed_before_its_keys_were_made_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killed)
        with pytest.raises(Killed):
            simulate(PRIVATE, out=tmp_path / "run", dataset=small_dataset())
    assert not (tmp_path / "run" / "secrets").exists()
    assert simulate(resume=tmp_path / "run", dataset=small_dataset()).is_finished


@lru_cache(maxsize=1)
def contrastive() -> RunConfig:
    return small_config({"task": [{"name": "next-item"}, {"name": "contrastive", "weight": 0.1, "negatives": 3}], "server": {"rounds": 2}})


def test_the_contrastive_task_is_shown_to_teach_a_lone_user(tmp_path: Path):
    found = run(contrastive(), tmp_path / "run").report["contrast"]
    assert found["nonzero_share"] == 1.0 and found["users"] == 24
    assert 1.0 < found["effective_rank"] <= found["width"] == 8
    assert found["gradient_ratio"] > 0
