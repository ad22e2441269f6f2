"""The templates of pages: read and compiled once in a process, self-contained, escaped."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """A page as text. A name that the template does not find in ``values`` is an error."""
    return templates().get_template(template).render(**values)


@cache
def templates() -> jinja2.Environment:
    """All templates. Filters: ``metric``, a number as tables have it; ``words``, a name as a reader would say it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedssl_simulations"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(metric=_metric, words=in_words)
    return environment


def in_words(name: str) -> str:
    """A name of a setting or fact as a reader would say it."""
    return name.replace("_", " ").capitalize()


def _metric(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.4f}"
