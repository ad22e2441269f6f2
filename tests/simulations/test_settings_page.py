"""docs/settings.md and docs/device.md say what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest
from fedssl_simulations.settings_page import device_page, settings_page, type_words

from fedssl.config import CountsConfig, EncoderConfig, RunConfig, ServerConfig

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "docs/settings.md is older than fedssl/config.py; run: make docs"
    device = PAGE.with_name("device.md").read_text(encoding="utf-8")
    assert device == device_page(), "docs/device.md is older than client/fedssl_client/policy.py; run: make docs"


def test_every_section_and_every_key_has_a_line_with_a_meaning():
    lines = settings_page().splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines if line.startswith("| `")}
    assert all(rows.values())
    for name in ("data", "encoder", "counts", "head", "local", "server", "privacy", "evaluation", "system"):
        assert f"## `[{name}]`" in lines
    assert "## `[[task]]`" in lines
    sections = [field.default for field in RunConfig.model_fields.values() if hasattr(field.default, "model_fields_set")]
    for section in sections:
        assert {f"`{key}`" for key in type(section).model_fields} <= rows.keys()


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        (EncoderConfig, "dropout", "number, from 0.0, below 1.0"),
        (EncoderConfig, "width", "whole number, from 1"),
        (ServerConfig, "sampling", "`passes` or `poisson`"),
        (CountsConfig, "clip_norm", "number, above 0.0"),
    ],
)
def test_types_and_bounds_are_words(section: type, key: str, words: str):
    assert type_words(section.model_fields[key]) == words  # type: ignore[attr-defined]
