"""Text vectors of items: what is read of an item, the shipped encoder, and the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fedssl_simulations import embed
from fedssl_simulations.cli import cli
from typer.testing import CliRunner

from fedssl.catalogue import Catalogue, write_catalogue
from fedssl.data.features_file import read_features
from fedssl.errors import DataError

MOVIES = "1::Toy Story (1995)::Animation|Children's\n2::Heat (1995)::Action|Crime\n3::A Bug's Life (1998)::Animation|Children's\n"


def test_the_text_of_an_item_is_its_title_and_its_attributes_by_name():
    catalogue = Catalogue(("1", "2"), {"1": "Heat"}, {"1": {"release_year": "1995", "genres": "Action|Crime", "movie_title": "Heat"}})
    assert embed.text_of(catalogue, "1") == "Heat. genres: Action, Crime. release year: 1995"
    assert embed.text_of(catalogue, "2") == "2"


def test_items_are_those_of_a_side_file_in_its_order_or_of_a_catalogue(tmp_path: Path):
    (tmp_path / "movies.dat").write_text(MOVIES)
    found = embed.described_items(tmp_path / "movies.dat")
    assert found.tokens == ("1", "2", "3") and found.titles["2"] == "Heat (1995)"
    write_catalogue(found, tmp_path / "catalogue.jsonl")
    assert embed.described_items(tmp_path / "catalogue.jsonl") == found


def test_each_item_is_encoded_once_in_order_and_nothing_known_is_told():
    catalogue = Catalogue(("1", "2"), {"1": "Heat", "2": "Ran"})
    assert embed.text_vectors(catalogue, lambda texts: np.array([[len(text)] for text in texts], dtype=np.float32)).tolist() == [[0.5], [-0.5]]
    with pytest.raises(DataError, match="neither titles nor attributes"):
        embed.text_vectors(Catalogue(("1", "2")))


def test_without_the_encoder_s_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embed, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(DataError, match=r"pip install fedssl\[text\]"):
        embed.sentence_encoder()


def test_the_command_writes_vectors_in_which_like_titles_are_close(tmp_path: Path):
    pytest.importorskip(embed.MODEL_PACKAGE, reason="the extra `text` is not installed")
    (tmp_path / "movies.dat").write_text(MOVIES)
    out = tmp_path / "deep" / "features.safetensors"
    said = CliRunner().invoke(cli, ["data", "embed", str(tmp_path / "movies.dat"), str(out)])
    assert said.exit_code == 0 and "3 items, 384 numbers each" in said.output
    toys, heat, bugs = read_features(out, Catalogue(("1", "2", "3")))[:, 1:]
    assert toys @ bugs > toys @ heat + 0.1 and np.abs(toys + heat + bugs).max() < 1e-5
    assert CliRunner().invoke(cli, ["data", "embed", str(tmp_path / "movies.dat"), str(out)]).exit_code == 2
