"""Side files of users: attributes, for a probe of what a model knows about people. They never enter the catalogue or a model."""

from __future__ import annotations

from pathlib import Path

from fedssl.data.readers.columns import USER_NAMES
from fedssl.data.readers.side import read_side


def read_users(path: Path) -> dict[str, dict[str, str]]:
    """Attributes by user token, as text; empty values are left out. Of a user listed twice the first line counts.

    Raises DataError as `read_side` does.
    """
    found: dict[str, dict[str, str]] = {}
    for token, known in read_side(path, (*USER_NAMES, "id"), ("user_id", "gender", "age", "occupation", "zip_code")):
        found.setdefault(token, {name: value for name, value in known.items() if value})
    return found
