"""The loop of rounds over a Flower Grid: draw the cohort, send, fold each reply as it arrives, release.

The same loop in simulation and in deployment; what differs is the Grid. The server's memory does not grow with the cohort:
a reply is added and dropped. Everything is keyed, so a resumed run repeats the rounds it lost.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedssl import heap
from fedssl.counts import Counts
from fedssl.device_evaluation import metrics_of, model_tensors
from fedssl.errors import AllUploadsRefused, ConfigError, TooFewUploads, WireError
from fedssl.privacy.keys import Keys, cohort_by_coins, cohort_of_pass, draw_cohort, users_per_round
from fedssl.privacy.ledger import Ledger, begin_attempt, hmac_of_totals, may_draw_noise, new_attempt
from fedssl.privacy.manifest import LOSS_STEP, WEIGHT_STEP, declared_sums
from fedssl.privacy.plan import Plan
from fedssl.recipe import Recipe
from fedssl.records import Address, Download
from fedssl.server_round import Release, ServerPhase, State, Totals, phases_of, totals_of
from fedssl_server.exchange import Asked, Patience, ask
from fedssl_server.ledger_heads import LedgerHeads


@dataclass(frozen=True)
class Run:
    """What does not change while rounds go on. ``plan``, ``keys`` and ``ledger`` go together, or are all None: where users add their own noise too.

    ``owner_U``: for each user number the index in ``node_ids`` of the node that hosts them, -1 for none. ``least_fraction``: a round is not
    applied where fewer of the nodes that were asked sent what could be used; the run then ends or, in training, goes on where ``goes_on``.
    Under a plan whose noise the server adds it is 0: whether a round counts would say who took part.
    """

    id: str
    recipe: Recipe
    num_users: int
    node_ids: tuple[int, ...]
    owner_U: NDArray[np.int32]
    plan: Plan | None = None
    keys: Keys | None = field(default=None, repr=False)
    ledger: Ledger | None = None
    deadline_seconds: float | None = None
    reconnect_seconds: float = 0.0
    least_fraction: float = 0.0
    goes_on: bool = False
    ledger_heads: LedgerHeads | None = None

    @cached_property
    def hosts_one(self) -> NDArray[np.bool_]:
        """Which nodes host one user. Shape: (nodes,)."""
        is_one: NDArray[np.bool_] = np.bincount(self.owner_U[self.owner_U >= 0], minlength=len(self.node_ids)) == 1
        return is_one


@dataclass(frozen=True)
class RoundFacts:
    """What is known of a finished round. ``seconds``: the whole round; ``waited``: of those, without a reply to fold.

    ``users``: how many were asked (under a plan that number is private). ``loss``: mean over users, where it was declared.
    ``clip_norm``: the round's, where it is adaptive. ``answered``: users who were asked by nodes whose uploads were added.
    ``refused_for``: how many answers were refused, or missed, by kind (`admission`). ``nodes``: how many were asked; ``nodes_used``: whose
    uploads were added; ``is_applied``: whether these were enough. ``evaluation``: what nodes said of the new model, where the recipe asks for it.
    """

    phase: str
    round: int
    attempt: int
    users: int
    seconds: float
    waited: float
    upload_bytes: int
    download_bytes: int
    refused: Mapping[int, str]
    loss: float | None
    weight: float | None
    clip_norm: float | None = None
    answered: int = 0
    refused_for: Mapping[str, int] = field(default_factory=dict)
    nodes: int = 0
    nodes_used: int = 0
    is_applied: bool = True
    evaluation: Mapping[str, Any] | None = None


def owners(users_of_node: Mapping[int, NDArray[np.int64]], num_users: int) -> tuple[tuple[int, ...], NDArray[np.int32]]:
    """``node_ids`` and ``owner_U`` of a Run. Nodes are ordered by their first user. Raises WireError when two host one user."""
    node_ids = tuple(sorted(users_of_node, key=lambda node: (int(users_of_node[node].min(initial=num_users)), node)))
    owner = np.full(num_users, -1, dtype=np.int32)
    for index, node in enumerate(node_ids):
        users = users_of_node[node]
        if len(users) and (users.min() < 0 or users.max() >= num_users):
            raise WireError(f"node {node} hosts user numbers up to {users.max()}, the run has {num_users} users; check that its store belongs to this run")
        taken = owner[users] >= 0
        if taken.any():
            raise WireError(f"node {node} hosts user {users[taken][0]}, whom node {node_ids[owner[users[taken][0]]]} hosts too; a user lives on one node")
        owner[users] = index
    return node_ids, owner


def run_rounds(
    grid: Grid,
    run: Run,
    state: State,
    *,
    on_round: Callable[[State, RoundFacts], None],
    should_stop: Callable[[], bool] = lambda: False,
    settled: Callable[[], int] = lambda: 0,
    phases: Sequence[ServerPhase] | None = None,
) -> State:
    """Run what is left of a run after ``state``, and return where it stands then.

    ``on_round`` is called after each round with the new state; ``should_stop`` is asked before each; ``settled`` is the
    newest training round that a durable checkpoint holds.

    Guarantees:
      - a round is charged before its cohort is drawn, and its totals are sealed before noise is drawn;
      - the same state for any order of replies and any number of nodes.

    Raises BudgetSpent before a round that would break the promise, AllUploadsRefused when nothing could be used, TooFewUploads when too little was.
    """
    phases = phases if phases is not None else phases_of(run.recipe)
    if run.plan is not None and run.least_fraction:
        raise ConfigError("[rounds] least_fraction: under a privacy plan whether a round counts would say who took part, without noise; set it to 0")
    for phase in phases:
        if run.plan is not None and phase.exchanges > 1:
            raise ConfigError(f"phase '{phase.name}' has {phase.exchanges} exchanges; under a plan only the last one's sums are noised, so only one may be")
    names = [phase.name for phase in phases]
    begin = names.index(state.phase) if state.phase in names else 0
    for phase in phases[begin:]:
        first = state.round + 1 if state.phase == phase.name else 1
        for number in range(first, phase.rounds + 1):
            if should_stop():
                return state
            state, facts = _round(grid, run, state, phase, number, settled())
            if _is_evaluated(run.recipe, phase, number, is_last=phase is phases[-1] and number == phase.rounds):
                facts = replace(facts, evaluation=_evaluate(grid, run, state, settled()))
            on_round(state, facts)
        heap.give_back()  # counts take much and keep little
    return state


def _round(grid: Grid, run: Run, state: State, phase: ServerPhase, number: int, settled: int) -> tuple[State, RoundFacts]:
    began = time.perf_counter()
    if not phase.exchanges:
        # Nobody is asked anything, so nothing is charged.
        state = phase.finish(state, {}, Release(phase.name, number))
        return state, RoundFacts(phase.name, number, 0, 0, time.perf_counter() - began, 0.0, 0, 0, {}, None, None)
    while True:
        attempt = 0
        if run.plan is not None:
            assert run.ledger is not None
            attempt, _ = begin_attempt(run.ledger, phase.name, number, plan=run.plan)
        cohort = _cohort(run, phase, number, attempt)
        totals, facts = _exchanges(grid, run, state, phase, Address(run.id, phase.name, number, attempt), cohort, settled)
        if run.plan is None:
            break
        assert run.ledger is not None
        assert run.keys is not None
        if may_draw_noise(run.ledger, phase.name, number, attempt, hmac_of_totals(run.keys.noise, totals)):
            break
        new_attempt(run.ledger, phase.name, number, plan=run.plan)
    release = Release(phase.name, number, attempt, run.plan, run.keys.noise if run.keys is not None else None, facts.answered)
    if facts.nodes_used < run.least_fraction * facts.nodes:
        _check_may_go_on(run, phase, facts)
        state, facts = replace(state, phase=phase.name, round=number), replace(facts, is_applied=False)
    else:
        state = phase.finish(state, totals, release)
    if run.ledger is not None:
        state = replace(state, charged=run.ledger.charged())
    elif run.recipe.privacy.is_local:
        state = replace(state, charged={**state.charged, phase.name: number})
    return state, replace(facts, seconds=time.perf_counter() - began)


def _cohort(run: Run, phase: ServerPhase, number: int, attempt: int) -> NDArray[np.int64]:
    """Who takes part: everybody in a counts phase; else by the plan's secret coins, or by the recipe's seed."""
    server = run.recipe.server
    if run.plan is not None:
        assert run.keys is not None
        rate = run.plan.phase(phase.name).rate
        return draw_cohort(run.keys.cohort, phase.name, number, attempt, run.num_users, rate)
    if phase.name == "counts":
        return np.arange(run.num_users)
    if server.sampling == "passes":
        return cohort_of_pass(run.recipe.seed, users_per_round(server.cohort, run.num_users), run.num_users, number)
    return cohort_by_coins(run.recipe.seed, min(server.cohort / run.num_users, 1.0), run.num_users, number, phase.name)


def _exchanges(grid: Grid, run: Run, state: State, phase: ServerPhase, address: Address, cohort: NDArray[np.int64], settled: int) -> tuple[Totals, RoundFacts]:
    """All exchanges of a round: the totals of the last one, and what is known of the round."""
    chosen: dict[int, NDArray[np.int64]] = {}
    owner = run.owner_U[cohort]
    for index, node in enumerate(run.node_ids):
        mine = cohort[owner == index]
        if len(mine):
            chosen[node] = mine
    totals: Totals = {}
    tensors = phase.tensors(state)
    waited, up, down, nodes = 0.0, 0, 0, len(chosen)
    refused: dict[int, str] = {}
    kinds: Counter[str] = Counter()
    places = {node: index for index, node in enumerate(run.node_ids)}
    patience = Patience(run.deadline_seconds, run.reconnect_seconds)
    for exchange in range(phase.exchanges):
        if exchange:
            tensors = phase.middle(state, totals, exchange - 1)
        download = Download(replace(address, exchange=exchange), run.recipe, tensors, None, settled, state.clip_norm)
        asked = {node: Asked(None if run.hosts_one[places[node]] else users, len(users)) for node, users in chosen.items()}
        answers = ask(grid, download, asked, phase.declared(state, exchange), patience, heads=run.ledger_heads)
        down += sum(array.nbytes for array in tensors.values()) * len(asked)
        waited, up = waited + answers.waited, up + answers.upload_bytes
        refused |= answers.refused
        kinds += answers.kinds
        totals = totals_of(answers.sums)
        if chosen and not totals:
            node, why = next(iter(refused.items()))
            raise AllUploadsRefused(
                f"{address.phase} round {address.round}: none of {len(chosen)} nodes sent anything that could be used; node {node}: {why}. see its log"
            )
        chosen = {node: users for node, users in chosen.items() if node not in refused}
    weight = _scalar(totals, "weight", WEIGHT_STEP)
    loss = _scalar(totals, "loss", LOSS_STEP)
    return totals, RoundFacts(
        phase=address.phase,
        round=address.round,
        attempt=address.attempt,
        users=len(cohort),
        seconds=0.0,
        waited=waited,
        upload_bytes=up,
        download_bytes=down,
        refused=refused,
        loss=loss / weight if loss is not None and weight else None,
        weight=weight,
        clip_norm=state.clip_norm if address.phase == "training" else None,
        answered=sum(len(users) for users in chosen.values()),
        refused_for=dict(kinds),
        nodes=nodes,
        nodes_used=len(chosen),
    )


def _check_may_go_on(run: Run, phase: ServerPhase, facts: RoundFacts) -> None:
    """Raises TooFewUploads where a round that is not applied ends the run. No later round makes up for one of counts."""
    if run.goes_on and phase.name == "training":
        return
    why = "; ".join(f"node {node}: {words}" for node, words in list(facts.refused.items())[:3])
    raise TooFewUploads(
        f"{facts.phase} round {facts.round}: {facts.nodes_used} of {facts.nodes} nodes sent what could be used, and [rounds] least_fraction is "
        f"{run.least_fraction:g}; the round is not applied. {why}. Go on once more nodes are there; it is then asked for again"
    )


def _is_evaluated(recipe: Recipe, phase: ServerPhase, number: int, *, is_last: bool) -> bool:
    if recipe.evaluation is None:
        return False
    return is_last or (phase.name == "training" and number % recipe.evaluation.every == 0)


def _evaluate(grid: Grid, run: Run, state: State, settled: int) -> dict[str, Any]:
    """What all nodes together say of a model: means over their users, and of how many nodes. Nodes that do not answer change nothing else."""
    recipe = run.recipe
    assert recipe.evaluation is not None and (state.counts is None or isinstance(state.counts, Counts))
    tensors = model_tensors(state.released(recipe), state.counts)
    # Rounds of training are what heads are kept by.
    download = Download(Address(run.id, "evaluation", state.round if state.phase == "training" else 0), recipe, tensors, None, settled)
    users_N = np.bincount(run.owner_U[run.owner_U >= 0], minlength=len(run.node_ids)).tolist()
    asked = {node: Asked(None, users) for node, users in zip(run.node_ids, users_N, strict=True) if users}
    declared = declared_sums(recipe, "evaluation", num_weights=0)
    answers = ask(grid, download, asked, declared, Patience(run.deadline_seconds, run.reconnect_seconds), heads=run.ledger_heads, kind="evaluate")
    found = metrics_of(totals_of(answers.sums), recipe.evaluation.ks)
    return {**found, "nodes": len(asked), "nodes_used": len(asked) - len(answers.refused), "refused_for": dict(answers.kinds)}


def _scalar(totals: Totals, name: str, step: float) -> float | None:
    total = totals.get(name)
    return float(total[0]) * step if isinstance(total, np.ndarray) else None
