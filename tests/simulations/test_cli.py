from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import fedssl, tiny_run, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with histories, a RUN.toml and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    assert fedssl("simulate", tiny_run(folder), "--out", folder / "run", "--quiet") == 0
    return folder


def checkpoint(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "round-000003"


def test_a_run_leaves_every_file_that_is_promised(tiny: Path):
    for name in ("run.toml", "metrics.jsonl", "report.json", "report.html"):
        assert (tiny / "run" / name).stat().st_size > 0
    for name in ("weights.safetensors", "optimizer.safetensors", "counts.safetensors", "recipe.json", "catalogue.jsonl", "state.json"):
        assert (checkpoint(tiny) / name).stat().st_size > 0
    report = json.loads((tiny / "run" / "report.json").read_text())
    assert {"hr@5", "hr@10", "ndcg@10", "mrr"} <= set(report["test"]["all"])
    assert set(report["test"]["parts"]) == {"encoder", "counts"}
    assert report["cost"]["rounds"] == 3


def test_a_collapsed_encoder_is_warned_of_and_a_healthy_one_is_not(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    deaf = "from fedssl.encoders import Encoder\nfrom torch import ones, ones_like\n\n\ndef deaf(config):\n"
    deaf += "    encode = lambda weights, rows, padding, masks: ones_like(rows) * weights['all'][:, None, None]\n"
    deaf += "    return Encoder(lambda rng: {'all': ones(config.width)}, encode, 0)\n"
    (tmp_path / "deaf.py").write_text(deaf)
    monkeypatch.syspath_prepend(tmp_path)
    for name, is_warned in (("sasrec", False), ("deaf:deaf", True)):
        capsys.readouterr()
        assert fedssl("simulate", tiny / "run.toml", "--set", f"encoder.name={name}", "--out", tmp_path / name[:4]) == 0
        assert ("encodings have collapsed: after round 3 they fill 1.0 of 8 directions" in capsys.readouterr().out) is is_warned


def test_evaluate_prints_the_numbers_of_the_report(tiny: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert fedssl("evaluate", checkpoint(tiny), tiny / "run.toml", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"] == json.loads((tiny / "run" / "report.json").read_text())["test"]


def test_an_exported_model_recommends_on_a_device_what_the_command_recommends(tiny: Path, capsys: pytest.CaptureFixture[str]):
    from fedssl_client.recommender import DeviceRecommender

    assert fedssl("export", checkpoint(tiny), "--out", tiny / "model") == 0
    device = DeviceRecommender(tiny / "model")
    tokens = list(device.catalogue.tokens[:4])
    capsys.readouterr()
    assert fedssl("recommend", checkpoint(tiny), *(word for token in tokens for word in ("--item", token)), "-k", "5", "--json") == 0
    assert [one["item"] for one in json.loads(capsys.readouterr().out)] == [one.item for one in device.recommend(tokens, k=5, exclude_seen=True)]


def test_recommend_takes_tokens_and_gives_tokens_it_was_not_given(tiny: Path, capsys: pytest.CaptureFixture[str]):
    tokens = (tiny / "h.txt").read_text().splitlines()[0].split()[1:4]
    capsys.readouterr()
    assert fedssl("recommend", checkpoint(tiny), *(word for token in tokens for word in ("--item", token)), "-k", "5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 5
    assert not {row["item"] for row in found} & set(tokens)
    (tiny / "history").write_text("\n".join(tokens))
    assert fedssl("recommend", checkpoint(tiny), "--history", tiny / "history", "-k", "5", "--json") == 0
    assert json.loads(capsys.readouterr().out) == found


def test_an_item_nobody_knows_is_named(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert fedssl("recommend", checkpoint(tiny), "--item", "no such thing") == 1
    assert "'no such thing' is not in the catalogue" in capsys.readouterr().err


def test_baselines_share_the_table(tiny: Path, capsys: pytest.CaptureFixture[str]):
    names = ("popularity", "markov", "log-lift counts", "each alone", "central")
    capsys.readouterr()
    assert fedssl("baselines", tiny / "run.toml", *(word for name in names for word in ("--only", name)), "--json", "--out", tiny / "base") == 0
    rows = json.loads(capsys.readouterr().out)["baselines"]
    assert set(rows) == set(names)
    assert rows == json.loads((tiny / "base" / "baselines.json").read_text())
    assert all({"all", "unseen"} <= set(row["test"]) for row in rows.values())


def test_presets_are_listed_with_what_they_are_in_the_width_of_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert fedssl("presets") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ml-1m ") for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_report_of_a_finished_run_is_one_page(tiny: Path):
    assert fedssl("report", tiny / "run", "--out", tiny / "page.html") == 0
    assert "<html" in (tiny / "page.html").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[privacy]\nclip_nrom = 1.0", ["run.toml", "[privacy]", "'clip_nrom'", "did you mean 'clip_norm'"]),
        ("[server]\nrounds = 'many'", ["run.toml", "[server]", "rounds = 'many'", "integer"]),
        ("[data]\npath = 'not-there.txt'", ["not-there.txt"]),
        ("[server", ["run.toml", "not TOML"]),
    ],
)
def test_a_wrong_setting_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]):
    (tmp_path / "run.toml").write_text(text)
    assert fedssl("simulate", tmp_path / "run.toml", "--out", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    for word in words:
        assert word in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "content"), [("empty", b""), ("another format", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), ("one event each", b"a x\nb y\nc z\n")])
def test_a_file_that_is_no_history_is_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes):
    (tmp_path / "h.txt").write_bytes(content)
    write_tiny(tmp_path, tmp_path / "h.txt")
    assert fedssl("simulate", tmp_path / "run.toml", "--out", tmp_path / "run", "--set", "data.min_events=1") == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "h.txt" in said
    assert not (tmp_path / "run").exists()


def test_a_user_with_one_event_trains_nobody_and_stops_nothing(tmp_path: Path, tiny: Path):
    (tmp_path / "h.txt").write_text((tiny / "h.txt").read_text() + "loner " + (tiny / "h.txt").read_text().split()[1] + "\n")
    write_tiny(tmp_path, tmp_path / "h.txt")
    assert fedssl("simulate", tmp_path / "run.toml", "--out", tmp_path / "run", "--set", "data.min_events=1", "--set", "server.cohort=61", "-q") == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["data"]["users"] == 61


def test_a_checkpoint_of_another_catalogue_is_refused(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert fedssl("data", "synthesize", tmp_path / "other.txt", "--users", "60", "--items", "80", "--events", "12", "--seed", "2") == 0
    write_tiny(tmp_path, tmp_path / "other.txt")
    assert fedssl("evaluate", checkpoint(tiny), tmp_path / "run.toml") == 1
    assert "another one" in capsys.readouterr().err


def test_a_checkpoint_of_a_newer_format_says_what_to_install(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]):
    newer = tmp_path / "round-000003"
    shutil.copytree(checkpoint(tiny), newer)
    (newer / "state.json").write_text((newer / "state.json").read_text().replace('"format": 2', '"format": 3'))
    assert fedssl("evaluate", newer, tiny / "run.toml") == 1
    said = capsys.readouterr().err
    assert "format 3" in said
    assert "install" in said


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]):
    assert fedssl("simulate") == 2
    assert fedssl("no-such-command") == 2
    capsys.readouterr()


@pytest.mark.parametrize("words", [("--set", "server.rounds=9"), ("--seed", "2"), ("--out", "elsewhere")])
def test_a_resume_that_would_pass_over_what_was_asked_is_wrong_usage(words: tuple[str, ...], tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert fedssl("simulate", "--resume", tiny / "run", *words) == 2
    assert "are for a run that begins" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["encoder.name=bert4rec", "encoder.name=no_such_module:encoder", "start=nowhere"])
def test_a_run_that_cannot_begin_leaves_its_folder_to_one_that_can(setting: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for _ in range(2):
        assert fedssl("simulate", tiny / "run.toml", "--set", setting, "--out", tmp_path / "run") == 1
        assert "not empty" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.toml").exists()


def test_an_export_takes_the_place_of_a_model_alone(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(tiny / "run", tmp_path / "run")
    (tmp_path / "file").write_text("kept")
    for out in ("run", "file"):
        assert fedssl("export", checkpoint(tiny), "--out", tmp_path / out) == 1
        assert "it would be lost. Name another folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"
    assert (tmp_path / "run" / "run.toml").exists()
    (tmp_path / "model").mkdir()
    assert fedssl("export", checkpoint(tiny), "--out", tmp_path / "model") == fedssl("export", checkpoint(tiny), "--out", tmp_path / "model") == 0


@pytest.mark.parametrize("group", [[], ["data"], ["attack"], ["server"], ["device"]])
def test_what_commands_are_for_is_whole_in_80_columns(group: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert fedssl(*group, "--help") == 0
    listed = capsys.readouterr().out.split("Commands:")[1]
    assert "..." not in listed


def test_an_interrupted_command_says_so_and_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedssl_simulations.run_files.presets", interrupted)
    assert fedssl("presets") == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]):
    for words in (["simulate"], ["baselines"], ["evaluate"], ["recommend"], ["export"], ["report"], ["presets"], ["data", "describe"], ["data", "synthesize"]):
        assert fedssl(*words, "--help") == 0
        assert "Example: fedssl" in capsys.readouterr().out


def test_help_says_what_an_argument_is_for(capsys: pytest.CaptureFixture[str]):
    assert fedssl("recommend", "--help") == 0
    assert "CHECKPOINT  A folder like RUN/checkpoints/round-000120  [required]" in capsys.readouterr().out


def test_a_store_gives_the_run_of_its_file(tiny: Path, tmp_path: Path):
    assert fedssl("data", "convert", tiny / "h.txt", tmp_path / "store") == 0
    assert fedssl("simulate", tiny / "run.toml", "--set", f"data.path={tmp_path / 'store'}", "--out", tmp_path / "run", "-q") == 0
    assert (tmp_path / "run" / "checkpoints" / "round-000003" / "weights.safetensors").read_bytes() == (checkpoint(tiny) / "weights.safetensors").read_bytes()


def test_describe_and_convert_count_bad_lines_and_find_columns_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [f"{who},{what},{when}" for who in ("ann", "ben", "eve") for when, what in enumerate("abcd")]
    (tmp_path / "data.csv").write_text("\n".join(["who,what,when", *rows[:3], "broken", *rows[3:]]))
    words = (tmp_path / "data.csv", "--min-events", "1")
    assert fedssl("data", "describe", *words) == 1
    assert "it could be csv: set [data] format, and [data] columns" in capsys.readouterr().err
    words = (*words, "--columns", "who,what,when")
    assert fedssl("data", "describe", *words) == 1
    assert "data.csv, line 5: 1 fields where the header has 3" in capsys.readouterr().err
    assert fedssl("data", "describe", *words, "--skip-bad-lines", "--split", "global-time", "--validation-from", "2", "--test-from", "3", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["bad_lines"], facts["events"], facts["training"]["events"], facts["test"]["users"]) == (1, 12, 6, 3)
    assert facts["test"]["cold_items"] == 3
    assert fedssl("data", "describe", *words, "--split", "sideways") == 1
    assert "split = 'sideways'" in capsys.readouterr().err
    (tmp_path / "people.csv").write_text("user_id,age\nann,30\nzoe,4\n")
    assert fedssl("data", "convert", *words[:1], tmp_path / "store", *words[1:], "--skip-bad-lines", "--users", tmp_path / "people.csv") == 0
    said = capsys.readouterr()
    assert "3 users, 4 items, 12 events" in said.out
    assert "passed over 1 lines that cannot be read; the first: " in said.err
    assert (tmp_path / "store" / "users.jsonl").read_text() == '{"user": "ann", "attributes": {"age": "30"}}\n'


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tiny: Path, tmp_path: Path):
    words = [sys.executable, "-m", "fedssl_simulations.cli", "simulate"]
    settings = ["--set", "server.rounds=100000", "--set", "system.checkpoint_every=100000"]
    process = subprocess.Popen([*words, tiny / "run.toml", "--out", tmp_path / "run", *settings], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: fedssl simulate --resume {tmp_path / 'run'}" in said
    assert "Traceback" not in said
    assert next((tmp_path / "run" / "checkpoints").glob("round-*")).name > "round-000003"


def test_python_offers_simulate_and_read_run():
    from fedssl_simulations import read_run, simulate

    assert callable(simulate)
    assert read_run("demo").preset == "demo"
