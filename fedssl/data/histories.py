"""Histories: every user's items in order of time, end to end, cut at the users.

User numbers and item rows are stable: users stand in the order of their tokens as text, rows from 1 in order of first
appearance in that order of events. What is held out is a user's last two events, or what comes from one time on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedssl.catalogue import Catalogue
from fedssl.data.interactions import Interactions
from fedssl.data.stored_names import StoredNames
from fedssl.data.watch import Mark
from fedssl.errors import CatalogueMismatch


class HeldFrom(NamedTuple):
    """The times, in the unit of the events, from which on events are held out from everybody: validation first, test later."""

    validation: float
    test: float


@dataclass(frozen=True, eq=False)
class Histories:
    """User ``u`` met ``items[cuts[u]:cuts[u + 1]]``, oldest first.

    Shapes: items (events,), catalogue rows from 1; cuts (U + 1,), from 0 to events; times (events,) or None; names (U,), user tokens.
    ``held_from``: None for leave-one-out (last event test, the one before validation), else a global split by time, which needs times.
    ``marks``: of a store, its files as they were when it was opened.
    """

    items: NDArray[np.int32]
    cuts: NDArray[np.int64]
    times: NDArray[np.float64] | None
    names: Sequence[str]
    held_from: HeldFrom | None = None
    marks: tuple[Mark, ...] = ()

    def __post_init__(self) -> None:
        assert self.held_from is None or self.times is not None
        assert len(self.cuts) == len(self.names) + 1
        assert self.cuts[0] == 0
        assert self.cuts[-1] == len(self.items)
        assert self.times is None or len(self.times) == len(self.items)

    @property
    def num_users(self) -> int:
        """Users, those without events included."""
        return len(self.cuts) - 1

    @property
    def num_events(self) -> int:
        """Events of all users together."""
        return len(self.items)

    def of(self, user: int) -> NDArray[np.int32]:
        """All items of one user, oldest first; a view. Raises IndexError for a number that is no user's."""
        if not 0 <= user < self.num_users:
            raise IndexError(f"user {user} of {self.num_users}")
        return self.items[self.cuts[user] : self.cuts[user + 1]]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Events of each user. Shape: (U,)."""
        return np.diff(self.cuts)

    @cached_property
    def can_be_tested(self) -> NDArray[np.bool_]:
        """Whether a user has a test target. Shape: (U,).

        Leave-one-out: three events or more (training, validation, test). By time: an event from the test's time on, and one before it.
        """
        if self.held_from is None:
            return self.lengths >= 3
        first = self._first_from(self.held_from.test)
        return (first > self.cuts[:-1]) & (first < self.cuts[1:])

    @cached_property
    def training_ends(self) -> NDArray[np.int64]:
        """Where in ``items`` each user's training part ends. Shape: (U,).

        Leave-one-out: validation is at that index, test at the next; a user with fewer than three events only trains, and the end is
        that of the whole history. By time: every event before the validation's time trains, and no other, whether the user is tested or not.
        """
        if self.held_from is None:
            return self.cuts[1:] - 2 * self.can_be_tested
        return self._first_from(self.held_from.validation)

    def target_places(self, split: Literal["validation", "test"]) -> NDArray[np.int64]:
        """Where in ``items`` each user's target stands, -1 for users without one; everything before it may be read. Shape: (U,).

        By time a target is the first event of its period, and a user without any event before it has none.
        """
        if self.held_from is None:
            return np.where(self.can_be_tested, self.cuts[1:] - 1 if split == "test" else self.training_ends, -1)
        first = self._first_from(self.held_from.test)
        if split == "test":
            return np.where(self.can_be_tested, first, -1)
        return np.where((self.training_ends > self.cuts[:-1]) & (self.training_ends < first), self.training_ends, -1)

    def _first_from(self, time: float) -> NDArray[np.int64]:
        """Where each user's first event at ``time`` or later stands; the end of the user where there is none. Shape: (U,)."""
        assert self.times is not None
        before = np.zeros(self.num_users, dtype=np.int64)
        has_events = self.lengths > 0
        before[has_events] = np.add.reduceat(self.times < time, self.cuts[:-1][has_events], dtype=np.int64)
        return self.cuts[:-1] + before

    @cached_property
    def training_lengths(self) -> NDArray[np.int64]:
        """Training events of each user. Shape: (U,)."""
        return self.training_ends - self.cuts[:-1]

    @cached_property
    def fingerprint_of_events(self) -> str:
        """SHA-256 over items and cuts, in hexadecimal, whatever the split. Of a store that was opened it is the written one."""
        return fingerprint_of([self.items], self.cuts)

    @property
    def fingerprint(self) -> str:
        """That of the events, and with a split by time also of where training ends: equal fingerprints mean equal histories on every machine."""
        if self.held_from is None:
            return self.fingerprint_of_events
        ends = np.ascontiguousarray(self.training_ends, dtype="<i8")
        return hashlib.sha256(self.fingerprint_of_events.encode() + ends.tobytes()).hexdigest()


def fingerprint_of(pieces: Iterable[NDArray[np.int32]], cuts: NDArray[np.int64]) -> str:
    """`Histories.fingerprint_of_events` of items that come in pieces."""
    digest = hashlib.sha256(f"histories {len(cuts) - 1} {cuts[-1]}\n".encode())
    for piece in pieces:
        digest.update(np.ascontiguousarray(piece, dtype="<i4").data)
    digest.update(np.ascontiguousarray(cuts, dtype="<i8").data)
    return digest.hexdigest()


def split_by(histories: Histories, held_from: HeldFrom | None) -> Histories:
    """The same events with another split. The fingerprint of events that is known stays known."""
    other = replace(histories, held_from=held_from)
    if "fingerprint_of_events" in histories.__dict__:
        other.__dict__["fingerprint_of_events"] = histories.fingerprint_of_events
    return other


def make_histories(interactions: Interactions, catalogue: Catalogue | None = None) -> tuple[Histories, Catalogue]:
    """Sort events by user (token as text), time, then file order, and number items by first appearance.

    Guarantees:
      - events at equal times, or without times, keep the order of the file;
      - repeated items stay; the order of users in the file changes nothing;
      - a given ``catalogue`` fixes the rows; else it is made from the items that occur, tokens only.

    Raises CatalogueMismatch, naming one, for items that a given catalogue does not list.
    """
    by_text = sorted(range(len(interactions.user_tokens)), key=interactions.user_tokens.__getitem__)
    number_of_code = np.empty(len(by_text), dtype=np.int64)
    number_of_code[by_text] = np.arange(len(by_text))
    users = number_of_code[interactions.users]
    order = np.argsort(users, kind="stable") if interactions.times is None else np.lexsort((interactions.times, users))
    codes = interactions.items[order]
    if catalogue is None:
        found, first = np.unique(codes, return_index=True)
        by_appearance = found[np.argsort(first)]
        catalogue = Catalogue(tuple(interactions.item_tokens[code] for code in by_appearance.tolist()))
    row_of_code = np.array([catalogue.rows.get(token, 0) for token in interactions.item_tokens], dtype=np.int32)
    items = row_of_code[codes]
    refuse_unknown(interactions.item_tokens, np.unique(codes[items == 0]), catalogue)
    histories = Histories(
        items=items,
        cuts=np.concatenate([[0], np.cumsum(np.bincount(users, minlength=len(by_text)))]).astype(np.int64),
        times=None if interactions.times is None else interactions.times[order],
        names=tuple(interactions.user_tokens[code] for code in by_text),
    )
    return histories, catalogue


def refuse_unknown(item_tokens: Sequence[str], unknown: NDArray[np.int64], catalogue: Catalogue) -> None:
    """Raise CatalogueMismatch, naming the first, where there are codes of items that the catalogue does not list."""
    if len(unknown):
        raise CatalogueMismatch(
            f"item {item_tokens[unknown[0]]!r} (and {len(unknown) - 1} more) of the histories is not in the catalogue of "
            f"{catalogue.num_items} items; give a catalogue that lists them, or leave [data] catalogue empty"
        )


def take_users(histories: Histories, users: NDArray[np.int64]) -> Histories:
    """The histories of ``users`` (U',) alone, in the order asked for and with their names: what one node holds.

    Users one after the other are a view of the columns (cuts aside): a piece of a store that is memory-mapped stays so.
    """
    if len(users) and (np.diff(users) == 1).all():
        first, end = int(users[0]), int(users[-1]) + 1
        start, stop = int(histories.cuts[first]), int(histories.cuts[end])
        names = histories.names
        return replace(
            histories,
            items=histories.items[start:stop],
            cuts=np.asarray(histories.cuts[first : end + 1]) - start,
            times=None if histories.times is None else histories.times[start:stop],
            names=names.between(first, end) if isinstance(names, StoredNames) else names[first:end],
        )
    lengths = histories.lengths[users]
    cuts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    events = np.arange(cuts[-1]) + np.repeat(histories.cuts[:-1][users] - cuts[:-1], lengths)
    return replace(
        histories,
        items=np.asarray(histories.items[events]),
        cuts=cuts,
        times=None if histories.times is None else np.asarray(histories.times[events]),
        names=tuple(histories.names[user] for user in users.tolist()),
    )


def shuffled_in_time(histories: Histories, seed: int) -> Histories:
    """The same events, each user's in a random order: what is left of a result here did not come from order."""
    order = np.random.default_rng(seed).random(histories.num_events)
    owners = np.repeat(np.arange(histories.num_users), histories.lengths)
    return replace(histories, items=histories.items[np.lexsort((order, owners))])
