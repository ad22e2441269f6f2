import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.data.interactions import Interactions, k_core
from fedssl.errors import DataError


def interactions(pairs: list[tuple[int, int]], times: list[float] | None = None) -> Interactions:
    users, items = ([pair[side] for pair in pairs] for side in (0, 1))
    return Interactions(
        users=np.array(users, dtype=np.int64),
        items=np.array(items, dtype=np.int64),
        times=None if times is None else np.array(times, dtype=np.float64),
        user_tokens=tuple(f"u{code}" for code in range(max(users, default=-1) + 1)),
        item_tokens=tuple(f"i{code}" for code in range(max(items, default=-1) + 1)),
    )


def named(data: Interactions) -> list[tuple[str, str]]:
    return [(data.user_tokens[user], data.item_tokens[item]) for user, item in zip(data.users, data.items, strict=True)]


def slow_core(pairs: list[tuple[str, str]], least: int) -> list[tuple[str, str]]:
    while True:
        kept = [pair for pair in pairs if sum(other[1] == pair[1] for other in pairs) >= least]
        kept = [pair for pair in kept if sum(other[0] == pair[0] for other in kept) >= least]
        if kept == pairs:
            return pairs
        pairs = kept


def test_dropping_an_item_can_drop_a_user_and_then_another_item():
    # i2 has one event; without it u1 has one; without u1 i1 has one; without i1 u0 keeps i0 twice.
    data = interactions([(0, 0), (0, 0), (0, 1), (1, 1), (1, 2)], times=[1.0, 2.0, 3.0, 4.0, 5.0])
    kept = k_core(data, 2)
    assert named(kept) == [("u0", "i0"), ("u0", "i0")]
    assert (kept.user_tokens, kept.item_tokens) == (("u0",), ("i0",))
    assert kept.times is not None
    assert kept.times.tolist() == [1.0, 2.0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30), st.integers(1, 4))
def test_the_core_is_that_of_a_slow_obvious_loop(pairs, least):
    data = interactions(pairs)
    assert named(k_core(data, least)) == slow_core(named(data), least)


def test_one_event_is_enough_to_stay_where_one_is_asked_for():
    data = interactions([(2, 1), (0, 3), (2, 1)])
    kept = k_core(data, 1)
    assert named(kept) == named(data)
    assert (kept.user_tokens, kept.item_tokens) == (("u0", "u2"), ("i1", "i3"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"users": np.array([0])}, "columns of"),
        ({"times": np.array([1.0])}, "columns of"),
        ({"items": np.array([0, 5])}, "item codes 0 to 5 for 2 tokens"),
        ({"users": np.array([-1, 0])}, "user codes -1 to 0"),
        ({"item_tokens": ("x", "x")}, "item token is listed twice"),
        ({"times": np.array([1.0, np.nan])}, "nan or infinite"),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(change, says):
    good = {"users": np.array([0, 1]), "items": np.array([0, 1]), "times": None, "user_tokens": ("a", "b"), "item_tokens": ("x", "y")}
    with pytest.raises(DataError, match=says):
        Interactions(**{**good, **change})
