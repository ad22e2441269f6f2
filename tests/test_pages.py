"""What the pages promise is there: links lead somewhere, commands and options exist, and settings that are set are known."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer
from fedssl_simulations.cli import cli
from fedssl_simulations.run_files import read_run

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
LINES = [line for text in TEXTS.values() for line in text.replace("\\\n", " ").splitlines()]
COMMANDS = sorted({line.split("  #")[0].strip() for line in LINES if re.match(r"fedssl [a-z]", line)})


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files(page: str):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXTS[page]):
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_their_options_exist(command: str):
    words = shlex.split(command)[1:]
    here = typer.main.get_command(cli)
    while words and words[0] in getattr(here, "commands", {}):
        here = here.commands[words.pop(0)]  # type: ignore[attr-defined]
    assert not hasattr(here, "commands"), f"no such command: {command}"
    known = {name for parameter in here.params for name in parameter.opts}
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= known
    overrides = [after for before, after in itertools.pairwise(words) if before == "--set"]
    if words[:1] == ["demo"]:
        read_run("demo", overrides)


def test_every_make_target_is_explained_and_the_readme_names_the_main_ones():
    targets = re.findall(r"^([a-z-]+):.*?(##.*)?$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert all(about for _, about in targets)
    assert {"demo", "test", "federation"} <= {name for name, _ in targets} & set(re.findall(r"make ([a-z]+)", TEXTS["README.md"]))
