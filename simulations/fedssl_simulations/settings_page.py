"""docs/settings.md and docs/device.md, made from the settings' classes: ``python -m fedssl_simulations.settings_page run > docs/settings.md``."""

from __future__ import annotations

import sys
import types
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from fedssl_client.policy import Policy
from pydantic.fields import FieldInfo

from fedssl.config import RunConfig, Settings

INTRODUCTION = """\
# Settings of a run

Every key of a RUN.toml, with its type, its default and its meaning. Made from `fedssl/config.py` by `make docs`; do not edit.

A file may begin with `preset = "NAME"` (`fedssl presets` lists them) and then change only what it names. On the command line `--set section.key=value`
does the same; `--set task.0.weight=0.5` reaches into lists, `--set counts=none` takes the section away. An unknown key is an error that names its neighbour.
"""
DEVICE_INTRODUCTION = """\
# Settings of a device

Every key of a device.toml, with its type, its default and its meaning. Made from `client/fedssl_client/policy.py` by `make docs`; do not edit.

The file is the person's. Nothing is allowed by default; the agent reads it anew before every training. An unknown key is an error that names its neighbour.
"""


def settings_page(whole: type[Settings] = RunConfig, introduction: str = INTRODUCTION) -> str:
    """The whole page, Markdown: one section a class, one line a key, in the order of the code."""
    top = [name for name, field in whole.model_fields.items() if section_of(field.annotation) is None]
    parts = [introduction, "## At the top\n\n" + _table(whole, top)]
    for name, field in whole.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            heading = f"[[{name}]]" if get_origin(field.annotation) is tuple else f"[{name}]"
            optional = " Without this section there are none." if type(None) in get_args(field.annotation) else ""
            about = (section.__doc__ or "").strip()
            parts.append(f"## `{heading}`\n\n{about}{optional}\n\n" + _table(section, list(section.model_fields)))
    return "\n".join(parts)


def section_of(annotation: Any) -> type[Settings] | None:
    """The settings' class inside an annotation such as ``CountsConfig | None``, or None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    found = (section_of(inner) for inner in get_args(annotation))
    return next((section for section in found if section is not None), None)


def type_words(field: FieldInfo) -> str:
    """A field's type and bounds as a person writes them: ``number, from 0, below 1``."""
    words = [_type(field.annotation)]
    for rule in field.metadata:
        match rule:
            case annotated_types.Ge(bound):
                words.append(f"from {bound}")
            case annotated_types.Gt(bound):
                words.append(f"above {bound}")
            case annotated_types.Le(bound):
                words.append(f"up to {bound}")
            case annotated_types.Lt(bound):
                words.append(f"below {bound}")
    return ", ".join(words)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(inner) for inner in get_args(annotation) if inner is not type(None))
    if get_origin(annotation) is tuple:
        return f"list of {_type(get_args(annotation)[0])}s"
    return {str: "text", bool: "true or false", int: "whole number", float: "number"}[annotation]


def _table(section: type[Settings], names: list[str]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = section.model_fields[name]
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{name}` | {type_words(field)} | {_default(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value!r}`".replace("'", '"')


def device_page() -> str:
    """The page of a device's policy."""
    return settings_page(Policy, DEVICE_INTRODUCTION)


def main() -> None:
    """Print the page of a run, or of a device."""
    print({"run": settings_page, "device": device_page}[sys.argv[1]](), end="")


if __name__ == "__main__":
    main()
