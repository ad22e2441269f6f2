"""Weights and their one flat vector: inverse of each other, in an order that every update follows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedssl.weights import ITEMS, flatten, from_numpy, layout_of, to_numpy, unflatten


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(number)) for number, (name, shape) in enumerate(shapes.items())}


def test_the_order_is_by_name_with_the_items_last():
    layout = layout_of({"z": torch.zeros(2), ITEMS: torch.zeros(4, 2), "a": torch.zeros(3, 1), "j": torch.zeros(())})
    assert layout.names == ("a", "j", "z", ITEMS)
    assert layout.shapes == ((3, 1), (), (2,), (4, 2))
    assert layout.offsets == (0, 3, 4, 6, 14)
    assert layout.num_weights == 14
    assert layout.slice_of("z") == slice(4, 6) and layout.slice_of(ITEMS) == slice(6, 14)


def test_flat_by_hand():
    weights = {ITEMS: torch.tensor([[5.0, 6.0]]), "b": torch.tensor([3.0, 4.0]), "a": torch.tensor([[1.0], [2.0]])}
    assert flatten(weights, layout_of(weights)).tolist() == [1, 2, 3, 4, 5, 6]


@given(st.dictionaries(st.text("abz.01", min_size=1, max_size=5) | st.just(ITEMS), st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1))
def test_flatten_and_unflatten_are_inverse(shapes: dict[str, tuple[int, ...]]):
    weights = numbered(shapes)
    layout = layout_of(weights)
    flat_P = flatten(weights, layout)
    again = unflatten(flat_P, layout)
    assert flat_P.shape == (layout.num_weights,)
    assert list(again) == list(layout.names) and set(again) == set(shapes)
    assert all(torch.equal(again[name], leaf) for name, leaf in weights.items())
    assert all(torch.equal(flat_P[layout.slice_of(name)], leaf.reshape(-1)) for name, leaf in weights.items())
    assert torch.equal(flatten(again, layout), flat_P)


def test_the_order_of_the_dictionary_changes_nothing():
    weights = numbered({"b": (2,), ITEMS: (3, 2), "a": (1,)})
    turned = dict(reversed(weights.items()))
    assert layout_of(weights) == layout_of(turned) == layout_of(to_numpy(weights))
    assert torch.equal(flatten(weights, layout_of(weights)), flatten(turned, layout_of(turned)))


def test_a_flat_vector_is_a_copy_and_its_parts_are_views():
    weights = numbered({"a": (2,), ITEMS: (2, 2)})
    layout = layout_of(weights)
    flat_P = flatten(weights, layout)
    flat_P.zero_()
    assert weights["a"].any()
    unflatten(flat_P, layout)["a"].fill_(7.0)
    assert flat_P.tolist() == [7, 7, 0, 0, 0, 0]


def test_arrays_share_the_memory_of_tensors_and_tensors_never_that_of_arrays():
    """Products may round differently over memory of another alignment, and bytes from a wire lie anywhere."""
    weights = numbered({"a": (2,), ITEMS: (2, 2)})
    arrays = to_numpy(weights)
    arrays["a"][0] = 5.0
    assert weights["a"][0] == 5.0
    shifted = np.frombuffer(b"?" + arrays[ITEMS].tobytes(), dtype=np.uint8)[1:].view(np.float32).reshape(2, 2)
    again = from_numpy({"a": arrays["a"], ITEMS: shifted})
    assert all(torch.equal(again[name], leaf) for name, leaf in weights.items())
    assert all(leaf.data_ptr() % 16 == 0 for leaf in again.values())
    again["a"][0] = 6.0
    assert weights["a"][0] == 5.0


def test_a_view_that_is_expanded_or_turned_becomes_an_array_of_its_values():
    turned = torch.arange(6.0).view(2, 3).T
    assert to_numpy({"a": turned})["a"].tolist() == turned.tolist()
    assert to_numpy({"a": torch.ones(2, requires_grad=True)})["a"].dtype == np.float32


def test_a_name_that_is_not_there_is_not_found():
    with pytest.raises(ValueError):
        layout_of({"a": torch.zeros(1)}).slice_of("b")
