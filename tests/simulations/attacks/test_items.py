"""What uploads tell of items: everything raw, nothing under enough noise."""

from __future__ import annotations

import numpy as np
import pytest
from fedssl_simulations.attacks.items import agreement, attack_items, name_items
from fedssl_simulations.attacks.result import Figure
from small import small_config, small_dataset

from fedssl.errors import ConfigError

KEY = b"k" * 32


def table(**changes: object) -> dict[str, float]:
    """F1 by what the attacker sees, over a dozen users of a small data set."""
    config = small_config({"task": [{"name": "next-item", **changes}], "encoder": {"window": 30}})
    found = attack_items(config, small_dataset(users=24, items=120), users=12, noise=(0.01, 5.0), key=KEY)
    f1 = {}
    for row in found.rows:
        assert isinstance(row["f1"], Figure)
        assert row["f1"].low <= row["f1"].value <= row["f1"].high
        f1[str(row["attacker sees"])] = row["f1"].value
    return f1


def test_rows_that_moved_in_most_uploads_are_named_first_and_then_the_longest():
    one, two = np.zeros((5, 2)), np.zeros((5, 2))
    one[[1, 2, 3]] = [[1, 0], [5, 0], [9, 0]]
    two[[1, 2, 4]] = [[1, 0], [5, 0], [99, 0]]
    assert name_items([one, two], 3).tolist() == [2, 1, 4]
    assert name_items([one], 2).tolist() == [3, 2]


def test_the_padding_row_and_rows_that_stayed_are_never_named():
    upload = np.zeros((4, 1))
    upload[[0, 2]] = 1
    assert name_items([upload], 3).tolist() == [2]


def test_agreement_by_hand():
    assert agreement(np.array([1, 2, 3, 4]), np.array([3, 4, 5])) == (4 / 7, 1 / 2, 2 / 3)
    assert agreement(np.array([1]), np.array([2])) == agreement(np.array([], dtype=np.int64), np.array([2])) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("negatives", [0, 20])
def test_a_raw_upload_tells_the_history_and_clipping_hides_nothing(negatives: int):
    f1 = table(negatives=negatives)
    assert f1["raw, one upload"] > 0.9
    assert f1["clipped, one upload"] == pytest.approx(f1["raw, one upload"], abs=0.02)
    assert f1["raw, 10 uploads"] >= f1["raw, one upload"]


def test_little_noise_hides_nothing_and_much_noise_all():
    f1 = table()
    assert f1["clipped, noise z = 0.01, one upload"] > 0.8
    assert f1["clipped, noise z = 5, one upload"] < 0.3


def test_each_noised_row_states_what_its_epsilon_is_about():
    found = attack_items(small_config(), small_dataset(), users=4, noise=(1.0,), key=KEY)
    for word in ("epsilon", "unit: user", "add/remove one user", "trust: central", "every user", "exact", "delta 1e-06"):
        assert all(word in note for note in found.notes[1:])
    noised = [row for row in found.rows if row["epsilon"] != "none"]
    assert len(noised) == len(found.notes) - 1 == 2


def test_sums_are_made_of_users_that_there_are():
    found = attack_items(small_config(), small_dataset(), users=24, noise=(), key=KEY)
    assert [row["attacker sees"] for row in found.rows if "sum" in str(row["attacker sees"])] == [
        "sum over 10 users, one upload",
        "sum over 10 users, 10 uploads",
    ]
    with pytest.raises(ConfigError, match="25 users are to be attacked, the data set has 24"):
        attack_items(small_config(), small_dataset(), users=25, key=KEY)
