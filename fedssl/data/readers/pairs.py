"""Two columns, `user item`, one event a line in order of time and without a header, as SASRec's authors publish. Read here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedssl.data.readers.blocks import BadLines, Block
from fedssl.data.readers.columns import numbered_lines


def read_pairs(path: Path, columns: Sequence[str], bad: BadLines) -> Iterator[Block]:
    """Events of a file of pairs, plain or gzip; spaces or tabs between the two; no times, the order is the file's.

    Blank lines are passed over. A line with more or fewer than two tokens goes to ``bad``.
    """
    for numbers, lines in numbered_lines(path, bad):
        users: list[str] = []
        items: list[str] = []
        for number, line in zip(numbers, lines):
            tokens = [token for token in line.replace("\t", " ").split(" ") if token]
            if len(tokens) == 2:
                users.append(tokens[0])
                items.append(tokens[1])
            elif tokens:
                bad.add(number, f"{len(tokens)} tokens in {line.strip()[:60]!r}; wanted `user item` (`user item item ...` has format = 'lines')")
        yield Block(users, items, None)
