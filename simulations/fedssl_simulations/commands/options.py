"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Source = Annotated[str, typer.Argument(metavar="RUN.toml", help="A run's settings, or the name of a preset (`fedssl presets`)")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated")]
Seed = Annotated[int | None, typer.Option(help="Another seed than the run's own")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a program")]
