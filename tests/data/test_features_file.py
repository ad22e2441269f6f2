"""The file of item features: what was written comes back in any catalogue's order, and damage is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedssl.catalogue import Catalogue
from fedssl.config import DataConfig
from fedssl.data.dataset import load_dataset
from fedssl.data.features_file import hash_of, read_features, write_features
from fedssl.errors import DataError

WRITTEN = Catalogue(("b", "a", "c"))
VECTORS = np.array([[2.0, 0.5], [1.0, 0.25], [3.0, 0.75]], dtype=np.float32)


def test_vectors_come_back_in_the_order_of_another_catalogue_and_what_is_not_named_is_zero(tmp_path: Path):
    write_features(tmp_path / "f", WRITTEN, VECTORS)
    assert read_features(tmp_path / "f", Catalogue(("a", "x", "b"))).tolist() == [[1.0, 1.0, 0.25], [0.0, 0.0, 0.0], [1.0, 2.0, 0.5]]


def test_a_run_s_data_has_the_features_that_data_features_names(tmp_path: Path):
    (tmp_path / "histories.txt").write_text("u1 a b a c\nu2 b a c a\n")
    write_features(tmp_path / "f", WRITTEN, VECTORS)
    config = DataConfig(path=str(tmp_path / "histories.txt"), min_events=1, features=str(tmp_path / "f"))
    dataset = load_dataset(config)
    assert dataset.features is not None and dataset.features[dataset.catalogue.rows["c"] - 1].tolist() == [1.0, 3.0, 0.75]
    assert load_dataset(config.model_copy(update={"features": ""})).features is None


def test_equal_numbers_have_one_hash_and_others_another():
    assert hash_of(None) == ""
    assert hash_of(VECTORS) == hash_of(VECTORS[::1].copy()) != hash_of(VECTORS.reshape(2, 3))
    assert hash_of(VECTORS) != hash_of(VECTORS + 1)


def test_a_file_that_cannot_be_used_says_why(tmp_path: Path):
    path = tmp_path / "f"
    with pytest.raises(DataError, match="no such file; make it with"):
        read_features(path, WRITTEN)
    write_features(path, WRITTEN, VECTORS)
    with pytest.raises(DataError, match="names no item of the data; items here are like 'z', there like 'b'"):
        read_features(path, Catalogue(("z",)))
    whole = path.read_bytes()
    for damaged in (whole[:-3], b"not a file of features"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not a file of item features"):
            read_features(path, WRITTEN)
    path.write_bytes(whole.replace(b'[\\"b\\"', b'[\\"d\\"'))
    with pytest.raises(DataError, match="do not belong together"):
        read_features(path, WRITTEN)
    save_file({"vectors": VECTORS}, path, metadata={"format": "2", "tokens": '["b", "a", "c"]', "catalogue": WRITTEN.hash})
    with pytest.raises(DataError, match="features of format 2, this version reads 1"):
        read_features(path, WRITTEN)
    write_features(path, WRITTEN, np.where(VECTORS == 2, np.nan, VECTORS).astype(np.float32))
    with pytest.raises(DataError, match="do not belong together"):
        read_features(path, WRITTEN)
