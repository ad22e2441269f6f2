"""The loop of rounds over a Flower Grid: draw the cohort, send, fold each reply as it arrives, release.

The same loop in simulation and in deployment; what differs is the Grid. The server's memory does not grow with the cohort:
a reply is added and dropped. Everything is keyed, so a resumed run repeats the rounds it lost.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedssl import wire
from fedssl.errors import AllUploadsRefused, ConfigError, UploadRefused, WireError
from fedssl.privacy.keys import Keys, cohort_by_coins, cohort_of_pass, draw_cohort, users_per_round
from fedssl.privacy.ledger import Ledger, begin_attempt, hmac_of_totals, may_draw_noise, new_attempt
from fedssl.privacy.manifest import LOSS_STEP, WEIGHT_STEP
from fedssl.privacy.plan import Plan
from fedssl.recipe import Recipe
from fedssl.records import Address, Download, Upload
from fedssl.server_round import Release, ServerPhase, State, Sums, Totals, add, phases_of, totals_of
from fedssl_server.admission import admit

REPLIES_AT_ONCE = 4
"""Replies asked for in one pull: a deployed Grid downloads all that are ready into a list."""
MOST_WORDS = 500
"""Characters that are kept of what a node says about its failure."""
SHORTEST_PULL_SECONDS, PAUSE_SECONDS = 0.045, 0.2
"""A pull that found nothing sooner than that is followed by a pause, so that the loop does not spin."""


@dataclass(frozen=True)
class Run:
    """What does not change while rounds go on. ``plan``, ``keys`` and ``ledger`` go together, or are all None: where users add their own noise too.

    ``owner_U``: for each user number the index in ``node_ids`` of the node that hosts them, -1 for none.
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
    ``refused_for``: how many answers were refused, or missed, by kind (`admission`).
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

    Raises BudgetSpent before a round that would break the promise, AllUploadsRefused when nothing could be used.
    """
    phases = phases if phases is not None else phases_of(run.recipe)
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
            on_round(state, facts)
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
    waited, up, down, refused = 0.0, 0, 0, {}
    kinds: Counter[str] = Counter()
    for exchange in range(phase.exchanges):
        if exchange:
            tensors = phase.middle(state, totals, exchange - 1)
        address = replace(address, exchange=exchange)
        sums: Sums = {}
        content = wire.to_record_dict(Download(address, run.recipe, tensors, None, settled, state.clip_norm))
        declared = phase.declared(state, exchange)
        messages, asked = [], {}
        for index, node in enumerate(run.node_ids):
            if node in chosen:
                users = None if run.hosts_one[index] else chosen[node]
                group = f"{address.phase} {address.round}"
                messages.append(Message(wire.with_users(content, users), node, "train", ttl=run.deadline_seconds, group_id=group))
                asked[node] = len(chosen[node])
        down += sum(array.nbytes for array in tensors.values()) * len(messages)
        for item in _replies(grid, messages, run.deadline_seconds):
            if isinstance(item, float):
                waited += item
                continue
            sender, reply = item
            if sender is None or sender not in asked:
                kinds["unasked"] += 1
                continue
            most_users = asked.pop(sender)
            try:
                upload = _upload_of(reply)
                admit(upload, address=address, recipe=run.recipe.hash, declared=declared, most_users=most_users)
            except (UploadRefused, WireError) as error:
                refused[sender] = str(error)
                kinds[error.kind if isinstance(error, UploadRefused) else "form"] += 1
                continue
            up += _bytes_of(upload)
            add(sums, upload)
        for node in asked:
            refused[node] = "not reached, or no answer before the deadline"
            kinds["missing"] += 1
        totals = totals_of(sums)
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
    )


def _replies(grid: Grid, messages: list[Message], deadline_seconds: float | None) -> Iterator[tuple[int | None, Message] | float]:
    """Each reply as it arrives, with the node that was asked (None: nobody was); between them the seconds that were waited; ends at the deadline."""
    names = list(grid.push_messages(messages)) if messages else []
    # A deployed Grid has no name for a message that it could not push. Who was asked, not who says that they answer, counts.
    node_of = {name: message.metadata.dst_node_id for name, message in zip(names, messages, strict=True) if name}
    missing = list(node_of)
    ends = None if deadline_seconds is None else time.monotonic() + deadline_seconds
    while missing and (ends is None or time.monotonic() < ends):
        before = time.perf_counter()
        replies = list(grid.pull_messages(missing[:REPLIES_AT_ONCE]))
        spent = time.perf_counter() - before
        if not replies and spent < SHORTEST_PULL_SECONDS:
            # A deployed Grid answers at once; the in-process one waits by itself.
            time.sleep(PAUSE_SECONDS)
        yield time.perf_counter() - before
        if not replies:
            # Nothing yet: ask for others next, so that a slow node does not hold up those behind it.
            missing = missing[REPLIES_AT_ONCE:] + missing[:REPLIES_AT_ONCE]
        for reply in replies:
            name = reply.metadata.reply_to_message_id
            if name in missing:
                missing.remove(name)
            yield node_of.get(name), reply


def _upload_of(reply: Message) -> Upload:
    if reply.has_error():
        # A node's own words: short, and on one line.
        raise UploadRefused(f"the node failed: {' '.join(str(reply.error.reason).split())[:MOST_WORDS]}", "failed")
    return wire.upload_from_record_dict(reply.content)


def _bytes_of(upload: Upload) -> int:
    arrays = [(value,) if isinstance(value, np.ndarray) else (value.rows, value.columns, value.values) for value in upload.sums.values()]
    return sum(array.nbytes for group in arrays for array in group)


def _scalar(totals: Totals, name: str, step: float) -> float | None:
    total = totals.get(name)
    return float(total[0]) * step if isinstance(total, np.ndarray) else None
