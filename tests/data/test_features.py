"""Features of items: which attributes become columns, and which do not."""

import numpy as np

from fedssl.catalogue import Catalogue
from fedssl.data.features import WORDS_AN_ATTRIBUTE, item_features


def catalogue_of(**attributes: list[str]) -> Catalogue:
    size = len(next(iter(attributes.values())))
    tokens = tuple(f"i{number}" for number in range(size))
    return Catalogue(tokens, attributes={token: {name: values[row] for name, values in attributes.items() if values[row]} for row, token in enumerate(tokens)})


def test_words_become_columns_the_most_frequent_first_and_rare_ones_none():
    features = item_features(catalogue_of(genre=["drama war"] * 6 + ["drama"] * 3 + ["noir"]))
    assert features.T.tolist() == [[1.0] * 10, [1.0] * 9 + [0.0], [1.0] * 6 + [0.0] * 4]


def test_values_in_bars_are_not_cut_at_blanks():
    features = item_features(catalogue_of(genre=["film noir|war"] * 5 + ["war"] * 5 + [""]))
    assert features[:, 1:].T.tolist() == [[1.0] * 10 + [0.0], [1.0] * 5 + [0.0] * 6]


def test_numbers_become_bins_of_like_size_and_an_item_without_one_is_in_none():
    features = item_features(catalogue_of(year=[str(1900 + number) for number in range(100)] + [""]))
    bins = features[:, 1:]
    assert bins.sum(1).tolist() == [1.0] * 100 + [0.0]
    assert bins.shape[1] == 24 and bins.sum(0).max() <= 6
    # Neighbours share a bin or sit in the next one.
    assert np.all(np.diff(bins[:100].argmax(1)) >= 0)


def test_titles_are_no_attribute_and_an_attribute_has_a_most():
    words = [f"w{number % 100}" for number in range(1000)]
    assert item_features(catalogue_of(title=words, tag=words)).shape == (1000, 1 + WORDS_AN_ATTRIBUTE)


def test_a_catalogue_of_bare_tokens_has_the_constant_alone():
    assert item_features(Catalogue(("a", "b", "c"))).tolist() == [[1.0]] * 3
