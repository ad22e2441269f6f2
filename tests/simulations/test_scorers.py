import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fedssl_simulations.scorers import co_occurrence, markov, popularity

from fedssl.config import DataConfig
from fedssl.data.dataset import load_dataset
from fedssl.data.histories import Histories
from fedssl.evaluation import evaluate


def histories(*rows):
    cuts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Histories(np.concatenate([np.array(row, np.int32) for row in rows]), cuts, None, [f"user {number}" for number in range(len(rows))])


def score(scorer, *past):
    return scorer([np.array(row, np.int32) for row in past], np.arange(len(past)))


# Training parts: 1 2 3, then 1 2 1, then 4. The last two events of the first two users are held out.
THREE = histories([1, 2, 3, 4, 4], [1, 2, 1, 4, 4], [4])
EVENTS = np.array([0, 3, 2, 1, 1])


def test_popularity_counts_training_events_alone():
    assert score(popularity(THREE, 4), [1], []).tolist() == [EVENTS.tolist()] * 2


def test_markov_reads_what_followed_the_newest_item_and_popularity_behind_it():
    transitions = np.array([[0, 0, 0, 0, 0], [0, 0, 2, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    found = score(markov(THREE, 4, context=1), [3, 1], [2])
    assert found.numpy() == pytest.approx(transitions[[1, 2]] + EVENTS / 8)


def test_markov_weighs_older_events_less_and_repeated_ones_together():
    found = score(markov(THREE, 4, context=3, decay=0.5), [3, 1, 2], [1, 2, 2, 1])
    # Newest first: 2, 1, 3 and 1, 2, 2.
    assert found[0].numpy() == pytest.approx(np.array([0, 1, 0.5 * 2, 1, 0]) + EVENTS / 8)
    assert found[1].numpy() == pytest.approx(np.array([0, 0.5 + 0.25, 2, 0.5 + 0.25, 0]) + EVENTS / 8)


def test_popularity_never_outweighs_one_transition():
    loved = histories([1] * 50, [2, 3, 1, 1])
    assert score(markov(loved, 3, context=1), [2])[0].argmax() == 3


def test_no_transition_joins_the_histories_of_two_users():
    assert score(markov(histories([1], [2]), 2, context=1), [1])[0].tolist() == pytest.approx([0, 0.25, 0.25])


def test_co_occurrence_is_the_cosine_of_sets_of_users():
    found = score(co_occurrence(THREE, 4), [2, 2], [3, 1])
    # Item 1 and 2 share both their users, item 3 has one of them, item 4 stands alone.
    assert found[0].numpy() == pytest.approx([0, 1, 0, 1 / np.sqrt(2), 0], abs=1e-5)
    assert found[1].numpy() == pytest.approx([0, 1 / np.sqrt(2), 1 + 1 / np.sqrt(2), 1 / np.sqrt(2), 0], abs=1e-5)


def test_co_occurrence_does_not_see_order():
    swapped = histories([3, 1, 2, 4, 4], [2, 1, 1, 4, 4], [4])
    assert torch.equal(score(co_occurrence(THREE, 4), [1, 3]), score(co_occurrence(swapped, 4), [3, 1]))


def test_co_occurrence_is_the_same_on_a_sparse_catalogue():
    wide = score(co_occurrence(THREE, 40), [3, 1])[0]
    assert wide[:5].numpy() == pytest.approx(score(co_occurrence(THREE, 4), [3, 1])[0].numpy())
    assert not wide[5:].any()


@pytest.mark.parametrize("make", [popularity, markov, co_occurrence])
def test_held_out_events_are_not_read(make):
    other = histories([1, 2, 3, 2, 1], [1, 2, 1, 3, 3], [4])
    assert torch.equal(score(make(THREE, 4), [1, 2], [3]), score(make(other, 4), [1, 2], [3]))


@pytest.mark.parametrize("make", [popularity, markov, co_occurrence])
def test_an_empty_history_gets_popular_items(make):
    assert score(make(THREE, 4), [])[0].argsort(descending=True)[:2].tolist() == [1, 2]


@pytest.mark.skipif(not (Path(os.environ.get("FEDSSL_DATA", "")) / "ml-1m.inter.gz").is_file(), reason="FEDSSL_DATA names no folder with ml-1m.inter.gz")
def test_the_known_numbers_of_movielens_1m():
    data = load_dataset(DataConfig(path="ml-1m.inter.gz"))
    known = {popularity: (0.0079, 0.0180), markov: (0.1120, 0.1340)}
    for make, (of_all, unseen) in known.items():
        found = evaluate(make(data.histories, data.catalogue.num_items), data.histories, "test").summary()
        assert found["all"]["ndcg@10"] == pytest.approx(of_all, abs=0.0001)
        assert found["unseen"]["ndcg@10"] == pytest.approx(unseen, abs=0.0001)
