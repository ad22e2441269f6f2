"""Files that change while they are mapped are found, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from small import small_dataset

from fedssl.data.dataset import open_dataset, write_dataset
from fedssl.data.histories import Histories, take_users
from fedssl.data.watch import unchanged
from fedssl.errors import DataError


@pytest.fixture
def stored(tmp_path: Path) -> Histories:
    write_dataset(small_dataset(), tmp_path / "store")
    return open_dataset(tmp_path / "store").histories


def rewrite(path: Path) -> None:
    raw = path.read_bytes()
    with path.open("r+b") as file:
        file.write(raw)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replace(path: Path) -> None:
    (path.parent / "other").write_bytes(path.read_bytes())
    os.replace(path.parent / "other", path)


def test_what_nobody_touched_is_unchanged(stored: Histories):
    with unchanged(stored), unchanged(take_users(stored, np.array([2, 0]))), unchanged(small_dataset().histories):
        pass


@pytest.mark.parametrize("name", ["items", "cuts", "times", "names", "name_cuts"])
@pytest.mark.parametrize("change", [rewrite, replace, Path.unlink, lambda path: os.truncate(path, 130)])
def test_any_column_that_is_written_replaced_removed_or_cut_is_named(name: str, change: object, stored: Histories, tmp_path: Path):
    assert callable(change)
    with pytest.raises(DataError, match=rf"{name}.npy: changed, replaced or removed while it was used"), unchanged(stored):
        change(tmp_path / "store" / f"{name}.npy")


def test_a_part_of_a_store_is_watched_too(stored: Histories, tmp_path: Path):
    some = take_users(stored, np.array([1, 2]))
    replace(tmp_path / "store" / "items.npy")
    with pytest.raises(DataError, match=r"items\.npy"), unchanged(some):
        pass


def test_the_change_is_told_instead_of_what_it_led_to(stored: Histories, tmp_path: Path):
    def read() -> None:
        (tmp_path / "store" / "items.npy").unlink()
        raise IndexError("row 77")

    with pytest.raises(DataError, match=r"items\.npy: changed"), unchanged(stored):
        read()
