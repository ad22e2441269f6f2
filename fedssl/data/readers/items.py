"""Side files of items: titles and attributes, for the catalogue."""

from __future__ import annotations

from pathlib import Path

from fedssl.data.readers.columns import ITEM_NAMES
from fedssl.data.readers.side import read_side


def read_items(path: Path) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Titles and attributes by item token, as text; empty values are left out. Of an item listed twice the first line counts.

    The first column ending in `title` or `name` is the title, the rest are attributes. Raises DataError as `read_side` does.
    """
    titles: dict[str, str] = {}
    attributes: dict[str, dict[str, str]] = {}
    for token, known in read_side(path, (*ITEM_NAMES, "id"), ("item_id", "title", "genres"), has_amazon=True):
        if token in attributes:
            continue
        title_name = next((name for name in known if name.endswith(("title", "name"))), None)
        if title_name is not None and (title := known.pop(title_name)):
            titles[token] = title
        attributes[token] = {name: value for name, value in known.items() if value}
    return titles, attributes
