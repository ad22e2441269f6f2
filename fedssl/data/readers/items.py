"""RecBole's `.item` files: what is known about items. The column ending in `title` or `name` is the title, the rest are attributes."""

from __future__ import annotations

from pathlib import Path

from fedssl.data.readers.inter import read_columns, read_header
from fedssl.errors import DataError


def read_items(path: Path) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Titles and attributes by item token, as text; empty values are left out. Of an item listed twice the first line counts.

    Raises DataError for anything that is not an atomic file with an `item_id` column.
    """
    names = read_header(path)
    if "item_id" not in names:
        raise DataError(f"{path}: no column item_id among {', '.join(names)}; wanted a RecBole `.item` file")
    title_name = next((name for name in names if name != "item_id" and name.endswith(("title", "name"))), None)
    titles: dict[str, str] = {}
    attributes: dict[str, dict[str, str]] = {}
    for numbers, columns in read_columns(path, len(names)):
        for number, values in zip(numbers, zip(*columns)):
            known = dict(zip(names, values))
            token = known.pop("item_id")
            if not token:
                raise DataError(f"{path}, line {number}: an empty item token; give every line an item")
            if token in attributes:
                continue
            if title_name is not None and (title := known.pop(title_name)):
                titles[token] = title
            attributes[token] = {name: value for name, value in known.items() if value}
    return titles, attributes
