"""A run from its folder: recipe, plan and keys from what is there, rounds over a Grid, checkpoints and metrics into it.

The folder begins with ``run.toml`` (the settings) and ``catalogue.jsonl``; this adds ``name``, ``checkpoints/``, ``metrics.jsonl`` and,
under a privacy plan, ``secrets/`` and ``ledger.jsonl``. Called again, it goes on from the newest checkpoint.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedssl.catalogue import read_catalogue
from fedssl.checkpoints import Checkpoint, newest_checkpoint
from fedssl.data.features_file import hash_of, read_features
from fedssl.data.paths import find_path
from fedssl.disk import write_whole
from fedssl.errors import CheckpointError
from fedssl.keeper import Keeper
from fedssl.log_lines import note
from fedssl.privacy.keys import Keys, make_keys, read_keys
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.plan import Plan, make_plan
from fedssl.recipe import make_recipe
from fedssl.round_lines import append_line, cut_back
from fedssl.server_round import State, first_state, phases_of
from fedssl_server.ledger_heads import LedgerHeads
from fedssl_server.nodes import take_nodes
from fedssl_server.rounds import RoundFacts, Run, owners, run_rounds
from fedssl_server.run_settings import read_settings
from fedssl_server.server_folder import HEADS

LOG = logging.getLogger("fedssl.server")
"""What happens in runs, without anything of an upload. Under a plan it does not say who was asked either."""


def serve(
    grid: Grid,
    users_of_node: Mapping[int, NDArray[np.int64]],
    folder: Path,
    *,
    deadline_seconds: float | None = None,
    reconnect_seconds: float = 0.0,
    least_fraction: float = 0.0,
    goes_on: bool = False,
    num_users: int = 0,
    most_users: int = 0,
    ledger_heads: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> State:
    """Run what is left of the run in ``folder`` and return where it stands then.

    ``users_of_node``: the stable numbers of the users each node hosts. ``deadline_seconds``: how long a round waits; None: for all.
    ``reconnect_seconds``, ``least_fraction``, ``goes_on``: of nodes that drop out (`exchange.Patience`, `rounds.Run`).
    ``num_users``, ``most_users``: whom the run takes (`nodes.take_nodes`). ``ledger_heads``: the file of nodes' ledgers' heads, which outlives a run;
    None: one in ``folder``.

    Guarantees:
      - stopped at any moment and called again, the weights are those of a run that was never stopped (without a plan, or
        where the same nodes answer);
      - a checkpoint every ``[system] checkpoint_every`` rounds or ``checkpoint_seconds``, whichever is first, after the last
        round, and under a plan after each.

    Raises RunFolderError or CheckpointError where the folder is not one run's; ConfigError for its settings; WireError where no node is left.
    """
    config, catalogue = read_settings(folder / "run.toml"), read_catalogue(folder / "catalogue.jsonl")
    taken, left_out = take_nodes(users_of_node, num_users=num_users, most_users=most_users)
    for node, why in left_out.items():
        print(f"node {node} is left out: {why}", flush=True)
        note(LOG, "node left out", node=node)
    num_users = num_users or 1 + max(int(users[-1]) for users in taken.values())
    node_ids, owner_U = owners(taken, num_users)
    plan = make_plan(config.privacy, config.server, config.counts, num_users, local=config.local)
    central = None if config.privacy.is_local else plan
    told = plan.told_to_nodes(config.privacy) if plan is not None else None
    features = read_features(find_path(config.data.features), catalogue) if config.data.features else None
    recipe = make_recipe(config, num_items=catalogue.num_items, catalogue=catalogue.hash, privacy=told, features=hash_of(features))
    begin = newest_checkpoint(folder / "checkpoints") or Checkpoint(first_state(recipe, features), recipe, catalogue, _name(folder), "")
    if begin.recipe.hash != recipe.hash:
        raise CheckpointError(f"{folder / 'checkpoints'}: made by another recipe than run.toml gives now; undo the change, or begin another folder")
    keys, ledger = _open_secrets(folder, central, begin.state)
    waits = (deadline_seconds, reconnect_seconds, least_fraction, goes_on, LedgerHeads(ledger_heads or folder / HEADS))
    run = Run(begin.run, recipe, num_users, node_ids, owner_U, central, keys, ledger, *waits)
    phases = phases_of(recipe, catalogue)
    promised = {} if plan is None else {"epsilon": plan.promised, "delta": plan.delta}
    note(LOG, "run begins", run=run.id, recipe=recipe.hash, after=begin.state.phase, round=begin.state.round, nodes=len(taken), users=num_users, **promised)
    lines, keeper = folder / "metrics.jsonl", Keeper(folder, begin, config.system)
    cut_back(lines, phase=begin.state.phase, round=begin.state.round, phases=[phase.name for phase in phases])

    def on_round(state: State, facts: RoundFacts) -> None:
        line: dict[str, Any] = {"phase": facts.phase, "round": facts.round, "attempt": facts.attempt, "seconds": round(facts.seconds, 3)}
        if facts.clip_norm is not None:
            line["clip_norm"] = facts.clip_norm
        if not facts.is_applied:
            line["is_applied"] = False
        if facts.evaluation is not None:
            line["evaluation"] = facts.evaluation
        # Who was asked, and so how much was sent and who did not answer, is the secret that amplification by sampling rests on.
        seen = {
            "users": facts.users,
            "loss": facts.loss,
            "nodes": facts.nodes,
            "nodes_used": facts.nodes_used,
            "upload_bytes": facts.upload_bytes,
            "download_bytes": facts.download_bytes,
            "refused": {str(node): why for node, why in facts.refused.items()},
            "refused_for": dict(facts.refused_for),
        }
        line |= seen if plan is None else {"epsilon": plan.epsilon(state.charged), "researcher_only": seen}
        append_line(lines, line)
        told = {name: line[name] for name in ("phase", "round", "attempt", "seconds", "epsilon", "nodes", "nodes_used", "refused_for") if name in line}
        note(LOG, "round", is_applied=facts.is_applied, **told)
        if facts.evaluation is not None:
            note(LOG, "evaluation", round=facts.round, **{name: facts.evaluation[name] for name in ("users", "nodes", "nodes_used", "refused_for")})
        more = f", loss {facts.loss}, {len(facts.refused)} nodes refused" if plan is None else ""
        few = "" if facts.is_applied else f", NOT APPLIED: {facts.nodes_used} of {facts.nodes} nodes, and least_fraction is {least_fraction:g}"
        print(f"{facts.phase} round {facts.round}: {facts.seconds:.1f} s{more}{few}", flush=True)
        # Under a plan a round that must be repeated is charged again, because a deployment does not repeat exactly: keep each.
        if plan is not None or keeper.is_due(state):
            keeper.keep(state)

    state = run_rounds(grid, run, begin.state, on_round=on_round, should_stop=should_stop, settled=lambda: keeper.settled, phases=phases)
    keeper.keep(state)
    note(LOG, "run ends", run=run.id, phase=state.phase, round=state.round)
    return state


def _name(folder: Path) -> str:
    """The run's name, drawn once: a device is charged a run's whole promise by its name, also where a crash comes before the first checkpoint."""
    path = folder / "name"
    if not path.exists():
        write_whole(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")


def _open_secrets(folder: Path, plan: Plan | None, state: State) -> tuple[Keys | None, Ledger | None]:
    """Keys and ledger of a run under a plan, made where it has not begun; None without a plan."""
    if plan is None:
        return None, None
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.check_not_behind(state.charged)
    has_begun = bool(state.phase or ledger.charged())
    keys = read_keys(folder) if has_begun or (folder / "secrets").exists() else make_keys(folder)
    ledger.bind(plan.fingerprint)
    return keys, ledger
