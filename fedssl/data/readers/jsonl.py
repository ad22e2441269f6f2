"""JSON lines, one event an object: Amazon's reviews as they are published, or any keys that are named.

Amazon 2014 and 2018: `reviewerID`, `asin`, `unixReviewTime`; 2023: `user_id`, `parent_asin`, `timestamp` (milliseconds).
Sources: https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/ and https://amazon-reviews-2023.github.io/
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedssl.data.readers.blocks import BadLines, Block, reason_against
from fedssl.data.readers.columns import find_places, numbered_lines
from fedssl.errors import DataError


def read_jsonl(path: Path, columns: Sequence[str], bad: BadLines) -> Iterator[Block]:
    """Events of a file of JSON lines, plain or gzip, in file order. ``columns``: keys of user, item and perhaps time; none: usual ones.

    Which keys are meant is told by the first object. Raises DataError where it lacks them. A line that is no JSON object, lacks
    a key, has a token that is neither text nor a whole number, or a time that is not a finite number, goes to ``bad``.
    """
    keys: list[str] = []
    for numbers, lines in numbered_lines(path, bad):
        users: list[str] = []
        items: list[str] = []
        times: list[float] = []
        for number, line in zip(numbers, lines):
            found = parse_object(line)
            if isinstance(found, str):
                bad.add(number, found)
                continue
            keys = keys or _keys(found, columns, path)
            missing = [key for key in keys if key not in found]
            texts = [] if missing else [_text(found[key]) for key in keys]
            reason = f"no key {' and '.join(missing)} in {line[:60]!r}" if missing else reason_against(texts[0], texts[1], texts[2] if len(keys) == 3 else None)
            if reason:
                bad.add(number, reason)
                continue
            users.append(texts[0])
            items.append(texts[1])
            times.extend(map(float, texts[2:]))
        yield Block(users, items, np.array(times, dtype=np.float64) if len(keys) == 3 else None)


def parse_object(line: str) -> dict[str, Any] | str:
    """The JSON object on a line, or a text that says why there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({str(error)[:60]}): {line[:60]!r}"
    return found if isinstance(found, dict) else f"not a JSON object: {line[:60]!r}"


def _keys(first: dict[str, Any], columns: Sequence[str], path: Path) -> list[str]:
    names = list(first)
    places = find_places(names, columns)
    if isinstance(places, str):
        raise DataError(f"{path}: {places}")
    return [names[at] for at in places if at is not None]


def _text(value: Any) -> str:
    """A token or a number as text; empty for anything that is neither, as null, lists and half a surrogate pair are."""
    if isinstance(value, str):
        return value if value.isascii() or value.encode("utf-8", "ignore").decode() == value else ""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""
