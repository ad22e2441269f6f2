"""One line a user: `user item item item ...` in order of time, as S3-Rec and its successors publish. Read and written here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fedssl.data.interactions import Interactions
from fedssl.data.readers.blocks import BadLines, Block
from fedssl.data.readers.inter import has_typed_header
from fedssl.data.readers.text import first_line, read_blocks
from fedssl.errors import DataError


def read_lines(path: Path, columns: Sequence[str], bad: BadLines) -> Iterator[Block]:
    """Events of a file with one line a user, plain or gzip; spaces or tabs between tokens; no times, the order is the line's.

    Blank lines are passed over. A user without items, or listed on two lines, goes to ``bad``; the first line of a user stays.
    """
    if has_typed_header(first_line(path)):
        raise DataError(f"{path}: this is a RecBole atomic file, not one line a user; set format = 'inter'")
    line_of_user: dict[str, int] = {}
    for first, lines in read_blocks(path, bad):
        users: list[str] = []
        items: list[str] = []
        for number, line in enumerate(lines, start=first):
            tokens = [token for token in line.replace("\t", " ").split(" ") if token]
            if not tokens:
                continue
            user = tokens[0]
            if len(tokens) == 1:
                bad.add(number, f"{line.strip()[:60]!r} has no items; wanted `user item item ...`, separated by spaces")
            elif user in line_of_user:
                bad.add(
                    number,
                    f"user {user[:60]!r} is already on line {line_of_user[user]}; wanted all items of a user on one line "
                    "(one event a line, `user item`, has format = 'pairs')",
                )
            else:
                line_of_user[user] = number
                users.extend([user] * (len(tokens) - 1))
                items.extend(tokens[1:])
        yield Block(users, items, None)


def write_lines(interactions: Interactions, path: Path, *, append: bool = False) -> None:
    """Write one line a user, in order of the user codes, each user's events by time, then file order; times are lost.

    ``append``: behind the lines of a file, for users who are not in it.

    Raises DataError for a token with a space, tab or line end, and for a user without events: they cannot stand in this format.
    """
    for token in interactions.user_tokens + interactions.item_tokens:
        if not token or any(mark in token for mark in " \t\r\n"):
            raise DataError(f"{path}: token {token!r} is empty or holds white space; write a `.inter` file instead")
    times = np.zeros(interactions.num_events) if interactions.times is None else interactions.times
    order = np.lexsort((times, interactions.users))
    lengths = np.bincount(interactions.users, minlength=len(interactions.user_tokens))
    if interactions.num_events == 0 or lengths.min() == 0:
        raise DataError(f"{path}: a user without events; filter with `k_core(interactions, 1)` before writing")
    items = [interactions.item_tokens[code] for code in interactions.items[order].tolist()]
    cuts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    with path.open("a" if append else "w", encoding="utf-8", newline="\n") as file:
        for user, start, end in zip(interactions.user_tokens, cuts, cuts[1:]):
            file.write(" ".join([user, *items[start:end]]) + "\n")
