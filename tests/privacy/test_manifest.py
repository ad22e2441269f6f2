from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedssl.config import CountsConfig, EncoderConfig, HeadConfig, LocalConfig, PrivacyConfig, ServerConfig, TaskConfig
from fedssl.errors import ConfigError, UploadRefused
from fedssl.privacy.manifest import DeclaredSum, check_manifest, declared_sums, squared_norm
from fedssl.recipe import Recipe
from fedssl.records import SparseSum

PLAN = PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0)


def recipe_of(privacy: PrivacyConfig, counts: CountsConfig | None = None) -> Recipe:
    return Recipe(
        seed=1,
        num_items=4,
        catalogue="hash",
        encoder=EncoderConfig(),
        task=(TaskConfig(name="next-item"),),
        counts=counts,
        head=HeadConfig(name="user-vector"),
        local=LocalConfig(grid_step=2.0**-20),
        server=ServerConfig(sampling="poisson"),
        privacy=privacy,
    )


UNDER_PLAN = declared_sums(recipe_of(PLAN), "training", 3)
WITHOUT = declared_sums(recipe_of(PrivacyConfig()), "training", 3)
CLIPPED_COUNTS = declared_sums(recipe_of(PrivacyConfig(), CountsConfig(clip_norm=0.5)), "counts", 0)


def update(*values: int) -> dict[str, Any]:
    return {"update": np.array(values, dtype=np.int64)}


def cells(*triples: tuple[int, int, int], shape: tuple[int, int] = (5, 5)) -> dict[str, Any]:
    rows, columns, values = np.array(triples, dtype=np.int64).reshape(-1, 3).T
    return {"counts": SparseSum(rows.astype(np.int32), columns.astype(np.int32), values, shape)}


def test_under_a_plan_only_the_update_leaves_in_training():
    assert {"update": DeclaredSum("update", (3,), "dense", "int", 1.0, 2.0**-24)} == UNDER_PLAN


def test_without_a_plan_weights_and_losses_leave_too():
    assert {
        "update": DeclaredSum("update", (3,), "dense", "int", None, 2.0**-20),
        "weight": DeclaredSum("weight", (1,), "dense", "int", None, 2.0**-16, 0, 2**16),
        "loss": DeclaredSum("loss", (1,), "dense", "int", None, 2.0**-16),
    } == WITHOUT


def test_a_clip_without_noise_still_bounds_the_update():
    assert declared_sums(recipe_of(PrivacyConfig(clip_norm=2.0)), "training", 3)["update"].clip_norm == 2.0


def test_counts_are_one_sparse_matrix_of_the_catalogue_and_its_padding():
    assert {"counts": DeclaredSum("counts", (5, 5), "sparse", "int", 0.5, 2.0**-25, 0)} == CLIPPED_COUNTS
    assert declared_sums(recipe_of(PrivacyConfig(), CountsConfig()), "counts", 0)["counts"].step == 2.0**-16


def test_under_a_plan_counts_are_dense_so_that_no_upload_names_its_cells():
    recipe = recipe_of(PLAN, CountsConfig(clip_norm=0.5, items=3))
    assert declared_sums(recipe, "popularity", 0) == {"popularity": DeclaredSum("popularity", (5,), "dense", "int", 0.5, 2.0**-25, 0)}
    assert declared_sums(recipe, "counts", 0) == {"counts": DeclaredSum("counts", (3, 3), "dense", "int", 0.5, 2.0**-25, 0)}
    # Never more items than there are.
    assert declared_sums(recipe_of(PLAN, CountsConfig(clip_norm=0.5, items=1000)), "counts", 0)["counts"].shape == (4, 4)
    with pytest.raises(UploadRefused, match="wanted a dense array"):
        check_manifest(cells((0, 1, 7), shape=(3, 3)), declared_sums(recipe, "counts", 0), most_users=1)


def test_without_a_plan_no_histogram_leaves():
    with pytest.raises(ConfigError, match="not in the recipe"):
        declared_sums(recipe_of(PrivacyConfig(), CountsConfig(clip_norm=0.5)), "popularity", 0)


@pytest.mark.parametrize("phase", ["counts", "popularity", "audit", ""])
def test_a_phase_that_the_recipe_lacks_declares_nothing(phase: str):
    with pytest.raises(ConfigError, match="not in the recipe"):
        declared_sums(recipe_of(PLAN), phase, 3)


def test_exactly_the_declared_sums_pass():
    check_manifest(update(1, -2, 3), UNDER_PLAN, most_users=1)
    check_manifest({"update": np.array([1, -2, 3], dtype=np.int32)}, UNDER_PLAN, most_users=1)
    check_manifest({**update(1, 2, 3), "weight": np.array([65536]), "loss": np.array([70000])}, WITHOUT, most_users=1)
    check_manifest(cells((0, 1, 7), (0, 2, 1), (4, 0, 9)), CLIPPED_COUNTS, most_users=1)
    check_manifest(cells(), CLIPPED_COUNTS, most_users=1)


HISTORY_AND_HEAD = {
    "items": np.array([3, 1, 4], dtype=np.int64),
    "times": np.array([978300760, 978302109, 978301968], dtype=np.int64),
    "cuts": np.array([0, 3], dtype=np.int64),
    "user": np.array([17], dtype=np.int64),
    "windows": np.array([[0, 3, 1], [3, 1, 4]], dtype=np.int64),
    "ratings": np.array([5.0, 3.0, 4.0], dtype=np.float32),
    "titles": np.array(["Toy Story", "Heat", "Casino"]),
    "head": np.array([0.1, -0.2, 0.3], dtype=np.float32),
    "head in steps": np.array([1677721, -3355443, 5033164], dtype=np.int32),
}
NAMES = [
    "items",
    "history",
    "times",
    "cuts",
    "user",
    "users",
    "windows",
    "rows",
    "head",
    "heads",
    "heads/17",
    "user-vector",
    "vector",
    "loss",
    "losses",
    "weight",
]
NAMES += ["norm", "count", "counts", "metrics", "update.head", "update/", "Update", "UPDATE", " update", "update ", "update\0", "updatе", "", "0", "__class__"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", HISTORY_AND_HEAD)
def test_no_field_of_a_history_and_no_head_leaves_under_any_name(what: str, name: str):
    with pytest.raises(UploadRefused):
        check_manifest({**update(1, 2, 3), name: HISTORY_AND_HEAD[what]}, UNDER_PLAN, most_users=1)
    with pytest.raises(UploadRefused):
        check_manifest({name: HISTORY_AND_HEAD[what]}, UNDER_PLAN, most_users=1)
    with pytest.raises(UploadRefused):
        check_manifest({**cells((0, 1, 7)), name: HISTORY_AND_HEAD[what]}, CLIPPED_COUNTS, most_users=1)


@pytest.mark.parametrize("what", [what for what in HISTORY_AND_HEAD if what not in ("items", "head in steps")])
def test_a_declared_name_does_not_let_them_out_either(what: str):
    with pytest.raises(UploadRefused, match="update"):
        check_manifest({"update": HISTORY_AND_HEAD[what]}, UNDER_PLAN, most_users=1)


def test_a_missing_sum_is_refused_by_name():
    with pytest.raises(UploadRefused, match="'loss' is missing"):
        check_manifest({**update(1, 2, 3), "weight": np.array([1])}, WITHOUT, most_users=1)
    with pytest.raises(UploadRefused, match="'update' is missing"):
        check_manifest({}, UNDER_PLAN, most_users=1)


def test_an_undeclared_sum_is_refused_by_name():
    with pytest.raises(UploadRefused, match="'loss' is not declared; only update"):
        check_manifest({**update(1, 2, 3), "loss": np.array([1])}, UNDER_PLAN, most_users=1)


@pytest.mark.parametrize("shape", [(2,), (4,), (1, 3), (3, 1), (0,), ()])
def test_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(UploadRefused, match="shape"):
        check_manifest({"update": np.zeros(shape, dtype=np.int64)}, UNDER_PLAN, most_users=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint32, np.uint64, np.int16, np.bool_, np.complex64, object, ">i8"])
def test_another_type_of_number_is_refused(dtype: Any):
    with pytest.raises(UploadRefused, match="wanted int32 or int64"):
        check_manifest({"update": np.zeros(3, dtype=dtype)}, UNDER_PLAN, most_users=1)


def test_floats_are_refused_and_told_about_nan():
    with pytest.raises(UploadRefused, match="nan"):
        check_manifest({"update": np.array([np.nan, 0.0, 0.0])}, UNDER_PLAN, most_users=1)


@pytest.mark.parametrize("found", [None, [1, 2, 3], 5, "update", cells()["counts"]])
def test_what_is_no_array_is_refused(found: Any):
    with pytest.raises(UploadRefused, match="wanted a dense array"):
        check_manifest({"update": found}, UNDER_PLAN, most_users=1)


def test_a_dense_matrix_is_no_sparse_sum():
    with pytest.raises(UploadRefused, match="wanted a sparse sum"):
        check_manifest({"counts": np.zeros((5, 5), dtype=np.int64)}, CLIPPED_COUNTS, most_users=1)


@pytest.mark.parametrize("users", [1, 3])
def test_a_coordinate_is_at_most_two_to_the_24_steps_a_user(users: int):
    rest = {"weight": np.array([0]), "loss": np.array([0])}
    limit = users * 2**24
    check_manifest({**update(limit, -limit, 0), **rest}, WITHOUT, most_users=users)
    for bad in (limit + 1, -limit - 1, 2**63 - 1, -(2**63)):
        with pytest.raises(UploadRefused, match="coordinates"):
            check_manifest({**update(0, bad, 0), **rest}, WITHOUT, most_users=users)


@pytest.mark.parametrize("weight", [-1, 2 * 65536 + 1])
def test_weights_lie_between_zero_and_one_a_user(weight: int):
    sums = {**update(1, 2, 3), "loss": np.array([0])}
    check_manifest({**sums, "weight": np.array([2 * 65536])}, WITHOUT, most_users=2)
    with pytest.raises(UploadRefused, match="weight"):
        check_manifest({**sums, "weight": np.array([weight])}, WITHOUT, most_users=2)


def test_the_norm_is_bounded_by_the_clip_of_each_user_to_the_last_step():
    # The clip is 2^24 steps: 3-4-5 scaled, then one step beyond.
    check_manifest(update(2**24, 0, 0), UNDER_PLAN, most_users=1)
    with pytest.raises(UploadRefused, match="L2 norm"):
        check_manifest(update(2**24, 1, 0), UNDER_PLAN, most_users=1)
    fifth = 5 * 2**24 // 5
    check_manifest(update(3 * fifth, -4 * fifth, 0), UNDER_PLAN, most_users=5)
    with pytest.raises(UploadRefused, match="L2 norm"):
        check_manifest(update(3 * fifth, -4 * fifth, 1), UNDER_PLAN, most_users=5)


def test_the_norm_of_a_sparse_sum_is_over_all_cells():
    three, four = 3 * 2**24 // 5, 4 * 2**24 // 5  # just under 3-4-5
    check_manifest(cells((0, 1, three), (2, 2, four)), CLIPPED_COUNTS, most_users=1)
    with pytest.raises(UploadRefused, match="L2 norm"):
        check_manifest(cells((0, 1, three), (2, 2, four + 8)), CLIPPED_COUNTS, most_users=1)


def test_a_negative_count_is_refused():
    with pytest.raises(UploadRefused, match="coordinates"):
        check_manifest(cells((0, 1, -1)), CLIPPED_COUNTS, most_users=1)


@pytest.mark.parametrize(
    "triples", [((0, 1, 7), (0, 1, 7)), ((1, 0, 7), (0, 1, 7)), ((0, 2, 7), (0, 1, 7)), ((5, 0, 1),), ((0, 5, 1),), ((-1, 0, 1),), ((0, -1, 1),)]
)
def test_cells_listed_twice_unsorted_or_outside_are_refused(triples: tuple[tuple[int, int, int], ...]):
    with pytest.raises(UploadRefused, match="cells"):
        check_manifest(cells(*triples), CLIPPED_COUNTS, most_users=1)


def test_a_sparse_sum_of_another_catalogue_or_of_uneven_parts_is_refused():
    with pytest.raises(UploadRefused, match="shape"):
        check_manifest(cells((0, 1, 7), shape=(6, 6)), CLIPPED_COUNTS, most_users=1)
    good = cells((0, 1, 7), (0, 2, 7))["counts"]
    for bad in (
        SparseSum(good.rows[:1], good.columns, good.values, good.shape),
        SparseSum(good.rows, good.columns, good.values[:, None], good.shape),
        SparseSum(good.rows.astype(np.float32), good.columns, good.values, good.shape),
        SparseSum(good.rows, good.columns, good.values.astype(np.float64), good.shape),
    ):
        with pytest.raises(UploadRefused, match="counts"):
            check_manifest({"counts": bad}, CLIPPED_COUNTS, most_users=1)


def test_an_upload_of_nobody_is_refused():
    with pytest.raises(UploadRefused, match="nobody"):
        check_manifest(update(0, 0, 0), UNDER_PLAN, most_users=0)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6))
def test_the_squared_norm_is_exact_for_all_integers(values: list[int]):
    assert squared_norm(np.array(values, dtype=np.int64)) == sum(value * value for value in values)


def test_the_squared_norm_of_many_numbers_is_exact():
    values = np.random.default_rng(1).integers(-(2**40), 2**40, 5000)
    assert squared_norm(values) == sum(int(value) ** 2 for value in values)
