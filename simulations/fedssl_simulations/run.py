"""The main job: train with every user on this machine, and leave a run folder behind.

`simulate` wires the same parts as a deployment: the server's loop of rounds over a Grid, here one inside this process,
and nodes that each host a shard of the users.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
from fedssl_server.rounds import RoundFacts, owners, run_rounds
from fedssl_server.rounds import Run as ServerRun
from numpy.typing import NDArray

import fedssl
from fedssl import seeds
from fedssl.checkpoints import Checkpoint, name_of, name_of_round, newest_checkpoint, read_checkpoint, tidy_checkpoints
from fedssl.client_round import Notes
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset, load_dataset
from fedssl.data.features_file import hash_of
from fedssl.data.histories import Histories
from fedssl.disk import write_whole
from fedssl.errors import CatalogueMismatch, ConfigError, RunFolderError
from fedssl.evaluation import evaluate
from fedssl.keeper import Keeper
from fedssl.privacy.keys import Keys, make_keys, read_keys
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.plan import make_plan
from fedssl.recipe import Recipe, make_recipe
from fedssl.recommender import Recommender
from fedssl.round_lines import append_line, cut_back, read_lines
from fedssl.server_round import State, first_state, phases_of
from fedssl.transfer import carried_over
from fedssl.workers import Workers
from fedssl_simulations.diagnostics import contrast_facts, spread_now
from fedssl_simulations.early_stop import Validations, best_round, is_over, validations
from fedssl_simulations.grids import InProcessGrid, handler_of
from fedssl_simulations.run_files import read_written_run, write_run
from fedssl_simulations.run_folder import claim
from fedssl_simulations.run_report import clip_rule, make_report, metrics_line, opacus_beside
from fedssl_simulations.simulated_nodes import check_devices_not_behind, give_devices, heads_of, make_shards, take_back_heads

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Progress:
    """Told after every round."""

    facts: RoundFacts
    rounds: int
    validation: dict[str, Any] | None
    epsilon: float | None
    fleet_users: int = 0


@dataclass(frozen=True)
class Run:
    """What a simulation leaves. ``is_finished`` is False where it was stopped and can be resumed.

    ``state``, ``model``, ``report`` and heads are those of the last round; of a finished run with `[evaluation] patience` of the
    round whose validation was the best.
    """

    folder: Path
    config: RunConfig
    dataset: Dataset
    state: State
    recipe: Recipe
    report: dict[str, Any]
    model: Recommender
    is_finished: bool

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl as a table, a row a round, nested names joined by dots."""
        import pandas as pd

        return pd.json_normalize(read_lines(self.folder / "metrics.jsonl"))


def simulate(
    config: RunConfig | None = None,
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    dataset: Dataset | None = None,
    keys: Keys | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Train, evaluate and report; everything under ``out``. Or go on with the run in ``resume`` from its last checkpoint.

    ``dataset``: histories already in memory, instead of `[data] path`. ``keys``: known ones, for tests alone: their noise
    protects nobody. ``should_stop`` is asked before every round; then a checkpoint is left.

    Guarantee: killed at any moment and resumed, a run ends with the same bytes of weights, heads and counts.
    Raises FedSSLError where a person must act.
    """
    if resume is not None:
        folder = Path(resume)
        with claim(folder, resume=True):
            config, about = read_written_run(folder / "run.toml")
            return _simulate(folder, config, about, dataset or load_dataset(config.data), keys, on_progress, should_stop)
    assert config is not None, "a run needs a config, or a folder to resume"
    dataset = dataset or load_dataset(config.data)
    folder = Path(out) if out is not None else Path("runs") / f"{config.preset or Path(config.data.path or 'run').name.split('.')[0]}-seed{config.seed}"
    with claim(folder, resume=False):
        return _simulate(folder, config, {}, dataset, keys, on_progress, should_stop)


def _simulate(
    folder: Path,
    config: RunConfig,
    about: dict[str, Any],
    dataset: Dataset,
    keys: Keys | None,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> Run:
    histories = dataset.histories
    plan = make_plan(config.privacy, config.server, config.counts, histories.num_users, local=config.local)
    is_local = config.privacy.is_local
    told = plan.told_to_nodes(config.privacy) if plan is not None else None
    recipe = make_recipe(config, num_items=dataset.catalogue.num_items, catalogue=dataset.catalogue.hash, privacy=told, features=hash_of(dataset.features))
    phases = phases_of(recipe, dataset.catalogue)
    _check_same_data(folder, about, dataset)
    state = _last_state(folder, recipe, dataset) or _first_state(config, recipe, dataset)
    # A run that cannot begin leaves no folder that says so; from here on, whatever happens, it is one that can be resumed.
    if not about:
        about = {"run": uuid4().hex, "fingerprint": histories.fingerprint, "catalogue": dataset.catalogue.hash, **versions()}
        write_run(config, folder / "run.toml", **about)
    ledger = Ledger(folder / "ledger.jsonl") if plan is not None and not is_local else None
    if ledger is not None:
        ledger.check_not_behind(state.charged)
    if plan is None:
        keys = None
    elif keys is None:
        # Keys are made before anything is charged; a run that was charged goes on with its own or not at all.
        has_begun = bool(state.phase or (ledger is not None and ledger.charged()))
        keys = read_keys(folder) if has_begun or (folder / "secrets").exists() else make_keys(folder)
    cut_back(folder / "metrics.jsonl", phase=state.phase, round=state.round, phases=[phase.name for phase in phases])
    patience = config.evaluation.patience
    seen = validations(read_lines(folder / "metrics.jsonl")) if patience else []

    pool = Workers(config.system.workers)
    shards = make_shards(dataset, config, folder / "heads", pool)
    nodes: dict[int, dict[str, bool | float | int | str]] = {index + 1: {"partition-id": index} for index in shards}
    node_ids, owner_U = owners({index + 1: shard.users for index, shard in shards.items()}, histories.num_users)
    run = ServerRun(about["run"], recipe, histories.num_users, node_ids, owner_U, *((None, None) if is_local else (plan, keys)), ledger)
    if is_local and keys is not None:
        give_devices(shards, folder / "devices", keys, may_be_new=not state.phase)
        check_devices_not_behind(shards, recipe, histories.num_users, state.charged.get("training", 0))
    rounds = {phase.name: phase.rounds for phase in phases}
    keeper = Keeper(folder, Checkpoint(state, recipe, dataset.catalogue, about["run"], about["fingerprint"]), config.system)
    trained = state.round if state.phase == "training" else 0
    if patience:
        _check_best_is_here(folder, state, seen, patience, is_last=trained == rounds.get("training", 0))

    def is_enough() -> bool:
        return is_over(seen, patience) or should_stop()

    # What rounds beyond the checkpoint did to heads is taken back now, not when their node is next asked.
    take_back_heads(shards, recipe, after=trained, settled=keeper.settled)

    @cache
    def sample() -> NDArray[np.int64]:
        return _sample(config, histories)

    def save(state: State) -> None:
        for shard in shards.values():
            store = shard.heads(recipe)
            if store is not None:
                store.flush()
        # The run may end at its best round: that checkpoint stays, and with it the way back of heads.
        keeper.keep(state, best=best_round(seen))

    def on_round(state: State, facts: RoundFacts) -> None:
        validation = None
        is_last = facts.phase == phases[-1].name and facts.round == rounds[facts.phase]
        every = config.evaluation.every if facts.phase == "training" else 0
        # All users are validated after the last round; but rounds are compared by the same users.
        if every and ((facts.round % every == 0 and not is_last) or (is_last and patience)):
            model = Recommender(recipe, state.released(recipe), state.counts, heads=heads_of(shards, recipe))
            validation = evaluate(model, histories, "validation", users=sample(), ks=config.evaluation.ks).summary()
            if patience:
                seen.append((facts.round, validation["unseen"]["ndcg@10"]))
        is_looked_at = facts.phase == "training" and (is_last or (every and facts.round % every == 0))
        encodings = spread_now(recipe, state.released(recipe), histories, sample()) if is_looked_at else None
        epsilon = plan.epsilon(state.charged) if plan is not None else None
        append_line(
            folder / "metrics.jsonl",
            metrics_line(
                facts,
                shards,
                validation,
                epsilon,
                encodings,
                plan_cohort=None if plan is None else plan.expected_cohort(facts.phase) if facts.phase != "distillation" else 0.0,
                fleet_users=config.privacy.fleet_users,
            ),
        )
        for shard in shards.values():
            # A node that is not asked next time must not be noted down again.
            shard.notes = Notes()
        is_turn = validation is not None and (best_round(seen) == facts.round or is_over(seen, patience))
        if is_last or is_turn or keeper.is_due(state):
            save(state)
        on_progress(Progress(facts, rounds[facts.phase], validation, epsilon, config.privacy.fleet_users))

    with pool, InProcessGrid(handler_of(shards), nodes) as grid:
        state = run_rounds(grid, run, state, on_round=on_round, should_stop=is_enough, settled=lambda: keeper.settled, phases=phases)
    is_finished = (state.phase, state.round) == (phases[-1].name, phases[-1].rounds) or is_over(seen, patience)
    rounds_run = state.round if state.phase == "training" else 0
    if is_finished and seen and best_round(seen) != state.round:
        state = read_checkpoint(folder / "checkpoints" / name_of_round(best_round(seen))).state
        take_back_heads(shards, recipe, after=state.round, settled=state.round)
    model = Recommender(recipe, state.released(recipe), state.counts, heads=heads_of(shards, recipe))
    if not is_finished:
        save(state)
        return Run(folder, config, dataset, state, recipe, {}, model, False)
    # A process that was killed after the last checkpoint has not removed the one before.
    tidy_checkpoints(folder / "checkpoints", state, keep=config.system.keep_checkpoints, best=best_round(seen))
    report = make_report(folder, config, dataset, rounds_run, recipe, model)
    report["model"] = {
        "checkpoint": name_of(state),
        "round": state.round,
        "average_from": recipe.server.average_from if state.average_P is not None else None,
        "stopped_early": rounds_run < rounds.get("training", 0),
    }
    report["privacy"] = {**plan.statement(), **clip_rule(recipe, state), "epsilon": plan.epsilon(state.charged)} if plan is not None else None
    if plan is not None and plan.is_by_window:
        report["privacy"] |= opacus_beside(plan, state)
    contrast = contrast_facts(recipe, state.released(recipe), histories)
    if contrast is not None:
        report["contrast"] = contrast
    if plan is not None:
        hidden = {name: report.pop(name) for name in ("test", "validation", "groups", "beyond_accuracy", "contrast") if name in report}
        report["researcher_only"] = hidden
    write_whole(folder / "report.json", json.dumps(report, indent=1))
    return Run(folder, config, dataset, state, recipe, report, model, True)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on beside its settings."""
    return {"fedssl": fedssl.__version__, "torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()}


def _check_same_data(folder: Path, about: dict[str, Any], dataset: Dataset) -> None:
    if about and about["catalogue"] != dataset.catalogue.hash:
        raise CatalogueMismatch(f"{folder}: the run was made with another catalogue; resume with the data set it began with")
    if about and about["fingerprint"] != dataset.histories.fingerprint:
        raise RunFolderError(f"{folder}: the histories have changed since this run began; resume with the data set it began with, or start a new run")


def _check_best_is_here(folder: Path, state: State, seen: Validations, patience: int, *, is_last: bool) -> None:
    """A run whose patience was changed after it began may have nothing to go back to, or have gone back already."""
    best = best_round(seen)
    if best and not (folder / "checkpoints" / name_of_round(best)).exists():
        raise RunFolderError(f"{folder}: its best round {best} has no checkpoint; was patience set after it began? Set it back, or start a new run")
    if (folder / "report.json").exists() and not is_last and not is_over(seen, patience):
        raise RunFolderError(f"{folder}: this run ended after round {state.round}, and is now at its best, {best}; start a new one for more patience")


def _last_state(folder: Path, recipe: Recipe, dataset: Dataset) -> State | None:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is not None and checkpoint.recipe.hash != recipe.hash:
        raise RunFolderError(f"{folder}: its checkpoint was made with other settings than run.toml has; run.toml was changed, put it back or start a new run")
    return checkpoint.state if checkpoint is not None else None


def _first_state(config: RunConfig, recipe: Recipe, dataset: Dataset) -> State:
    """Where a run begins: from nothing, or from the checkpoint that it names."""
    if not config.start:
        return first_state(recipe, dataset.features)
    old = read_checkpoint(Path(config.start))
    if recipe.privacy.has_plan and old.fingerprint == dataset.histories.fingerprint:
        raise ConfigError(
            f"start = '{config.start}': it was taught by the very histories that [privacy] is to protect, and no epsilon here would count that; "
            "begin from nothing, or from a checkpoint of other people"
        )
    return carried_over(old, recipe, dataset.catalogue, dataset.features)


def _sample(config: RunConfig, histories: Histories) -> NDArray[np.int64]:
    """The fixed random set of users for a validation between rounds; with a split by time of those who have a target."""
    pool = np.arange(histories.num_users) if histories.held_from is None else np.flatnonzero(histories.target_places("validation") >= 0)
    if config.evaluation.users == 0 or config.evaluation.users >= len(pool):
        return pool
    draw = seeds.uniform(np.array([seeds.key(config.seed, "validation users")], dtype=np.uint64), len(pool))[0]
    return np.sort(pool[np.argsort(draw, kind="stable")[: config.evaluation.users]])
