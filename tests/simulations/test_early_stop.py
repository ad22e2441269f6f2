"""Early stop: the best round and the moment to stop, by hand and against a walk through the rounds."""

from __future__ import annotations

from fedssl_simulations.early_stop import best_round, is_over, validations
from hypothesis import given
from hypothesis import strategies as st


def test_validations_are_the_lines_that_have_one():
    lines = [
        {"phase": "counts", "round": 1, "loss": None},
        {"phase": "training", "round": 2, "validation": {"unseen": {"ndcg@10": 0.25, "hr@10": 0.9}, "all": {"ndcg@10": 0.75}}},
        {"phase": "training", "round": 3},
        {"phase": "training", "round": 4, "validation": {"unseen": {"ndcg@10": 0.5}, "all": {"ndcg@10": 0.5}}},
    ]
    assert validations(lines) == [(2, 0.25), (4, 0.5)]


def test_the_best_round_by_hand():
    assert best_round([]) == 0
    assert best_round([(10, 0.0)]) == 10
    assert best_round([(10, 0.1), (20, 0.3), (30, 0.2)]) == 20
    # Equal is not better: the earliest, which cost the fewest rounds.
    assert best_round([(10, 0.1), (20, 0.3), (30, 0.3)]) == 20


def test_when_to_stop_by_hand():
    seen = [(10, 0.1), (20, 0.3), (30, 0.3), (40, 0.2)]
    assert [is_over(seen[:count], 2) for count in range(5)] == [False, False, False, False, True]
    assert not is_over(seen, 3) and is_over(seen, 1)
    assert not is_over(seen, 0), "without patience no run stops early"
    assert not is_over([], 1)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3]), max_size=12), st.integers(1, 5))
def test_it_is_over_where_a_walk_that_counts_would_have_stopped(qualities: list[float], patience: int):
    best, waited, stopped = -1.0, 0, 0
    for place, quality in enumerate(qualities, start=1):
        best, waited = (quality, 0) if quality > best else (best, waited + 1)
        if waited >= patience and not stopped:
            stopped = place
    seen = [(7 * place, quality) for place, quality in enumerate(qualities, start=1)]
    over = [is_over(seen[:count], patience) for count in range(len(seen) + 1)]
    assert (over.index(True) if True in over else 0) == stopped
