"""Invented histories with structure worth learning: popularity, tastes that drift, and habits in which order matters.

An item is a kind of thing (a tent, a lamp) from one topic (a brand, a genre). What a user meets next:
  - its KIND follows a habit of the last event, now and then of the one before (a few likely successors a kind), or, where
    no habit holds, popularity (Zipf);
  - its TOPIC is the one the user is into at the time with chance ``focus``, or any, by popularity; the user moves on to
    another topic with chance ``drift`` before each event.
So the last item alone tells the kind but little of the topic: one event is weak evidence of a taste, ten are strong. A model that
reads the whole history beats every table of transitions, and the two parts add up in the logits, which makes it learnable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedssl.data.interactions import Interactions
from fedssl.errors import DataError

USERS_AT_ONCE = 1 << 16
_TRIES = 30
_BLOCK_CELLS = 1 << 27


@dataclass(frozen=True, eq=False)
class World:
    """What all users share. Letters: I items, F topics, K kinds, N successors of a kind.

    Item ``i`` is of topic ``i % F`` and kind ``i // F``; ``tokens`` hide that order.
    """

    num_items: int
    topic_shares_F: NDArray[np.float64]
    kind_shares_K: NDArray[np.float64]
    successors_KN: NDArray[np.int64]
    successor_shares_N: NDArray[np.float64]
    tokens: tuple[str, ...]
    focus: float
    drift: float
    habit: float
    look_back: float


def make_world(
    items: int = 500,
    seed: int = 1,
    *,
    topics: int = 16,
    focus: float = 0.5,
    drift: float = 0.02,
    habit: float = 0.85,
    look_back: float = 0.2,
) -> World:
    """A catalogue of ``items`` with its habits.

    ``focus``: chance that an event is of the user's current topic; ``drift``: chance, before each event, to move to another topic;
    ``habit``: chance that the kind follows a habit; ``look_back``: share of habits that continue the event before the last.
    Raises DataError for fewer than five kinds (items / topics) or a chance outside 0 to 1.
    """
    kinds = -(-items // topics) if topics > 0 else 0
    if kinds < 5:
        raise DataError(f"synthetic data: {items} items of {topics} topics make {kinds} kinds; wanted at least 5, so more items or fewer topics")
    for name, chance in (("focus", focus), ("drift", drift), ("habit", habit), ("look_back", look_back)):
        if not 0 <= chance <= 1:
            raise DataError(f"synthetic data: {name} = {chance} is no chance; wanted 0 to 1")
    rng = np.random.default_rng([seed, 0])
    kind_shares_K = _zipf(kinds, 1.0)
    # Gumbel's trick: four successors a kind without replacement, popular kinds more often; a kind never follows itself.
    taste_KK = 0.5 * np.log(kind_shares_K) + rng.gumbel(size=(kinds, kinds))
    np.fill_diagonal(taste_KK, -np.inf)
    width = len(str(items))
    return World(
        num_items=items,
        topic_shares_F=_zipf(topics, 0.5),
        kind_shares_K=kind_shares_K,
        successors_KN=np.argsort(-taste_KK, axis=1)[:, :4],
        successor_shares_N=np.array([0.5, 0.25, 0.15, 0.1]),
        tokens=tuple(f"item-{number:0{width}d}" for number in (rng.permutation(items) + 1).tolist()),
        focus=focus,
        drift=drift,
        habit=habit,
        look_back=look_back,
    )


def synthesize(
    users: int = 2000, items: int = 500, seed: int = 1, *, mean_events: float = 40.0, repeats: bool = False, world: World | None = None
) -> Interactions:
    """Histories of ``users`` in a world of ``items``: the same arguments give the same events.

    Guarantees:
      - every user has at least 5 events and at most a quarter of the catalogue, about ``mean_events`` on average;
      - a user meets an item once, unless ``repeats``;
      - events stand user by user in order of time; a user's times are whole seconds that grow.

    ``world`` replaces the one that ``make_world(items, seed)`` makes. Time and memory grow with the events: 100,000 users take seconds.
    Raises DataError for fewer than 20 items, no users, or a mean outside 5 to a quarter of the catalogue.
    """
    blocks = list(synthesize_blocks(users, items, seed, mean_events=mean_events, repeats=repeats, world=world))
    firsts = np.cumsum([0, *(len(block.user_tokens) for block in blocks)])
    return Interactions(
        users=np.concatenate([block.users + first for block, first in zip(blocks, firsts)]),
        items=np.concatenate([block.items for block in blocks]),
        times=np.concatenate([block.times for block in blocks if block.times is not None]),
        user_tokens=tuple(token for block in blocks for token in block.user_tokens),
        item_tokens=blocks[0].item_tokens,
    )


def synthesize_blocks(
    users: int = 2000, items: int = 500, seed: int = 1, *, mean_events: float = 40.0, repeats: bool = False, world: World | None = None
) -> Iterator[Interactions]:
    """The same histories, `USERS_AT_ONCE` users at a time, whose codes count from 0 in each block: memory holds one block.

    Raises DataError as `synthesize` does, before the first block.
    """
    world = make_world(items, seed) if world is None else world
    most = world.num_items // 4
    if users < 1 or most < 5 or not 5 <= mean_events <= most:
        raise DataError(
            f"synthetic data: {users} users, {world.num_items} items and {mean_events} events a user; wanted users, at least 20 items, "
            f"and a mean from 5 to a quarter of the items ({most})"
        )
    return (
        _block(world, range(first + 1, min(first + USERS_AT_ONCE, users) + 1), len(str(users)), np.random.default_rng([seed, 1, number]), mean_events, repeats)
        for number, first in enumerate(range(0, users, USERS_AT_ONCE))
    )


def _block(world: World, numbers: range, digits: int, rng: np.random.Generator, mean_events: float, repeats: bool) -> Interactions:
    users, most = len(numbers), world.num_items // 4
    # Log-normal with a long tail, as real activity has; longest first, so that those still going are always the first few.
    spread = 0.7
    lengths_U = np.clip(np.rint(5 + (mean_events - 5) * np.exp(spread * rng.standard_normal(users) - spread**2 / 2)), 5, most).astype(np.int64)
    order_U = np.argsort(-lengths_U, kind="stable")
    cuts = np.concatenate([[0], np.cumsum(lengths_U)])
    events = np.empty(cuts[-1], dtype=np.int64)
    block = max(1, _BLOCK_CELLS // world.num_items)
    for start in range(0, users, block):
        chosen = order_U[start : start + block]
        _fill(world, lengths_U[chosen], cuts[chosen], events, rng, repeats)
    return Interactions(
        users=np.repeat(np.arange(users), lengths_U),
        items=events,
        times=_times(lengths_U, cuts, rng),
        user_tokens=tuple(f"user-{number:0{digits}d}" for number in numbers),
        item_tokens=world.tokens,
    )


def _fill(world: World, lengths_U: NDArray[np.int64], starts_U: NDArray[np.int64], events: NDArray[np.int64], rng: np.random.Generator, repeats: bool) -> None:
    """Write the events of users, longest history first, position by position."""
    kinds_by_share, topics_by_share = np.cumsum(world.kind_shares_K), np.cumsum(world.topic_shares_F)
    successors_by_share = np.cumsum(world.successor_shares_N)

    def draw(cumulative: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        return np.minimum(np.searchsorted(cumulative, rng.random(count), side="right"), len(cumulative) - 1)

    U, F = len(lengths_U), len(world.topic_shares_F)
    is_met_UI = np.zeros((U, world.num_items), dtype=np.bool_)
    into_U = draw(topics_by_share, U)
    last_U = before_U = draw(kinds_by_share, U)
    for position in range(int(lengths_U[0])):
        active = int(np.searchsorted(-lengths_U, -position, side="left"))
        moves = np.flatnonzero(rng.random(active) < world.drift)
        into_U[moves] = draw(topics_by_share, len(moves))
        chosen = np.empty(active, dtype=np.int64)
        open_users = np.arange(active)
        for attempt in range(_TRIES + 1):
            count = len(open_users)
            if attempt < _TRIES:
                origin = np.where(rng.random(count) < world.look_back, before_U[open_users], last_U[open_users])
                habitual = world.successors_KN[origin, draw(successors_by_share, count)]
                kind = np.where(rng.random(count) < world.habit, habitual, draw(kinds_by_share, count))
                topic = np.where(rng.random(count) < world.focus, into_U[open_users], draw(topics_by_share, count))
                item = kind * F + topic
            else:
                # Everything likely was met already: any item that was not.
                is_open = np.ones((count, world.num_items), dtype=np.bool_) if repeats else ~is_met_UI[open_users]
                item = np.argmax(rng.random(is_open.shape) * is_open, axis=1)
            is_good = item < world.num_items
            if not repeats:
                is_good &= ~is_met_UI[open_users, np.minimum(item, world.num_items - 1)]
            chosen[open_users[is_good]] = item[is_good]
            open_users = open_users[~is_good]
            if not len(open_users):
                break
        is_met_UI[np.arange(active), chosen] = True
        events[starts_U[:active] + position] = chosen
        before_U, last_U = last_U[:active], chosen // F


def _times(lengths_U: NDArray[np.int64], cuts: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Whole seconds since 1970: users begin within a year, and wait from seconds to days between events."""
    gaps = np.ceil(rng.exponential(3600.0, size=int(cuts[-1])) * rng.choice([0.05, 1.0, 48.0], size=int(cuts[-1]))) + 1
    gaps[cuts[:-1]] = 1_600_000_000 + rng.integers(0, 31_536_000, size=len(lengths_U))
    running: NDArray[np.float64] = np.cumsum(gaps)
    before_U = running[cuts[:-1]] - gaps[cuts[:-1]]
    times: NDArray[np.float64] = running - np.repeat(before_U, lengths_U)
    return times


def _zipf(count: int, exponent: float) -> NDArray[np.float64]:
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares
