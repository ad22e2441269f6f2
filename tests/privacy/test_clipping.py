"""Clipping and adding: no user is longer than the clip norm, exactly; sums do not depend on order; broken users are zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedssl.config import EncoderConfig, LocalConfig, RunConfig, TaskConfig
from fedssl.data.histories import Histories
from fedssl.local_training import Trained, make_batch, train_users
from fedssl.parts import initial_weights, make_parts
from fedssl.privacy.clipping import Clipped, GridTotal, squared_norms
from fedssl.privacy.grid import grid_step
from fedssl.recipe import make_recipe
from fedssl.weights import ITEMS, layout_of

TABLE, D = 6, 2
LAYOUT = layout_of({"a": torch.zeros(3), "b": torch.zeros(2, 2), ITEMS: torch.zeros(TABLE, D)})
P = LAYOUT.num_weights


def trained(users: Tensor, rows: Sequence[Sequence[int]] | None = None) -> Trained:
    """Updates (U, 7 + K * D) as training leaves them: "a", "b", then the items at ``rows`` (None: of the whole table)."""
    U, K = len(users), TABLE if rows is None else len(rows[0])
    update = {"a": users[:, :3], "b": users[:, 3:7].reshape(U, 2, 2)}
    rows_UK = torch.tensor(rows) if rows is not None else None
    return Trained(update, users[:, 7:].reshape(U, K, D), rows_UK, None, torch.zeros(U))


def add(users: Tensor, rows: Sequence[Sequence[int]] | None = None, *, clip_norm: float | None, step: float | None = None, weights: Sequence[float] = ()):
    """The total in whole steps, and what is known of the users."""
    total = GridTotal(LAYOUT)
    weight_U = torch.tensor(weights) if weights else torch.ones(len(users))
    clipped: Clipped = total.add(trained(users, rows), clip_norm=clip_norm, step=step or grid_step(clip_norm or 1.0), weight_U=weight_U)
    return total.total_P, clipped


def exact_norm_is_within(total_P: Tensor, clip_norm: float) -> bool:
    """In whole numbers and fractions: no rounding anywhere."""
    return sum(value * value for value in total_P.tolist()) * Fraction(grid_step(clip_norm)) ** 2 <= Fraction(clip_norm) ** 2


def test_clipping_by_hand():
    users = torch.zeros(2, P)
    users[0, 0], users[0, -1] = 3.0, -4.0
    users[1, 3] = 0.25
    rows = [[0, 5, 2, 1, 3, 4]] * 2
    total_P, clipped = add(users, rows, clip_norm=1.0)
    assert clipped.norms_U.tolist() == [5.0, 0.25]
    assert clipped.is_broken_U.tolist() == [False, False]
    kept = (1 - 2.0**-16) * 2**24
    wanted = torch.zeros(P)
    wanted[0], wanted[3] = math.floor(0.6 * kept), 2**22
    # The last of the user's rows is row 4 of the table.
    wanted[7 + 4 * D + 1] = -math.floor(0.8 * kept)
    assert (total_P - wanted).abs().max() <= 1
    assert total_P[3] == 2**22 and (total_P != 0).sum() == 3


@st.composite
def straining(draw: st.DrawFn) -> tuple[Tensor, float]:
    """One user's update of the kinds that strain float32, and a clip norm."""
    clip_norm = draw(st.floats(1e-6, 1e6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "equal", "spread", "one"]))
    values = {
        "normal": rng.standard_normal(P),
        "equal": np.full(P, rng.random() + 0.5) * rng.choice([-1, 1], P),
        "spread": rng.standard_normal(P) * 10.0 ** rng.integers(-12, 3, P),
        "one": np.eye(P)[rng.integers(P)] * rng.choice([-1, 1]),
    }[kind]
    length = draw(st.sampled_from([1 - 2.0**-16, 1 - 2.0**-20, 1.0, 1 + 2.0**-20, 1 + 2.0**-10, 2.0, 1e4, 0.5, 1e-3]))
    norm = float(np.linalg.norm(values.astype(np.float32).astype(np.float64)))
    return torch.from_numpy((values * (clip_norm * length / norm)).astype(np.float32))[None], clip_norm


@settings(max_examples=300, deadline=None)
@given(straining())
def test_no_user_leaves_longer_than_the_clip_norm_exactly_in_integers(case: tuple[Tensor, float]):
    user, clip_norm = case
    total_P, _ = add(user, clip_norm=clip_norm)
    assert exact_norm_is_within(total_P, clip_norm)


@settings(max_examples=300, deadline=None)
@given(straining())
def test_a_short_update_passes_unchanged_up_to_one_step_and_a_long_one_keeps_its_direction(case: tuple[Tensor, float]):
    user, clip_norm = case
    step = grid_step(clip_norm)
    total_P, clipped = add(user, clip_norm=clip_norm)
    exact = user[0].double()
    norm = float(exact.norm())
    assert float(clipped.norms_U) == pytest.approx(norm, rel=2.0**-18)
    if norm <= clip_norm * (1 - 2.0**-15):
        assert total_P.tolist() == (exact / step).trunc().long().tolist()
    else:
        shortened = exact * min(1.0, clip_norm * (1 - 2.0**-16) / norm)
        assert ((total_P * step - shortened).abs() <= step + shortened.abs() * 2.0**-17).all()


def test_a_long_update_of_many_equal_coordinates_stays_within_the_clip_norm():
    """Where float32 sums of squares stray most."""
    for many in (1_000, 65_537, 1_000_003):
        layout = layout_of({"a": torch.zeros(many), ITEMS: torch.zeros(2, 1)})
        for value in (1.0000001, 0.1, 3.3):
            total = GridTotal(layout)
            update = Trained({"a": torch.full((1, many), value)}, torch.zeros(1, 2, 1), None, None, torch.zeros(1))
            total.add(update, clip_norm=0.7, step=grid_step(0.7), weight_U=torch.ones(1))
            squares = int((total.total_P.numpy().astype(object) ** 2).sum()) if many < 2_000 else int(total.total_P[0]) ** 2 * many
            assert (total.total_P[:many] == total.total_P[0]).all()
            assert Fraction(squares) * Fraction(grid_step(0.7)) ** 2 <= Fraction(0.7) ** 2


@pytest.mark.parametrize("negatives", [0, 8], ids=["full", "sampled"])
def test_what_training_leaves_of_repeated_items_stays_within_the_clip_norm(negatives: int):
    config = RunConfig(
        encoder=EncoderConfig(width=8, window=8, hidden=8, blocks=1),
        task=(TaskConfig(name="next-item", negatives=negatives),),
        local=LocalConfig(lr=10.0, steps=2, windows=2),
    )
    recipe = make_recipe(config, num_items=12, catalogue="")
    parts, users = make_parts(recipe), np.arange(3)
    items = np.array([7, 7, 7, 7, 7, 7, 1, 1, 1, 2, 1, 2, 1, 2, 1, 1, *range(1, 9)], dtype=np.int32)
    histories = Histories(items, np.array([0, 8, 16, 24]), None, ("a", "b", "c"))
    batch = make_batch(parts.tasks, histories, users, users, base=(1,), local=config.local, window=8, num_items=12)
    updates = train_users(parts.encoder, parts.tasks, initial_weights(recipe), batch, local=config.local, window=8)
    for user in users:
        total = GridTotal(parts.layout)
        rows_UK = updates.rows_UK[[user]] if updates.rows_UK is not None else None
        one = Trained({name: leaf[[user]] for name, leaf in updates.update.items()}, updates.items[[user]], rows_UK, None, updates.loss_U[[user]])
        clipped = total.add(one, clip_norm=0.3, step=grid_step(0.3), weight_U=torch.ones(1))
        assert float(clipped.norms_U) > 0.3
        length = math.sqrt(sum(value * value for value in total.total_P.tolist())) * grid_step(0.3)
        assert length > 0.2999
        assert exact_norm_is_within(total.total_P, 0.3)


def test_a_zero_update_stays_zero():
    total_P, clipped = add(torch.zeros(3, P), clip_norm=1.0)
    assert not total_P.any()
    assert clipped.norms_U.tolist() == [0, 0, 0] and not clipped.is_broken_U.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 4, P - 1], ids=["a", "b", "items"])
@pytest.mark.parametrize("clip_norm", [1.0, None], ids=["clip", "no clip"])
def test_a_broken_user_counts_as_zero_and_the_others_stay(bad: float, place: int, clip_norm: float | None):
    users = 0.01 * torch.randn(10, P, generator=torch.Generator().manual_seed(0))
    well = users.clone()
    well[3] = 0.0
    users[3, place] = bad
    for rows in (None, [[0, 5, 2, 1, 3, 4]] * 10):
        total_P, clipped = add(users, rows, clip_norm=clip_norm, step=2.0**-24)
        assert clipped.is_broken_U.tolist() == [user == 3 for user in range(10)]
        assert torch.equal(total_P, add(well, rows, clip_norm=clip_norm, step=2.0**-24)[0])
        assert total_P.any()


def test_without_a_clip_a_coordinate_beyond_the_grid_breaks_its_user_alone():
    step = 2.0**-10
    largest = 2**24 * step
    users = torch.zeros(4, P)
    users[0, 2], users[1, 2], users[2, -1], users[3, 5] = largest, largest * (1 - 2.0**-24), -largest, 1.0
    total_P, clipped = add(users, clip_norm=None, step=step)
    assert clipped.is_broken_U.tolist() == [True, False, True, False]
    assert total_P[2] == 2**24 - 1 and total_P[-1] == 0 and total_P[5] == 2**10


def test_without_a_clip_a_long_update_of_small_coordinates_is_whole():
    users = torch.full((1, P), 2.0**13)
    total_P, clipped = add(users, clip_norm=None, step=2.0**-10)
    assert float(clipped.norms_U) >= 2.0**14
    assert not clipped.is_broken_U.any() and total_P.tolist() == [2**23] * P


def test_coordinates_are_rounded_toward_zero():
    users = torch.zeros(2, P)
    users[0, :4] = torch.tensor([2.9, -2.9, 0.9, -0.9]) * 2.0**-24
    assert add(users, clip_norm=1.0)[0][:4].tolist() == [2, -2, 0, 0]


@pytest.mark.parametrize("rows_are_own", [True, False], ids=["own rows", "whole table"])
def test_any_order_and_any_chunks_of_users_give_the_same_integers(rows_are_own: bool):
    rng = np.random.default_rng(0)
    users = torch.from_numpy(rng.standard_normal((37, P)).astype(np.float32))
    rows = [[0, *(1 + rng.permutation(TABLE - 1)[: TABLE - 1]).tolist()] for _ in range(37)] if rows_are_own else None
    if rows_are_own:
        users[:, 7:9] = 0.0
    weights = rng.random(37).astype(np.float32).tolist()
    wanted, _ = add(users, rows, clip_norm=1.5, weights=weights)
    for cut in (1, 5, 8, 36):
        order = rng.permutation(37)
        total = GridTotal(LAYOUT)
        for first in range(0, 37, cut):
            some = order[first : first + cut]
            own = [rows[user] for user in some] if rows is not None else None
            total.add(trained(users[some], own), clip_norm=1.5, step=grid_step(1.5), weight_U=torch.tensor(weights)[some])
        assert torch.equal(total.total_P, wanted)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_hundreds_of_users_at_the_clip_norm_do_not_overflow(sign: float):
    users = torch.zeros(700, P)
    users[:, 0] = sign * 99.0
    users[:, -1] = 0.001
    (one_P, _), (total_P, _) = add(users[:1], clip_norm=1.0), add(users, clip_norm=1.0)
    assert abs(int(one_P[0])) > 2**23.9
    assert torch.equal(total_P, 700 * one_P)


def test_the_norms_are_those_of_all_users_in_their_order():
    users = torch.zeros(21, P)
    users[:, 3] = torch.arange(21)
    assert add(users, clip_norm=1.0)[1].norms_U.tolist() == list(range(21))


def test_a_weight_between_0_and_1_shortens_after_the_clip():
    users = torch.zeros(3, P)
    users[:, 0] = 8.0
    users[2, 0] = 0.5
    for weights, wanted in (([1.0, 0.0, 0.0], 1.0), ([0.25, 0.0, 0.0], 0.25), ([0.0, 0.0, 0.5], 0.25), ([0.0, 0.0, 0.0], 0.0)):
        total_P, _ = add(users, clip_norm=1.0, weights=weights)
        assert int(total_P[0]) * 2.0**-24 == pytest.approx(wanted, abs=2.0**-15)
        assert exact_norm_is_within(total_P, max(wanted, 2.0**-24))


def test_rows_that_two_users_share_add_up_and_filler_adds_nothing():
    users = torch.zeros(2, 7 + 3 * D)
    users[0, 7:] = torch.tensor([0, 0, 1, 2, 3, 4]) * 2.0**-24
    users[1, 7:] = torch.tensor([0, 0, 10, 20, 0, 0]) * 2.0**-24
    total_P, _ = add(users, [[0, 4, 2], [0, 2, 0]], clip_norm=1.0)
    assert total_P[7:].view(TABLE, D).tolist() == [[0, 0], [0, 0], [13, 24], [0, 0], [1, 2], [0, 0]]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.sampled_from(["normal", "equal", "spread"]), st.floats(-15, 15), st.integers(0, 2**32))
def test_squared_norms_stray_less_than_their_bound(many: int, kind: str, magnitude: float, seed: int):
    rng = np.random.default_rng(seed)
    values = {"normal": rng.standard_normal((2, many)), "equal": np.full((2, many), rng.random() + 0.5), "spread": 10 ** rng.uniform(-5, 0, (2, many))}[kind]
    x = torch.from_numpy((values * 10**magnitude).astype(np.float32))
    for found, row in zip(squared_norms(x).tolist(), x, strict=True):
        exact = sum(Fraction(value) ** 2 for value in row.tolist())
        assert abs(Fraction(found) - exact) <= exact * Fraction(2) ** -17


def test_the_smallest_clip_norm_and_step_that_settings_allow_hold_too():
    """Squares below 2^-149 are zero in float32: a clip of 1e-25 would let users through unclipped."""
    for bad in ({"privacy": {"clip_norm": 1e-13}}, {"local": {"grid_step": 2.0**-61}}):
        with pytest.raises(ValueError, match="greater than or equal"):
            RunConfig.model_validate(bad)
    assert RunConfig.model_validate({"privacy": {"clip_norm": 1e-12}, "local": {"grid_step": 2.0**-60}})
    layout = layout_of({"a": torch.zeros(640), ITEMS: torch.zeros(2, 1)})
    values = torch.randn(1, 640, generator=torch.Generator().manual_seed(0))
    for clip_norm, step, length in ((1e-12, grid_step(1e-12), 3.0), (None, 2.0**-60, 2.0**24)):
        total = GridTotal(layout)
        update = Trained({"a": values / values.norm() * (length * (clip_norm or step))}, torch.zeros(1, 2, 1), None, None, torch.zeros(1))
        clipped = total.add(update, clip_norm=clip_norm, step=step, weight_U=torch.ones(1))
        assert not clipped.is_broken_U.any()
        wanted = values[0].double() / values[0].double().norm() * (clip_norm or 2.0**24 * step)
        torch.testing.assert_close(total.total_P[:640].double() * step, wanted, rtol=1e-4, atol=2 * step)
        if clip_norm is not None:
            assert exact_norm_is_within(total.total_P, clip_norm)
