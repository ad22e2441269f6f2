"""What a run says of itself: a line a round in metrics.jsonl, and report.json in the end."""

from __future__ import annotations

import math
import resource
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from fedssl_server.rounds import RoundFacts

from fedssl.client_round import Shard
from fedssl.collapse import Spread
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset
from fedssl.evaluation import Ranks, evaluate
from fedssl.parts import make_parts
from fedssl.privacy.manifest import declared_sums
from fedssl.privacy.plan import Plan
from fedssl.recipe import Recipe
from fedssl.recommender import Recommender
from fedssl.round_lines import read_lines
from fedssl.server_round import State

LIST_LENGTH = 10
"""How many recommendations of each user the report looks at beyond accuracy."""


def make_report(folder: Path, config: RunConfig, dataset: Dataset, rounds: int, recipe: Recipe, model: Recommender) -> dict[str, Any]:
    """report.json of a finished run: test and validation over all users, groups, what is recommended, cost."""
    histories = dataset.histories
    ks, num_items = config.evaluation.ks, dataset.catalogue.num_items
    ranks: dict[str, Ranks] = {
        "test": evaluate(model, histories, "test", ks=ks, list_length=LIST_LENGTH),
        "validation": evaluate(model, histories, "validation", ks=ks),
    }
    lines = read_lines(folder / "metrics.jsonl")
    trained = sum(line["users"] for line in lines if line["phase"] == "training")
    seconds = sum(line["seconds"] for line in lines)
    num_weights = make_parts(recipe).layout.num_weights
    scalars = 0 if config.privacy.has_plan else 16
    return {
        "data": {
            "users": histories.num_users,
            "items": num_items,
            "events": histories.num_events,
            "fingerprint": histories.fingerprint,
        },
        "test": ranks["test"].summary(),
        "validation": ranks["validation"].summary(),
        "groups": ranks["test"].groups(histories),
        "beyond_accuracy": {"list_length": LIST_LENGTH, **ranks["test"].beyond_accuracy(histories, num_items)},
        "cost": {
            "rounds": rounds,
            "users_trained": trained,
            "seconds": seconds,
            "users_per_second": trained / seconds if seconds else 0.0,
            # What a device of one user sends and receives in a training round; a shard of many sends one sum for all of them.
            "upload_bytes_per_user": 4 * num_weights + scalars if recipe.server.rounds else 0,
            "download_bytes_per_user": 4 * num_weights if recipe.server.rounds else 0,
            **_counts_cost(recipe),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    }


def _counts_cost(recipe: Recipe) -> dict[str, int]:
    """What a device of one user sends once to be counted, where that does not depend on its history: under a plan."""
    if recipe.counts is None or not recipe.privacy.has_plan:
        return {}
    cells = (declared_sums(recipe, name, num_weights=0)[name].shape for name in ("popularity", "counts"))
    return {"counts_upload_bytes_per_user": 4 * sum(math.prod(shape) for shape in cells)}


def clip_rule(recipe: Recipe, state: State) -> dict[str, str]:
    """In words, how the clip came about where it was adaptive."""
    if state.clip_norm is None:
        return {}
    privacy = recipe.privacy
    rule = f"adaptive: begins at {privacy.clip_norm:g} and follows the {privacy.clip_quantile:g} quantile of the norms, by the noised number of those within it"
    return {"clip_rule": f"{rule}; after the last round it is {state.clip_norm:.4g}"}


def opacus_beside(plan: Plan, state: State) -> dict[str, float]:
    """Opacus' own epsilon of the same steps, where it is installed: a simulation of single steps trains without it."""
    if find_spec("opacus") is None:
        return {}
    from fedssl.privacy.dp_sgd import opacus_epsilon

    return {"epsilon_by_opacus_rdp": opacus_epsilon(plan.window_events(state.round), plan.delta, bound="rdp")}


def metrics_line(
    facts: RoundFacts,
    shards: dict[int, Shard],
    validation: dict[str, Any] | None,
    epsilon: float | None,
    encodings: Spread | None,
    *,
    plan_cohort: float | None,
    fleet_users: int,
) -> dict[str, Any]:
    """A round as one JSON object; under a plan what was not released through it is for the researcher only."""
    norms = np.concatenate([shard.notes.norms_U for shard in shards.values()]) if facts.phase == "training" else np.zeros(0)
    losses = np.concatenate([shard.notes.losses_U for shard in shards.values()]) if facts.phase == "training" else np.zeros(0)
    norms, losses = norms[np.isfinite(norms)], losses[np.isfinite(losses)]
    seen: dict[str, Any] = {"loss": facts.loss if facts.loss is not None else (float(losses.mean()) if len(losses) else None)}
    if len(norms):
        seen["update_norm"] = {f"{q:g}": float(np.quantile(norms, q)) for q in (0.1, 0.5, 0.9)}
    seen["broken_users"] = sum(shard.notes.broken_users for shard in shards.values())
    if validation is not None:
        seen["validation"] = validation
    if facts.evaluation is not None:
        seen["evaluation"] = facts.evaluation
    if encodings is not None:
        seen["encodings"] = {**encodings._asdict(), "is_collapsed": encodings.is_collapsed}
    line: dict[str, Any] = {"phase": facts.phase, "round": facts.round, "attempt": facts.attempt, "seconds": round(facts.seconds, 6)}
    if fleet_users:
        line["fleet_users"] = fleet_users
    if facts.clip_norm is not None:
        line["clip_norm"] = facts.clip_norm
    line["users"] = facts.users if plan_cohort is None else plan_cohort
    # Bytes depend on who was asked, and those of sparse counts on the histories: not released through the plan.
    seen |= {"upload_bytes": facts.upload_bytes, "download_bytes": facts.download_bytes, "refused": len(facts.refused)}
    if epsilon is not None:
        return {**line, "epsilon": epsilon, "researcher_only": {**seen, "cohort": facts.users}}
    return {**line, **seen}
