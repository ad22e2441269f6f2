import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedssl.privacy.grid import LARGEST_COORDINATE, USERS_IN_INT32, grid_step


@pytest.mark.parametrize(("clip_norm", "step"), [(1.0, 2.0**-24), (1.5, 2.0**-23), (2.0, 2.0**-23), (0.75, 2.0**-24), (0.5, 2.0**-25)])
def test_the_step_is_the_clip_over_two_to_the_24_rounded_up_to_a_power_of_two(clip_norm: float, step: float):
    assert grid_step(clip_norm) == step


@given(st.floats(1e-30, 1e30))
def test_no_clipped_coordinate_has_more_than_two_to_the_24_steps_and_none_less_than_half(clip_norm: float):
    step = grid_step(clip_norm)
    assert math.frexp(step)[0] == 0.5
    assert LARGEST_COORDINATE / 2 < clip_norm / step <= LARGEST_COORDINATE


def test_as_many_users_fit_an_int32_as_are_said_to_and_no_more():
    assert USERS_IN_INT32 * LARGEST_COORDINATE < 2**31 <= (USERS_IN_INT32 + 1) * LARGEST_COORDINATE


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e-300])
def test_a_clip_without_a_grid_is_refused(bad: float):
    with pytest.raises(ValueError, match="clip_norm"):
        grid_step(bad)
