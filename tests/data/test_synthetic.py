import time

import numpy as np
import pytest
from oracles import synthetic as oracle

from fedssl.data.histories import make_histories
from fedssl.data.readers import read_interactions, write_inter, write_lines
from fedssl.data.synthetic import make_world, synthesize, synthesize_blocks
from fedssl.errors import DataError


def test_the_same_arguments_give_the_same_events_and_another_seed_others():
    first, again, other = synthesize(50, 100, 3, mean_events=10), synthesize(50, 100, 3, mean_events=10), synthesize(50, 100, 4, mean_events=10)
    assert first.items.tolist() == again.items.tolist()
    assert first.item_tokens == again.item_tokens
    assert first.items.tolist() != other.items.tolist()


def test_blocks_written_one_after_the_other_are_the_histories_made_at_once(tmp_path, monkeypatch):
    whole = synthesize(50, 100, 3, mean_events=10)
    assert np.array_equal(next(synthesize_blocks(50, 100, 3, mean_events=10)).items, whole.items)
    monkeypatch.setattr("fedssl.data.synthetic.USERS_AT_ONCE", 20)
    whole = synthesize(50, 100, 3, mean_events=10)
    assert whole.user_tokens[::49] == ("user-01", "user-50")
    for write, name in ((write_inter, "inter"), (write_lines, "lines")):
        for number, block in enumerate(synthesize_blocks(50, 100, 3, mean_events=10)):
            assert len(block.user_tokens) == (20, 20, 10)[number]
            write(block, tmp_path / f"{name}-blocks", append=number > 0)
        write(whole, tmp_path / name)
        assert (tmp_path / f"{name}-blocks").read_text() == (tmp_path / name).read_text()
    # Blocks do not repeat one another.
    assert whole.items[whole.users < 20].tolist() != whole.items[(whole.users >= 20) & (whole.users < 40)].tolist()


@pytest.mark.parametrize("arguments", [(300, 500, 1, 40.0), (200, 33, 2, 8.0), (300, 20, 3, 5.0)])
def test_no_user_meets_an_item_twice_and_lengths_are_those_promised(arguments):
    users, items, seed, mean = arguments
    world = make_world(items, seed, topics=4)
    data = synthesize(users, items, seed, mean_events=mean, world=world)
    lengths = np.bincount(data.users)
    assert len(lengths) == users
    assert lengths.min() >= 5
    assert lengths.max() <= items // 4
    assert lengths.mean() == pytest.approx(mean, rel=0.15)
    assert len(np.unique(data.users * items + data.items)) == data.num_events
    assert data.items.max() < items


def test_items_are_repeated_where_that_is_asked_for():
    data = synthesize(100, 100, 1, mean_events=20, repeats=True)
    assert len(np.unique(data.users * 100 + data.items)) < 0.95 * data.num_events


def test_times_are_whole_seconds_that_grow_within_a_user():
    data = synthesize(100, 100, 1, mean_events=10)
    assert data.times is not None
    assert (data.times == np.rint(data.times)).all()
    assert (np.diff(data.times)[np.diff(data.users) == 0] > 0).all()
    assert (np.diff(data.users) >= 0).all()


def test_a_few_items_have_much_of_the_attention():
    counts = np.sort(np.bincount(synthesize().items, minlength=500))[::-1]
    assert counts[:50].sum() > 0.25 * counts.sum()


@pytest.mark.parametrize("seed", [1, 2])
def test_order_matters_and_there_is_more_to_learn_than_the_last_item(seed):
    world = make_world(500, seed)
    data = synthesize(2000, 500, seed, world=world)
    histories = np.split(data.items, np.cumsum(np.bincount(data.users))[:-1])
    known, targets = [items[:-1] for items in histories], np.array([items[-1] for items in histories])

    def score(scores: oracle.Scores, mask: bool) -> float:
        return oracle.ndcg_at_10(scores, known, targets, mask=mask)

    popular, together = oracle.popularity(known, 500), oracle.co_occurrence(known, 500)
    last, last_three, knowing = oracle.transitions(known, 500), oracle.transitions(known, 500, lags=3), oracle.knowing(known, world)
    for mask in (True, False):
        assert 1.2 * score(popular, mask) < score(together, mask)
        assert 1.5 * score(together, mask) < max(score(last, mask), score(last_three, mask))
        assert 1.4 * max(score(last, mask), score(last_three, mask)) < score(knowing, mask)


def test_a_hundred_thousand_users_take_seconds():
    began = time.perf_counter()
    data = synthesize(100_000)
    assert time.perf_counter() - began < 20
    assert data.num_events == pytest.approx(4_000_000, rel=0.05)


def test_blocks_of_users_change_no_promise(monkeypatch):
    monkeypatch.setattr("fedssl.data.synthetic._BLOCK_CELLS", 100 * 7)
    data = synthesize(50, 100, 1, mean_events=10)
    assert len(np.unique(data.users * 100 + data.items)) == data.num_events
    assert np.bincount(data.users).min() >= 5


def test_both_formats_give_the_same_histories_back(tmp_path):
    data = synthesize(60, 100, 1, mean_events=10)
    write_inter(data, tmp_path / "inter")
    write_lines(data, tmp_path / "lines")
    fingerprint = make_histories(data)[0].fingerprint
    assert make_histories(read_interactions(tmp_path / "inter"))[0].fingerprint == fingerprint
    assert make_histories(read_interactions(tmp_path / "lines"))[0].fingerprint == fingerprint


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: make_world(40, topics=10), "4 kinds; wanted at least 5"),
        (lambda: make_world(40, topics=0), "0 kinds"),
        (lambda: make_world(focus=1.2), "focus = 1.2 is no chance"),
        (lambda: synthesize(0), "0 users"),
        (lambda: synthesize(10, 100, mean_events=30), r"a quarter of the items \(25\)"),
        (lambda: synthesize(10, 100, mean_events=2), "2 events a user"),
    ],
)
def test_a_world_that_cannot_be_is_refused(make, says):
    with pytest.raises(DataError, match=says):
        make()
