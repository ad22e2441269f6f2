"""STUDY.toml: which runs a study makes, for each epsilon and seed, and which attacks on them."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from fedssl.checking import check, check_file
from fedssl.config import Settings
from fedssl.errors import ConfigError


class Method(Settings):
    """One way to learn, drawn as one line: runs of its own, or a part alone of the models that another method's runs leave."""

    name: str = Field(min_length=1, description="What the page calls it")
    run: str = Field("", description="RUN.toml or the name of a preset")
    set: tuple[str, ...] = Field((), description="Settings that differ, section.key=value")
    open: tuple[str, ...] = Field((), description="Further settings where epsilon is infinite, such as privacy.epsilon=none")
    of: str = Field("", description="Name of the method whose runs are looked at, instead of runs of its own")
    part: Literal["", "counts", "encoder", "head"] = Field("", description="The part of the model that recommends alone; empty: the whole")

    @model_validator(mode="after")
    def _has_runs(self) -> Method:
        if bool(self.run) == bool(self.of):
            raise ValueError(f"method {self.name!r}: wanted either a run, or in `of` the method whose runs it looks at")
        if self.of and (self.set or self.open):
            raise ValueError(f"method {self.name!r}: looks at the runs of {self.of!r}, so it has no settings of its own; take set and open away")
        return self


class Attack(Settings):
    """An attack, and on what: membership on runs of its own; attributes on the first seed's runs of a method."""

    name: Literal["membership", "attributes"]
    label: str = Field("", description="What the page calls it, where there are several of a kind")
    run: str = Field("", description="membership: RUN.toml or a preset")
    set: tuple[str, ...] = Field((), description="membership: settings that differ")
    open: tuple[str, ...] = Field((), description="membership: further settings where epsilon is infinite")
    of: str = Field("", description="attributes: name of the method whose runs are probed")
    epsilon: tuple[float, ...] = Field((), description="At which; empty: those of the study")
    options: tuple[str, ...] = Field((), description="Further words for the command, such as --shadows and 16")

    @property
    def method(self) -> str:
        """What it is called, on the page and in folders."""
        return self.label or self.name

    @model_validator(mode="after")
    def _has_something_to_attack(self) -> Attack:
        if self.name == "membership" and (not self.run or self.of):
            raise ValueError("membership trains runs of its own; name a run, and take `of` away")
        if self.name == "attributes" and (not self.of or self.run or self.set or self.open):
            raise ValueError("attributes probes runs that the study makes; name their method as `of`, and take run, set and open away")
        return self

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)


class StudyConfig(Settings):
    """A whole STUDY.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    title: str = Field(min_length=1, description="Heads the page")
    set: tuple[str, ...] = Field((), description="Settings of all runs, section.key=value")
    epsilon: tuple[float, ...] = Field((math.inf, 8.0, 4.0, 2.0, 1.0), min_length=1, description="Privacy budgets; inf: none")
    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="Runs of each")
    metric: str = Field("ndcg@10", description="What is drawn")
    method: tuple[Method, ...] = Field(min_length=1, description="Ways to learn")
    attack: tuple[Attack, ...] = Field((), description="Attacks")

    @model_validator(mode="after")
    def _makes_sense(self) -> StudyConfig:
        names = [method.name for method in self.method]
        if len(set(names)) != len(names):
            raise ValueError(f"methods share a name in {names}; every line of the page needs its own")
        labels = [(attack.name, attack.method) for attack in self.attack]
        if len(set(labels)) != len(labels):
            raise ValueError(f"attacks share a name in {[label for _, label in labels]}; give each a label")
        trained = [method.name for method in self.method if method.run]
        for what, of in [("method", method.of) for method in self.method if method.of] + [("attack", attack.of) for attack in self.attack if attack.of]:
            if of not in trained:
                raise ValueError(f"a {what} is of {of!r}, which has no runs; there is {', '.join(trained) or 'no method with a run'}")
        for attack in self.attack:
            if attack.name == "attributes" and (strange := set(attack.epsilon) - set(self.epsilon)):
                raise ValueError(f"attributes are to be probed at epsilon {sorted(strange)}, where the study makes no runs; it makes {list(self.epsilon)}")
        for epsilon in (*self.epsilon, *(epsilon for attack in self.attack for epsilon in attack.epsilon)):
            if not epsilon > 0:
                raise ValueError(f"epsilon = {epsilon:g}; wanted above 0, or inf for no privacy")
        return self


@dataclass(frozen=True)
class Point:
    """One thing to do: a command of `fedssl`, in a folder of its own under the study's. ``source``: a RUN.toml or preset; of attributes, the folder
    beneath the study's that holds the run to probe.
    """

    what: str
    method: str
    epsilon: float
    seed: int
    source: str
    overrides: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Where it leaves what it finds, beneath the study's folder."""
        name = self.method if self.what in ("run", self.method) else f"{self.what} {self.method}"
        slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
        return f"{'runs' if self.what == 'run' else 'attacks'}/{slug}-epsilon-{self.epsilon:g}-seed-{self.seed}"


def read_study(source: str | Path) -> StudyConfig:
    """A study from a TOML file, or one that ships by its name. Raises ConfigError that says where, what came, what was wanted."""
    path = Path(source)
    if path.suffix != ".toml" and not path.is_file():
        folder = resources.files("fedssl_simulations").joinpath("studies")
        names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
        if str(source) not in names:
            raise ConfigError(f"{source}: no study of this name ({', '.join(names)}) and no file; give a STUDY.toml")
        return check(StudyConfig, tomllib.loads(folder.joinpath(f"{source}.toml").read_text(encoding="utf-8")), where=str(source))
    return check_file(StudyConfig, path, missing=f"{path}: no such file; give a STUDY.toml or the name of a study")


def points_of(study: StudyConfig, overrides: tuple[str, ...] = ()) -> list[Point]:
    """What the study does, in the order that a short budget is best spent: all epsilons of the first seed, then attacks, then further seeds.

    ``overrides``: settings of all runs and attacks, over those of the study.
    """

    def runs(seed: int) -> list[Point]:
        return [
            Point("run", method.name, epsilon, seed, method.run, (*study.set, *method.set, *at(epsilon, method.open), *overrides))
            for epsilon in study.epsilon
            for method in study.method
            if method.run
        ]

    first = runs(study.seeds[0])
    folder_of = {(point.method, point.epsilon): point.folder for point in first}

    def attacks(attack: Attack) -> list[Point]:
        epsilons = attack.epsilon or study.epsilon
        if attack.name == "attributes":
            sources = [folder_of[attack.of, epsilon] for epsilon in epsilons]
            return [
                Point("attributes", attack.method, epsilon, study.seeds[0], source, (), attack.options)
                for epsilon, source in zip(epsilons, sources, strict=True)
            ]
        return [
            Point("membership", attack.method, epsilon, study.seeds[0], attack.run, (*attack.set, *at(epsilon, attack.open), *overrides), attack.options)
            for epsilon in epsilons
        ]

    return [*first, *(point for attack in study.attack for point in attacks(attack)), *(point for seed in study.seeds[1:] for point in runs(seed))]


def at(epsilon: float, open_settings: tuple[str, ...]) -> tuple[str, ...]:
    """The settings that make a recipe one of this epsilon."""
    return open_settings if math.isinf(epsilon) else (f"privacy.epsilon={epsilon:g}",)
