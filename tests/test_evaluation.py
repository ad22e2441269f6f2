import math

import ir_measures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.slow_beyond_accuracy import slow_best, slow_of_lists
from oracles.slow_ranking import slow_ndcg, slow_rank

from fedssl.data.histories import HeldFrom, Histories
from fedssl.errors import DataError
from fedssl.evaluation import evaluate, metrics, ranks, training_counts
from fedssl.intervals import bootstrap_interval

NAN, INF = float("nan"), float("inf")


def histories(*rows):
    cuts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Histories(np.concatenate([np.array(row, np.int32) for row in rows]), cuts, None, [f"user {number}" for number in range(len(rows))])


def rank_one(scores, target, seen=()):
    of_all, unseen = ranks(torch.tensor([[99.0, *scores]]), np.array([target]), (np.zeros(len(seen), int), np.array(seen, int)))
    return of_all[0], unseen[0]


def test_a_rank_is_one_plus_the_higher_plus_half_of_the_other_ties():
    assert rank_one([5, 3, 3, 3, 1], target=2) == (1 + 1 + 0.5 * 2,) * 2
    assert rank_one([5, 3, 3, 3, 1], target=1) == (1, 1)
    assert rank_one([0, 0, 0, 0], target=4) == (2.5, 2.5)


def test_the_padding_row_is_never_ranked():
    assert rank_one([1, 2], target=2) == (1, 1)
    assert rank_one([1, 2], target=2, seen=[0]) == (1, 1)


def test_seen_items_leave_the_unseen_ranking_once_however_often_they_are_listed():
    assert rank_one([5, 4, 3, 3, 1], target=3, seen=[1, 1, 4, 5]) == (3.5, 2)


def test_a_target_met_before_stays_in_the_ranking():
    assert rank_one([5, 4, 3], target=2, seen=[2, 2]) == (2, 2)
    assert rank_one([5, 4, 3], target=2, seen=[2, 1]) == (2, 1)


def test_an_empty_history_ranks_alike_in_both():
    assert rank_one([1, 3, 2], target=3) == (2, 2)


def test_a_candidate_that_scores_nan_is_worse_than_minus_infinity():
    assert rank_one([NAN, -INF, 1], target=2) == (2, 2)


def test_a_target_that_scores_nan_ranks_last():
    assert rank_one([NAN, -INF, NAN, 2], target=1) == (4, 4)
    assert rank_one([NAN, -INF, NAN, 2], target=1, seen=[1, 3, 4]) == (4, 2)


def test_infinities_are_scores_and_tie_among_themselves():
    assert rank_one([INF, INF, 1], target=2) == (1.5, 1.5)
    assert rank_one([-INF, -INF, 1], target=2, seen=[3]) == (2.5, 1.5)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), users=st.integers(1, 4), items=st.integers(1, 8))
def test_ranks_equal_the_slow_version_with_ties_nan_and_infinities(data, users, items):
    score = st.sampled_from([-INF, -1.0, 0.0, 0.5, 2.0, INF, NAN])
    scores = data.draw(st.lists(st.lists(score, min_size=items + 1, max_size=items + 1), min_size=users, max_size=users))
    targets = data.draw(st.lists(st.integers(1, items), min_size=users, max_size=users))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, users - 1), st.integers(0, items)), max_size=20))
    owner, item = np.array([u for u, _ in pairs], int), np.array([i for _, i in pairs], int)
    of_all, unseen = ranks(torch.tensor(scores), np.array(targets), (owner, item))
    for user in range(users):
        assert of_all[user] == slow_rank(scores[user], targets[user])
        assert unseen[user] == slow_rank(scores[user], targets[user], {i for u, i in pairs if u == user})


def test_metrics_by_hand():
    found = metrics(np.array([1.0, 2.5, 5.0, 5.5, 20.0]), ks=(1, 5))
    assert found["hr@1"] == pytest.approx(1 / 5)
    assert found["hr@5"] == pytest.approx(3 / 5)
    assert found["ndcg@5"] == pytest.approx((1 + 1 / math.log2(3.5) + 1 / math.log2(6)) / 5)
    assert found["mrr"] == pytest.approx((1 + 1 / 2.5 + 1 / 5 + 1 / 5.5 + 1 / 20) / 5)
    assert list(found) == ["hr@1", "ndcg@1", "hr@5", "ndcg@5", "mrr"]


@given(st.lists(st.integers(2, 60).map(lambda twice: twice / 2), min_size=1, max_size=20), st.integers(1, 30))
def test_ndcg_equals_the_slow_version(found, k):
    assert metrics(np.array(found), (k,))[f"ndcg@{k}"] == pytest.approx(slow_ndcg(found, k), abs=1e-12)


def test_metrics_agree_with_ir_measures_where_no_scores_tie():
    rng = np.random.default_rng(3)
    users, items = 40, 60
    scores = torch.from_numpy(rng.permuted(np.tile(np.arange(items + 1, dtype=np.float32), (users, 1)), axis=1))
    targets = rng.integers(1, items + 1, users)
    seen = (np.repeat(np.arange(users), 5), rng.integers(1, items + 1, users * 5))
    wanted = [ir_measures.parse_measure(name) for name in ("nDCG@5", "nDCG@10", "Success@5", "Success@10", "RR")]
    of_all, unseen = ranks(scores, targets, seen)
    for found, left_out in ((of_all, set()), (unseen, {(u, i) for u, i in zip(*seen, strict=True) if i != targets[u]})):
        run = [ir_measures.ScoredDoc(str(u), str(i), float(scores[u, i])) for u in range(users) for i in range(1, items + 1) if (u, i) not in left_out]
        qrels = [ir_measures.Qrel(str(u), str(targets[u]), 1) for u in range(users)]
        theirs = ir_measures.calc_aggregate(wanted, qrels, run)
        ours = metrics(found, (5, 10))
        names = {"nDCG@5": "ndcg@5", "nDCG@10": "ndcg@10", "Success@5": "hr@5", "Success@10": "hr@10", "RR": "mrr"}
        for measure, value in theirs.items():
            assert ours[names[str(measure)]] == pytest.approx(value, abs=1e-6)


def by_item_number(past, users):
    """Item 5 scores highest, then 4, ..."""
    return torch.arange(6, dtype=torch.float32).expand(len(past), 6)


def test_all_users_count_once_and_those_with_too_few_events_only_train():
    three = histories([1, 2], [1, 2, 3], [4], [3, 4, 5, 1])
    assert evaluate(by_item_number, three, "test").users.tolist() == [1, 3]
    assert evaluate(by_item_number, three, "test", users=np.array([3, 0, 1, 3])).users.tolist() == [1, 3]
    assert evaluate(by_item_number, three, "test", users=np.array([3])).users.tolist() == [3]


def test_the_targets_and_the_histories_are_those_of_leave_one_out():
    read = {}

    def scorer(past, users):
        read.update({int(user): row.tolist() for user, row in zip(users, past, strict=True)})
        return by_item_number(past, users)

    two = histories([1, 2, 3], [3, 4, 5, 1])
    test = evaluate(scorer, two, "test")
    assert (test.targets.tolist(), read) == ([3, 1], {0: [1, 2], 1: [3, 4, 5]})
    assert test.all["score"].tolist() == [3, 5]
    assert test.unseen["score"].tolist() == [3, 2]
    validation = evaluate(scorer, two, "validation")
    assert (validation.targets.tolist(), read) == ([2, 5], {0: [1], 1: [3, 4]})


def test_a_user_whose_history_is_empty_is_ranked():
    read = []

    def scorer(past, users):
        read.extend(len(row) for row in past)
        return by_item_number(past, users)

    class OneEventIsEnough(Histories):
        can_be_tested = np.array([True, True])

    found = evaluate(scorer, OneEventIsEnough(np.array([3, 2, 4], np.int32), np.array([0, 1, 3]), None, ["a", "b"]), "test")
    assert sorted(read) == [0, 1]
    assert (found.all["score"].tolist(), found.unseen["score"].tolist()) == ([3, 2], [3, 2])


@pytest.mark.parametrize("block", [1, 3, 100])
def test_the_block_size_changes_nothing(block):
    rng = np.random.default_rng(0)
    many = histories(*[rng.integers(1, 30, rng.integers(1, 20)) for _ in range(17)])
    table = torch.from_numpy(rng.integers(0, 9, (30, 30)).astype(np.float32))

    def scorer(past, users):
        return torch.stack([table[row[-1]] for row in past])

    found, wanted = evaluate(scorer, many, "test", block=block), evaluate(scorer, many, "test", block=17)
    assert found.all["score"].tolist() == wanted.all["score"].tolist()
    assert found.unseen["score"].tolist() == wanted.unseen["score"].tolist()
    for user, rank_all, rank_unseen in zip(found.users, found.all["score"], found.unseen["score"], strict=True):
        row = many.items[many.cuts[user] : many.cuts[user + 1]]
        assert rank_all == slow_rank(table[row[-2]].tolist(), row[-1])
        assert rank_unseen == slow_rank(table[row[-2]].tolist(), row[-1], set(row[:-1].tolist()))


def test_of_a_large_catalogue_fewer_users_are_scored_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedssl.evaluation.SCORES_AT_ONCE", 40)
    sizes = []

    def scorer(past, users):
        sizes.append(len(users))
        return torch.zeros(len(past), 11)

    evaluate(scorer, histories(*[[1, 2, 10]] * 9), "test")
    assert sizes == [4, 4, 1]


def test_users_of_a_block_have_histories_of_nearly_the_same_length():
    lengths = []

    def scorer(past, users):
        lengths.append([len(row) for row in past])
        return by_item_number(past, users)

    evaluate(scorer, histories([1] * 9, [1] * 3, [1] * 8, [1] * 4), "test", block=2)
    assert lengths == [[2, 3], [7, 8]]


def test_parts_are_ranked_in_the_same_pass_and_the_first_is_the_recommender():
    calls = []

    def scorer(past, users):
        calls.append(len(past))
        up = by_item_number(past, users)
        return {"both": up, "upside down": -up}

    summary = evaluate(scorer, histories([1, 2, 5], [1, 2, 4]), "test", ks=(1,)).summary()
    assert calls == [2]
    assert summary["all"] == {"hr@1": 0.5, "ndcg@1": 0.5, "mrr": 0.75}
    assert list(summary["parts"]) == ["upside down"]
    assert summary["parts"]["upside down"]["unseen"]["mrr"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert "parts" not in evaluate(by_item_number, histories([1, 2, 5]), "test").summary()


def test_nobody_to_test_is_said_plainly():
    with pytest.raises(DataError, match="test: none of 2 users has the three events"):
        evaluate(by_item_number, histories([1, 2], [3]), "test")


def test_groups_by_activity_are_thirds_of_the_tested_users():
    six = histories([1, 1, 3], [1, 1, 3], [1, 1, 1, 3], [1, 1, 1, 1, 3], [2] * 9 + [3], [2] * 9 + [3], [2])
    few, middle, many = evaluate(by_item_number, six, "test").groups(six)["activity"].values()
    assert [(group["users"], group["from"], group["to"]) for group in (few, middle, many)] == [(2, 1, 1), (2, 2, 3), (2, 8, 8)]
    assert few["all"]["mrr"] == pytest.approx(1 / 3)


def test_groups_by_popularity_split_the_training_events_in_thirds():
    # Training events: item 2 six times (half of all), item 1 four, items 3 and 4 once each, item 5 never.
    four = histories([1, 1, 1, 2, 1, 1], [2, 2, 2, 2, 2], [3, 4, 2, 2, 5], [1, 2, 2, 3])
    assert training_counts(four, 5).tolist() == [0, 4, 6, 1, 1, 0]
    groups = evaluate(by_item_number, four, "test").groups(four)["popularity"]
    found = {name: (group["users"], group["from"], group["to"]) for name, group in groups.items()}
    assert found == {"head": (1, 6, 6), "middle": (1, 4, 4), "tail": (2, 0, 1)}


def test_a_group_has_the_interval_of_its_mean_at_the_last_cut_off():
    six = histories([1, 1, 3], [1, 1, 4], [1, 1, 1, 3], [1, 1, 1, 1, 4], [2] * 9 + [3], [2] * 9 + [5], [2])
    few = evaluate(by_item_number, six, "test", ks=(1, 2)).groups(six)["activity"]["few"]
    assert few["interval"]["of"] == "ndcg@2"
    # Ranks of items 3 and 4 among five: 3 and 2, or without item 1, which both met, the same.
    assert few["interval"]["all"] == few["interval"]["unseen"] == list(bootstrap_interval(np.array([0.0, 1 / math.log2(3)])))
    assert few["interval"]["all"][0] <= few["all"]["ndcg@2"] <= few["interval"]["all"][1]


def test_new_items_new_users_and_short_histories_are_groups_where_there_are_any():
    long = [1, 2] * 6
    by_time = histories([*long, 3], [1] * 5 + [2, 3], [1, 3], [*long, 2])
    # The test begins at 100, validation at 50; the third user's first event is in validation, so training never met that user.
    times = [*range(12), 100, *range(5), 60, 100, 60, 100, *range(12), 100]
    by_time = Histories(by_time.items, by_time.cuts, np.array(times, float), by_time.names, HeldFrom(50.0, 100.0))
    found = evaluate(by_item_number, by_time, "test").groups(by_time)["new"]
    assert {name: (group["users"], group["from"], group["to"]) for name, group in found.items()} == {
        "new item": (3, 0, 0),
        "new user": (1, 0, 0),
        "short history": (1, 5, 5),
    }
    old = histories([*long, 1, 1, 2], [*long, 1, 1, 2])
    assert "new" not in evaluate(by_item_number, old, "test").groups(old)


def test_the_worst_tenth_are_those_whose_targets_rank_last_in_each_column():
    # Eleven users, so the worst tenth are two: targets 1 rank fifth of all, or of unseen last of as many as are left.
    many = histories(*[[5, 4, 5]] * 9, [2, 3, 1], [2, 2, 1])
    found = evaluate(by_item_number, many, "test").groups(many)["served"]["worst tenth"]
    assert found["users"] == 2
    assert found["all"]["mrr"] == pytest.approx(1 / 5)
    assert found["unseen"]["mrr"] == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_lists_are_those_of_the_recommender_itself_and_say_what_is_in_them():
    three = histories([1, 2, 5, 3, 5], [4, 4, 1], [3, 3, 3, 2])

    def scorer(past, users):
        up = by_item_number(past, users)
        return {"both": up, "upside down": -up}

    found = evaluate(scorer, three, "test", list_length=2, block=2)
    score = list(range(6))
    assert found.lists["all"].tolist() == [slow_best(score, 2)] * 3
    assert found.lists["unseen"].tolist() == [slow_best(score, 2, met) for met in ({1, 2, 5, 3}, {4}, {3})]
    popularity = training_counts(three, 5).tolist()
    own = [sum(popularity[item] for item in read) / len(read) for read in ([1, 2, 5, 3], [4, 4], [3, 3, 3])]
    beyond = found.beyond_accuracy(three, 5)
    assert list(beyond) == ["all", "unseen", "held_out"]
    for name, lists in (*found.lists.items(), ("held_out", found.targets[:, None])):
        assert beyond[name] == pytest.approx(slow_of_lists(lists.tolist(), popularity, own))
    assert evaluate(scorer, three, "test").lists == {}
