"""Features of items from their attributes: what may be known of an item before anybody is counted.

They are public where the catalogue is, so they cost no privacy.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from fedssl.catalogue import Catalogue

WORDS_AN_ATTRIBUTE = 64
BINS_AN_ATTRIBUTE = 24
FEWEST_ITEMS = 5


def item_features(catalogue: Catalogue) -> NDArray[np.float32]:
    """A row of zeros and ones an item. Shape: (I, F), row 0 is item 1; the first column is 1 for all.

    An attribute whose values are numbers (`release_year`) becomes bins that hold about as many items each; any other its words
    (`genre`), the most frequent first, those of too few items left out. Values are split at `|`, or at blanks where there is none.
    """
    columns = [np.ones(catalogue.num_items, dtype=np.float32)]
    for name in sorted({name for known in catalogue.attributes.values() for name in known} - {"title", "movie_title"}):
        values = [catalogue.attributes.get(token, {}).get(name, "") for token in catalogue.tokens]
        numbers = [_number(value) for value in values]
        is_numeric = sum(number is not None for number in numbers) > 0.9 * sum(map(bool, values))
        columns += _bins(numbers) if is_numeric else _words(values)
    return np.stack(columns, axis=1)


def _words(values: list[str]) -> list[NDArray[np.float32]]:
    split = [set(re.split(r"\|" if "|" in value else r"\s+", value)) - {""} for value in values]
    counted = Counter(word for words in split for word in words)
    kept = [word for word, count in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0])) if FEWEST_ITEMS <= count < len(values)]
    return [np.array([word in words for words in split], dtype=np.float32) for word in kept[:WORDS_AN_ATTRIBUTE]]


def _bins(numbers: list[float | None]) -> list[NDArray[np.float32]]:
    value_I = np.array([np.nan if number is None else number for number in numbers])
    known = value_I[np.isfinite(value_I)]
    cuts = np.unique(np.quantile(known, np.arange(1, BINS_AN_ATTRIBUTE) / BINS_AN_ATTRIBUTE, method="lower")) if len(known) else known
    place_I = np.where(np.isfinite(value_I), np.searchsorted(cuts, value_I), -1)
    return [(place_I == place).astype(np.float32) for place in range(len(cuts) + 1) if (place_I == place).any()]


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
