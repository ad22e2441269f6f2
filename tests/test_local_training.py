"""Local training equals a plain loop over users, and a user trains alike alone, in a crowd and under any padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracles.loop_over_users import CALLS, masks_of, train_one_user
from torch import Tensor

from fedssl import seeds
from fedssl.checking import check
from fedssl.config import EncoderConfig, LocalConfig, RunConfig, TaskConfig
from fedssl.data.histories import Histories
from fedssl.data.windows import draw_windows
from fedssl.encoders import Encoder
from fedssl.errors import ConfigError
from fedssl.local_training import POOL, Batch, Masks, Trained, distinct_rows, make_batch, train_users
from fedssl.parts import Parts, initial_weights, make_parts
from fedssl.recipe import make_recipe
from fedssl.tasks import Chance, Task, Views
from fedssl.weights import ITEMS, Weights

ITEMS_IN_ALL, D, WINDOW = 40, 8, 6
BASE = (5, "training", 3)
SEED = 11
NEXT, SAMPLED = TaskConfig(name="next-item"), TaskConfig(name="next-item", negatives=12)
CLOZE, SAMPLED_CLOZE = TaskConfig(name="masked-item", keep=0.5), TaskConfig(name="masked-item", keep=0.5, negatives=12)
CONTRAST = TaskConfig(name="contrastive", weight=0.3, negatives=3, keep=0.5)
HISTORIES = (
    [3, 1, 4, 1, 5],  # an item twice
    list(range(10, 27)),  # longer than the window
    [7, 7, 7, 7, 7],  # nothing else
    [2, 9],  # one position
    [8],  # no position
    [],  # nobody yet
    [9, 2, 6, 5, 3, 5, 8],  # just the window and one target
)


@pytest.fixture
def double() -> Iterator[None]:
    """Everything in float64, so that differences are mistakes and not rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Case(NamedTuple):
    config: RunConfig
    histories: Histories
    parts: Parts
    weights: Weights
    heads_UD: Tensor | None

    def batch(self, users: Sequence[int]) -> Batch:
        some = np.array(users, dtype=np.int64)
        return make_batch(
            self.parts.tasks, self.histories, some, some + 100, base=BASE, local=self.config.local, window=self.config.encoder.window, num_items=ITEMS_IN_ALL
        )

    def train(self, users: Sequence[int], batch: Batch | None = None) -> Trained:
        return train_users(
            self.parts.encoder,
            self.parts.tasks,
            self.weights,
            batch or self.batch(users),
            local=self.config.local,
            window=self.config.encoder.window,
            dropout=self.config.encoder.dropout,
            seed=SEED,
            heads_UD=self.heads_UD[list(users)] if self.heads_UD is not None else None,
            head_lr=0.7,
        )


def histories_of(rows: Sequence[Sequence[int]]) -> Histories:
    """Histories of which everything is training: two events of row 40 follow each, for validation and test."""
    whole = [[*row, ITEMS_IN_ALL, ITEMS_IN_ALL] if row else [] for row in rows]
    cuts = np.concatenate([[0], np.cumsum([len(row) for row in whole])]).astype(np.int64)
    return Histories(np.array([item for row in whole for item in row], dtype=np.int32), cuts, None, tuple(str(user) for user in range(len(rows))))


def a_case(
    *,
    tasks: tuple[TaskConfig, ...] = (NEXT,),
    head: bool = False,
    dropout: float = 0.0,
    histories: Sequence[Sequence[int]] = HISTORIES,
    blocks: int = 2,
    encoder: str = "sasrec",
    **local: Any,
) -> Case:
    widths = EncoderConfig(name=encoder, width=D, window=WINDOW, hidden=12, heads=2, blocks=blocks, dropout=dropout)
    config = RunConfig(encoder=widths, task=tasks, local=LocalConfig(**{"lr": 0.1, **local}))
    recipe = make_recipe(config, num_items=ITEMS_IN_ALL, catalogue="")
    rng = torch.Generator().manual_seed(1)
    # All weights off their first values, row 0 of the table too: zeros and ones would hide mistakes.
    weights = {name: leaf + 0.3 * torch.randn(leaf.shape, generator=rng) for name, leaf in initial_weights(recipe).items()}
    heads_UD = torch.randn(len(histories), D, generator=rng) if head else None
    return Case(config, histories_of(histories), make_parts(recipe), weights, heads_UD)


def all_rows(trained: Trained) -> Tensor:
    """Updates of the whole table, (U, I + 1, D)."""
    if trained.rows_UK is None:
        return trained.items
    whole = torch.zeros(len(trained.items), ITEMS_IN_ALL + 1, D)
    for user, rows_K in enumerate(trained.rows_UK):
        whole[user].index_add_(0, rows_K, trained.items[user])
    return whole


def assert_close(left: Tensor, right: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest number on the right."""
    assert left.shape == right.shape
    largest = float(right.abs().max())
    assert float((left - right).abs().max()) <= tolerance * largest + (1e-300 if largest == 0 else 0)


def assert_equals_the_loop(case: Case, tolerance: float) -> None:
    users = list(range(case.histories.num_users))
    trained = case.train(users)
    items_UID = all_rows(trained)
    config, local = case.config, case.config.local
    numbers = np.array(users) + 100
    keys = seeds.keys_of_users(seeds.key(*BASE, "windows"), numbers)
    windows = draw_windows(case.histories, np.array(users), keys, steps=local.steps, windows=local.windows, length=WINDOW)
    drawn = [task.draw(windows, Chance((*BASE, number), numbers, WINDOW)) for number, (task, _) in enumerate(case.parts.tasks)]
    full = any(views.ranks_all for views in drawn)

    def windows_of(number: int, call: int) -> int:
        return drawn[number].sequences[CALLS[config.task[number].name][call]].shape[2]

    for user in users:
        mine = [
            Views({name: rows[user] for name, rows in views.sequences.items()}, views.candidates[user] if views.candidates is not None else None, full)
            for views in drawn
        ]
        masks = masks_of(BASE, user + 100, windows_of, seed=SEED, encoder=config.encoder, sites=case.parts.encoder.dropout_sites)
        one = train_one_user(
            case.weights,
            mine,
            config.task,
            config.encoder,
            local,
            masks=masks if config.encoder.dropout else None,
            head_D=case.heads_UD[user] if case.heads_UD is not None else None,
            head_lr=0.7,
        )
        for name, leaf in one.update.items():
            assert_close(trained.update[name][user], leaf, tolerance)
        assert_close(items_UID[user], one.items_ID, tolerance)
        if one.head_D is not None:
            assert trained.heads_UD is not None
            assert_close(trained.heads_UD[user], one.head_D, tolerance)
        assert float(trained.loss_U[user]) == pytest.approx(one.loss, rel=tolerance)


CASES: dict[str, dict[str, Any]] = {
    "one step, full softmax": {},
    "three steps, full softmax": {"steps": 3},
    "one step, sampled softmax": {"tasks": (SAMPLED,)},
    "three steps, sampled softmax": {"tasks": (SAMPLED,), "steps": 3},
    "several windows": {"tasks": (SAMPLED,), "steps": 2, "windows": 3},
    "a task weight": {"tasks": (NEXT.model_copy(update={"weight": 0.4}),)},
    "weight decay, full": {"steps": 2, "weight_decay": 0.1},
    "weight decay, sampled": {"tasks": (SAMPLED,), "steps": 2, "weight_decay": 0.1},
    "proximal, full": {"steps": 3, "proximal": 2.0},
    "proximal, sampled": {"tasks": (SAMPLED,), "steps": 3, "proximal": 2.0},
    "head": {"head": True, "steps": 3},
    "head, sampled": {"tasks": (SAMPLED,), "head": True, "steps": 2},
    "dropout": {"dropout": 0.3, "steps": 2, "windows": 2},
    "contrast alone": {"tasks": (CONTRAST,), "steps": 2, "windows": 2},
    "contrast beside the full softmax": {"tasks": (NEXT, CONTRAST), "steps": 2},
    "no block": {"blocks": 0, "steps": 2},
    "everything": {"tasks": (SAMPLED, CONTRAST), "head": True, "dropout": 0.2, "steps": 3, "windows": 2, "weight_decay": 0.05, "proximal": 0.5},
    "gru4rec": {"encoder": "gru4rec", "steps": 3, "blocks": 1},
    "gru4rec, everything": {"encoder": "gru4rec", "tasks": (SAMPLED, CONTRAST), "head": True, "dropout": 0.2, "steps": 3, "windows": 2, "weight_decay": 0.05},
    "hgrn": {"encoder": "hgrn", "steps": 3},
    "hgrn, everything": {"encoder": "hgrn", "tasks": (SAMPLED, CONTRAST), "head": True, "dropout": 0.2, "steps": 3, "windows": 2, "weight_decay": 0.05},
    "bert4rec": {"encoder": "bert4rec", "tasks": (CLOZE,), "steps": 3, "windows": 2},
    "bert4rec, everything": {
        "encoder": "bert4rec",
        "tasks": (SAMPLED_CLOZE, CONTRAST),
        "head": True,
        "dropout": 0.2,
        "steps": 3,
        "windows": 3,
        "weight_decay": 0.05,
    },
}


EVERYTHING = [name for name in CASES if name.endswith("everything")]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_training_equals_a_plain_loop_over_users(case: dict[str, Any]):
    assert_equals_the_loop(a_case(**case), 1e-10)


@pytest.mark.parametrize("name", ["three steps, full softmax", *EVERYTHING])
def test_training_equals_a_plain_loop_over_users_in_float32(name: str):
    # Three steps of the cloze with contrast amplify rounding; in double precision both agree to 1e-14.
    assert_equals_the_loop(a_case(**CASES[name]), 3e-4 if name == "bert4rec, everything" else 1e-5)


def assert_alike(alone: Trained, crowd: Trained, place: int, tolerance: float) -> None:
    for name, leaf in alone.update.items():
        assert_close(leaf[0], crowd.update[name][place], tolerance)
    assert_close(all_rows(alone)[0], all_rows(crowd)[place], tolerance)
    if alone.heads_UD is not None and crowd.heads_UD is not None:
        assert_close(alone.heads_UD[0], crowd.heads_UD[place], tolerance)
    assert_close(alone.loss_U[0], crowd.loss_U[place], tolerance)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_user_trains_alike_alone_and_in_a_crowd(case: dict[str, Any]):
    setup = a_case(**case)
    crowd = setup.train([4, 1, 6, 0, 5, 3, 2])
    for place, user in enumerate([4, 1, 6, 0, 5, 3, 2]):
        assert_alike(setup.train([user]), crowd, place, 1e-12)


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_user_trains_alike_alone_and_in_a_crowd_in_float32(name: str):
    setup = a_case(**CASES[name])
    crowd = setup.train(range(7))
    for user in (0, 1, 2, 6):
        assert_alike(setup.train([user]), crowd, user, 4e-6)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", [*EVERYTHING, "dropout", "contrast beside the full softmax"])
def test_more_padding_changes_nothing(name: str):
    setup = a_case(**{**CASES[name], "histories": HISTORIES[2:5]})
    batch = setup.batch([0, 1, 2])
    wider = tuple({key: torch.nn.functional.pad(rows, (WINDOW - rows.shape[-1], 0)) for key, rows in named.items()} for named in batch.sequences)
    assert wider[0]["read"].shape[-1] > batch.sequences[0]["read"].shape[-1]
    padded = setup.train([0, 1, 2], replace(batch, sequences=wider))
    for user in range(3):
        trained = setup.train([0, 1, 2], batch)
        assert_close(padded.items[user], trained.items[user], 1e-12)
        for leaf in trained.update:
            assert_close(padded.update[leaf][user], trained.update[leaf][user], 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_slope_of_row_0_is_exactly_0_and_its_values_are_never_read(name: str):
    setup = a_case(**CASES[name])
    trained = setup.train(range(7))
    assert (all_rows(trained)[:, 0] == 0).all()
    if trained.rows_UK is not None:
        assert (trained.items[trained.rows_UK == 0] == 0).all()
    setup.weights[ITEMS][0] += 100.0
    again = setup.train(range(7))
    assert torch.equal(again.items, trained.items)
    assert all(torch.equal(again.update[leaf], trained.update[leaf]) for leaf in trained.update)


@pytest.mark.parametrize("name", ["three steps, sampled softmax", "everything"])
def test_the_rows_a_user_touches_are_distinct_and_the_scattered_norm_is_the_coalesced_one(name: str):
    trained = a_case(**CASES[name]).train(range(7))
    assert trained.rows_UK is not None
    for rows_K in trained.rows_UK:
        real = rows_K[rows_K > 0].tolist()
        assert len(set(real)) == len(real)
    torch.testing.assert_close(all_rows(trained).flatten(1).norm(dim=1), trained.items.flatten(1).norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("tasks", [(NEXT,), (SAMPLED,), (SAMPLED, CONTRAST)], ids=["full", "sampled", "with contrast"])
def test_a_user_with_nothing_to_learn_from_has_an_update_and_a_loss_of_exactly_0(tasks: tuple[TaskConfig, ...], decay: float):
    setup = a_case(tasks=tasks, dropout=0.3, steps=2, weight_decay=decay, head=True)
    batch = setup.batch(range(7))
    has_contrast = len(tasks) > 1
    assert batch.is_idle_U.tolist() == [False, False, False, False, not has_contrast, True, False]
    trained = setup.train(range(7))
    assert (trained.loss_U == 0).tolist() == batch.is_idle_U.tolist()
    for user, is_idle in enumerate(batch.is_idle_U.tolist()):
        leaves = [*trained.update.values(), trained.items]
        assert all((leaf[user] == 0).all() for leaf in leaves) == is_idle
    assert trained.heads_UD is not None and setup.heads_UD is not None
    assert torch.equal(trained.heads_UD[4:6], setup.heads_UD[4:6])


def test_weight_decay_acts_on_the_encoder_and_on_touched_rows_only():
    for tasks in ((NEXT,), (SAMPLED,)):
        plain, decayed = (a_case(tasks=tasks, histories=HISTORIES[:1], weight_decay=decay) for decay in (0.0, 0.5))
        difference = all_rows(decayed.train([0]))[0] - all_rows(plain.train([0]))[0]
        touched = {1, 3, 4, 5} | (set(decayed.batch([0]).rows_UK[0].tolist()) if tasks == (SAMPLED,) else set()) - {0}  # type: ignore[index]
        for row in range(ITEMS_IN_ALL + 1):
            wanted = -0.1 * 0.5 * plain.weights[ITEMS][row] if row in touched else torch.zeros(D)
            torch.testing.assert_close(difference[row], wanted, rtol=1e-4, atol=1e-6)
        for name, leaf in decayed.train([0]).update.items():
            torch.testing.assert_close(leaf[0] - plain.train([0]).update[name][0], -0.05 * plain.weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("double")
def test_the_proximal_term_by_hand():
    """Two steps: the second takes back lr * proximal of what the first did, in the encoder and in the rows, not in the head."""
    one, plain, pulled = (
        a_case(tasks=(SAMPLED,), head=True, histories=HISTORIES[:1], **local).train([0])
        for local in ({"steps": 1}, {"steps": 2}, {"steps": 2, "proximal": 3.0})
    )
    for name, leaf in pulled.update.items():
        torch.testing.assert_close(leaf, plain.update[name] - 0.1 * 3.0 * one.update[name])
    torch.testing.assert_close(pulled.items, plain.items - 0.1 * 3.0 * one.items)
    assert plain.heads_UD is not None and pulled.heads_UD is not None and torch.equal(pulled.heads_UD, plain.heads_UD)


@pytest.mark.parametrize("tasks", [(NEXT,), (SAMPLED,)], ids=["full", "sampled"])
def test_the_proximal_term_moves_no_row_that_the_loss_does_not_read_and_nothing_in_the_first_step(tasks: tuple[TaskConfig, ...]):
    plain, pulled = (a_case(tasks=tasks, steps=3, proximal=strength).train([0, 1, 2, 6]) for strength in (0.0, 5.0))
    still = all_rows(plain) == 0
    assert still[:, 1:].any() == (tasks == (SAMPLED,)) and (all_rows(pulled)[still] == 0).all()
    assert not torch.equal(all_rows(plain), all_rows(pulled))
    once, same = (a_case(tasks=tasks, steps=1, proximal=strength).train([0, 1, 2, 6]) for strength in (0.0, 5.0))
    assert torch.equal(once.items, same.items) and all(torch.equal(once.update[name], same.update[name]) for name in once.update)


def test_a_proximal_term_that_would_overshoot_is_refused():
    with pytest.raises(ConfigError, match=r"lr \* proximal = 1.5 pulls beyond the round's weights; keep proximal at most 2"):
        check(LocalConfig, {"lr": 0.5, "proximal": 3.0}, where="run.toml")


def test_a_user_whose_head_is_nan_breaks_nobody_else():
    setup = a_case(tasks=(SAMPLED,), head=True, steps=2)
    well = setup.train(range(7))
    assert setup.heads_UD is not None
    setup.heads_UD[1] = math.nan
    ill = setup.train(range(7))
    assert ill.items[1].isnan().any()
    others = [0, 2, 3, 4, 5, 6]
    assert torch.equal(ill.items[others], well.items[others])
    assert all(torch.equal(ill.update[name][others], well.update[name][others]) for name in well.update)


def test_training_changes_neither_the_weights_nor_the_heads_it_was_given():
    setup = a_case(**CASES["everything"])
    assert setup.heads_UD is not None
    weights, heads = {name: leaf.clone() for name, leaf in setup.weights.items()}, setup.heads_UD.clone()
    setup.train(range(7))
    assert all(torch.equal(setup.weights[name], leaf) for name, leaf in weights.items())
    assert torch.equal(setup.heads_UD, heads)


def test_an_encoder_may_add_two_weights_up():
    """Their slopes are one tensor, which must not be scaled twice."""

    def encode(weights: Weights, rows_UBLD: Tensor, is_padding_UBL: Tensor, masks: Sequence[Tensor]) -> Tensor:
        return rows_UBLD + (weights["a"] + weights["b"])[:, None, None]

    encoder = Encoder(init=lambda rng: {}, encode=encode, dropout_sites=0)
    setup = a_case(histories=HISTORIES[:2])
    weights = {"a": torch.zeros(D), "b": torch.zeros(D), ITEMS: setup.weights[ITEMS]}
    trained = train_users(encoder, setup.parts.tasks, weights, setup.batch([0, 1]), local=LocalConfig(lr=0.1), window=WINDOW)
    table = weights[ITEMS].clone()
    shift = torch.zeros(D, requires_grad=True)
    read, target = setup.batch([0]).sequences[0]["read"][0, 0, 0], setup.batch([0]).sequences[0]["target"][0, 0, 0]
    torch.nn.functional.cross_entropy((table[read] + shift) @ table[1:].T, target - 1).backward()
    assert shift.grad is not None
    for name in "ab":
        torch.testing.assert_close(trained.update[name][0], -0.1 * shift.grad)


def views_of(*sequences: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]] | None = None) -> Views:
    """One step and one window a user, as catalogue rows."""
    named = {str(number): np.array(rows, dtype=np.int64)[:, None, None] for number, rows in enumerate(sequences)}
    return Views(named, np.array(candidates, dtype=np.int64) if candidates is not None else None)


def test_distinct_rows_by_hand():
    views = views_of([[0, 5, 2, 5], [0, 0, 0, 9]], candidates=[[7, 2, 7, 3], [1, 9, 9, 8]])
    (named,), rows_UK, first, is_real_UN = distinct_rows([views])
    assert first == 3
    # [padding | own, sorted, filled up | candidates, sorted: no own one, none twice]
    assert rows_UK.tolist() == [[0, 2, 5, 0, 3, 7, 0], [0, 9, 0, 1, 8, 0, 0]]
    assert is_real_UN.tolist() == [[False, True, True, False], [True, True, False, False]]
    assert named["0"][:, 0, 0].tolist() == [[0, 2, 1, 2], [0, 0, 0, 1]]


def test_distinct_rows_name_what_the_views_named():
    rng = np.random.default_rng(0)
    drawn = [
        Views({"a": rng.integers(0, 9, (5, 2, 3, 4)), "b": rng.integers(0, 9, (5, 2, 1, 6))}, candidates=rng.integers(1, 15, (5, 7))),
        Views({"a": rng.integers(0, 12, (5, 2, 2, 2))}),
    ]
    sequences, rows_UK, first, is_real_UN = distinct_rows(drawn)
    for views, named in zip(drawn, sequences, strict=True):
        for name, rows in views.sequences.items():
            assert rows_UK.gather(1, named[name].flatten(1)).view(rows.shape).tolist() == rows.tolist()
    for user in range(5):
        own = {row for views in drawn for rows in views.sequences.values() for row in rows[user].reshape(-1).tolist()} - {0}
        assert set(rows_UK[user, :first].tolist()) - {0} == own
        assert drawn[0].candidates is not None
        assert rows_UK[user, first:][is_real_UN[user]].tolist() == sorted(set(drawn[0].candidates[user].tolist()) - own)


def test_own_items_stand_for_themselves_and_drawn_candidates_for_all_others():
    batch = a_case(tasks=(SAMPLED,)).batch([0, 4])
    assert batch.rows_UK is not None and batch.bias_UN is not None
    for rows, bias, own in zip(batch.rows_UK.tolist(), batch.bias_UN.tolist(), [4, 0], strict=True):
        real = [(row, of) for row, of in zip(rows[1:], bias, strict=True) if row > 0]
        assert all(of == -math.inf for row, of in zip(rows[1:], bias, strict=True) if row == 0)
        assert [of for _, of in real[:own]] == [0.0] * own
        assert [of for _, of in real[own:]] == pytest.approx([math.log((ITEMS_IN_ALL - own) / (len(real) - own))] * (len(real) - own))


def test_positions_are_the_events_of_the_windows_that_have_a_next_one():
    batch = a_case(steps=2, windows=3).batch(range(7))
    assert batch.positions_U.tolist() == [6 * 4, 6 * WINDOW, 6 * 4, 6 * 1, 0, 0, 6 * WINDOW]


def masks(users: Sequence[int], *, rate: float = 0.25, window: int = WINDOW, width: int = D, step: int = 0) -> Masks:
    encoder = make_parts(make_recipe(RunConfig(encoder=EncoderConfig(width=D, window=WINDOW, heads=2)), num_items=ITEMS_IN_ALL, catalogue="")).encoder
    return Masks(encoder, (*BASE, 0, step), np.array(users), seed=SEED, rate=rate, window=window, width=width)


def test_dropout_zeroes_the_asked_share_and_scales_the_rest():
    (first, *others) = masks(range(300)).draw(2, WINDOW)
    assert len(others) == 4
    assert first.shape == (300, 2, WINDOW, D)
    assert first.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    share = (first == 0).double().mean()
    assert abs(float(share) - 0.25) < 5 * (0.25 * 0.75 / first.numel()) ** 0.5


def test_a_mask_depends_on_the_user_the_call_the_step_and_the_site_and_not_on_company_or_padding():
    drawn = masks([7, 8, 9])
    first, second = drawn.draw(2, WINDOW), drawn.draw(2, WINDOW)
    alone = masks([8]).draw(2, 3)
    assert torch.equal(alone[1][0], first[1][1, :, -3:])
    different = [first[0][0], first[0][1], first[1][0], second[0][0], masks([7], step=1).draw(2, WINDOW)[0][0]]
    assert len({tuple(mask.reshape(-1).tolist()) for mask in different}) == 5
    assert not torch.equal(first[0][0, 0], first[0][0, 1])


def test_a_window_larger_than_the_pool_has_masks_too():
    wide = masks([1, 2], window=POOL // 4, width=8)
    assert wide.draw(1, 2)[0].shape == (2, 1, 2, 8)
    (mask, *_) = wide.draw(1, POOL // 4)
    assert abs(float((mask == 0).double().mean()) - 0.25) < 0.01


def test_a_task_that_ranks_the_whole_catalogue_gives_its_rows_to_all():
    batch = a_case(tasks=(NEXT, SAMPLED)).batch([0])
    assert batch.rows_UK is None and batch.bias_UN is None
    assert batch.sequences[1]["read"][0, 0, 0].tolist() == [3, 1, 4, 1]


def test_a_task_weight_scales_loss_and_update():
    whole, half = (a_case(tasks=(NEXT.model_copy(update={"weight": weight}),)).train([0, 1]) for weight in (1.0, 0.5))
    torch.testing.assert_close(half.loss_U, 0.5 * whole.loss_U)
    torch.testing.assert_close(half.items, 0.5 * whole.items)


def test_the_loss_is_that_of_the_first_step():
    again = a_case(steps=3, histories=[[1, 2, 3]])
    once = a_case(steps=1, histories=[[1, 2, 3]])
    assert torch.equal(again.train([0]).loss_U, once.train([0]).loss_U)


def test_a_custom_task_reads_only_its_own_sequences():
    """Task numbers, not names, say which sequences are whose."""

    def draw(windows_USBL1: NDArray[np.int64], chance: Chance) -> Views:
        return Views({"read": windows_USBL1[..., -1:]})

    def loss(model: Any, sequences: Any) -> Tensor:
        result: Tensor = model.encode(sequences["read"]).square().sum((1, 2, 3))
        assert sequences["read"].shape[-1] == 1
        return result

    setup = a_case()
    tasks = (setup.parts.tasks[0], (Task(draw, loss), 1.0))
    some = np.array([0, 1])
    batch = make_batch(tasks, setup.histories, some, some, base=BASE, local=setup.config.local, window=WINDOW, num_items=ITEMS_IN_ALL)
    trained = train_users(setup.parts.encoder, tasks, setup.weights, batch, local=setup.config.local, window=WINDOW)
    assert (trained.loss_U > setup.train([0, 1]).loss_U).all()


@pytest.mark.usefixtures("double")
def test_a_summed_loss_is_the_mean_times_the_share_of_a_full_window():
    users = list(range(len(HISTORIES)))
    mean, summed = a_case(reduction="mean", windows=2), a_case(reduction="sum", windows=2)
    share_U = torch.from_numpy(mean.batch(users).positions_U / (2 * WINDOW)).double()
    for name, leaf in summed.train(users).update.items():
        assert_close(leaf, mean.train(users).update[name] * share_U.view(-1, *[1] * (leaf.dim() - 1)), 1e-12)
    assert_close(summed.train(users).loss_U, mean.train(users).loss_U * share_U, 1e-12)


def test_a_summed_loss_with_weights_by_positions_is_refused():
    with pytest.raises(ConfigError, match="weighs long histories twice"):
        check(RunConfig, {"local": {"reduction": "sum"}, "server": {"weighting": "positions"}}, where="test")
