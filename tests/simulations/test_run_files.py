"""RUN.toml: what is read, what is changed, and clear words for the rest."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from fedssl_simulations.run_files import presets, read_run, read_written_run, write_run
from hypothesis import given
from hypothesis import strategies as st

from fedssl.config import CountsConfig, PrivacyConfig, RunConfig, TaskConfig
from fedssl.errors import ConfigError


def file_of(folder: Path, text: str) -> Path:
    path = folder / "my-run.toml"
    path.write_text(text)
    return path


def test_a_file_changes_what_it_names(tmp_path: Path):
    config = read_run(file_of(tmp_path, "seed = 4\n[server]\nrounds = 7\n[[task]]\nname = 'contrastive'\nweight = 0.5\n"))
    assert (config.seed, config.server.rounds, config.server.cohort) == (4, 7, 64)
    assert config.task == (TaskConfig(name="contrastive", weight=0.5),)


def test_an_empty_file_is_a_run_of_defaults(tmp_path: Path):
    assert read_run(file_of(tmp_path, "")) == RunConfig()


@pytest.mark.parametrize("name", presets())
def test_every_preset_that_ships_is_a_run_and_says_what_it_is(name: str):
    assert read_run(name).preset == name
    assert len(presets()[name]) > 10


def test_a_preset_is_changed_section_by_section(tmp_path: Path):
    base = read_run("ml-1m")
    config = read_run(file_of(tmp_path, "preset = 'ml-1m'\n[server]\ncohort = 32\n"))
    assert config == base.model_copy(update={"server": base.server.model_copy(update={"cohort": 32.0})})


def test_a_mapping_is_read_like_a_file_and_not_changed():
    values: dict[str, Any] = {"server": {"rounds": 3}}
    assert read_run(values, ["server.rounds=9", "task.0.weight=0.5"], seed=8).server.rounds == 9
    assert values == {"server": {"rounds": 3}}


def test_an_unknown_key_names_the_file_and_its_neighbour(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"my-run.toml: \[privacy\] has no key 'clip_nrom'; did you mean 'clip_norm'\?"):
        read_run(file_of(tmp_path, "[privacy]\nclip_nrom = 1.0\n"))
    with pytest.raises(ConfigError, match=r"my-run.toml: has no key 'sever'; did you mean 'server'\?"):
        read_run(file_of(tmp_path, "[sever]\nrounds = 1\n"))
    with pytest.raises(ConfigError, match=r"\[task\] has no key 'wieght'; did you mean 'weight'\?"):
        read_run(file_of(tmp_path, "[[task]]\nname = 'next-item'\nwieght = 1.0\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nrounds = 'many'\n", r"\[server\] rounds = 'many'"),
        ("[server]\nrounds = -1\n", r"\[server\] rounds = -1: .*greater than or equal to 0"),
        ("[server]\nrounds = 1.5\n", r"\[server\] rounds = 1.5"),
        ("[server]\nlr = nan\n", r"\[server\] lr = nan"),
        ("seed = 'x'\n", "seed = 'x'"),
        ("server = 3\n", "server = 3"),
        ("[counts]\nform = 'log'\n", r"\[counts\] form = 'log'"),
        ("[encoder]\nwidth = 10\nheads = 4\n", "width 10 is not a multiple of heads 4"),
        ("[privacy]\nnoise_multiplier = 1.0\n", "noise without a clip promises nothing"),
    ],
)
def test_a_value_that_cannot_be_says_what_came(text: str, words: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"my-run.toml: .*{words}"):
        read_run(file_of(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("server.rounds=9", lambda config: config.server.rounds == 9),
        ("server.lr = 1e-2", lambda config: config.server.lr == 0.01),
        ("server.optimizer=sgd", lambda config: config.server.optimizer == "sgd"),
        ("server.optimizer='sgd'", lambda config: config.server.optimizer == "sgd"),
        ("data.path=some/file.inter", lambda config: config.data.path == "some/file.inter"),
        ("data.path=a=b", lambda config: config.data.path == "a=b"),
        ("task.0.weight=0.25", lambda config: config.task[0].weight == 0.25 and len(config.task) == 1),
        ("task.0.name=contrastive", lambda config: config.task[0].name == "contrastive"),
        ("evaluation.ks=[1, 20]", lambda config: config.evaluation.ks == (1, 20)),
        ("privacy.clip_norm=0.5", lambda config: config.privacy == PrivacyConfig(clip_norm=0.5)),
        ("privacy.clip_norm=none", lambda config: config.privacy.clip_norm is None),
        ("counts.lags=2", lambda config: config.counts == CountsConfig(lags=2)),
        ("counts=none", lambda config: config.counts is None),
        ("head.name=none", lambda config: config.head.name == "none"),
        ("seed=11", lambda config: config.seed == 11),
    ],
)
def test_an_override_sets_one_key(text: str, found: Any):
    assert found(read_run({}, [text]))


def test_the_last_override_wins_and_the_seed_over_all():
    assert read_run({"seed": 1}, ["seed=2", "seed=3"]).seed == 3
    assert read_run({"seed": 1}, ["seed=2"], seed=5).seed == 5


def test_an_override_turns_a_presets_section_off():
    assert read_run("ml-1m").counts is not None
    assert read_run("ml-1m", ["counts=none", "encoder.first_items=random"]).counts is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds", "wanted section.key=value"),
        ("=3", "wanted section.key=value"),
        ("server..rounds=3", "wanted section.key=value"),
        ("server.rond=3", r"has no key 'rond'; did you mean 'rounds'"),
        ("task.7.weight=1", "there is no '7' to set 'weight' in"),
        ("task.first.weight=1", "there is no 'first'"),
        ("task.weight=1", "'task' is not a section"),
        ("server.rounds=many", r"\[server\] rounds = 'many'"),
    ],
)
def test_an_override_that_cannot_be_says_so(text: str, words: str):
    with pytest.raises(ConfigError, match=words):
        read_run({}, [text])


def test_an_override_into_a_number_says_so():
    with pytest.raises(ConfigError, match=r"--set seed.x=3"):
        read_run({"seed": 1}, ["seed.x=3"])


def test_a_missing_file_an_unknown_preset_and_what_is_not_toml_say_what_to_do(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere.toml: no such file; give a RUN.toml or the name of a preset \(.*ml-1m"):
        read_run(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"no preset or file 'ml-2m'; presets: .*ml-1m"):
        read_run("ml-2m")
    with pytest.raises(ConfigError, match=r"my-run.toml: there is no preset or file 'ml-2m'"):
        read_run(file_of(tmp_path, "preset = 'ml-2m'"))
    with pytest.raises(ConfigError, match="not TOML"):
        read_run(file_of(tmp_path, "[server\nrounds = 3"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not TOML"):
        read_run(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="no preset or file"):
        read_run(tmp_path)


# ---- what a run writes ----

sections = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63),
        "server": st.fixed_dictionaries({"lr": st.floats(1e-12, 1e6), "rounds": st.integers(1, 10**6), "floor": st.floats(0, 1)}),
        "counts": st.fixed_dictionaries({"clip_norm": st.none() | st.floats(1e-6, 1e6), "form": st.sampled_from(["log1p", "log-lift"])}),
        "data": st.fixed_dictionaries({"path": st.text(st.characters(exclude_categories=("Cs",)), max_size=20)}),
        "evaluation": st.fixed_dictionaries({"ks": st.lists(st.integers(1, 100), max_size=4)}),
        "task": st.lists(st.fixed_dictionaries({"name": st.just("contrastive"), "weight": st.floats(0.1, 3)}), min_size=1, max_size=3),
    },
)


@given(values=sections)
def test_what_was_written_is_the_same_run(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    config, path = RunConfig.model_validate(values), tmp_path_factory.mktemp("run") / "run.toml"
    write_run(config, path, run="abc", fingerprint="0f", torch="2", nothing=None)
    assert read_written_run(path) == (config, {"run": "abc", "fingerprint": "0f", "torch": "2"})
    assert [entry.name for entry in path.parent.iterdir()] == ["run.toml"]


def test_the_run_toml_of_a_run_begins_the_same_run_anew(tmp_path: Path):
    config = read_run("ml-1m", ["counts=none", "encoder.first_items=random", "server.rounds=3"])
    write_run(config, tmp_path / "run.toml", run="abc")
    # Its preset has counts; the run had none, and that stays so.
    assert read_run(tmp_path / "run.toml") == config
    assert read_run(tmp_path / "run.toml", ["server.rounds=4"], seed=9).server.rounds == 4


def test_every_setting_of_a_run_is_in_its_run_toml(tmp_path: Path):
    write_run(RunConfig(counts=CountsConfig()), tmp_path / "run.toml")
    written = tomllib.loads((tmp_path / "run.toml").read_text())
    for section, settings in RunConfig(counts=CountsConfig()).model_dump().items():
        if isinstance(settings, dict):
            assert {name for name, value in settings.items() if value is not None} == written[section].keys()
