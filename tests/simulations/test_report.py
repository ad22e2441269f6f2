import json
import re
from html.parser import HTMLParser

import pytest
import tomli_w
from fedssl_simulations.report import write_report

from fedssl.errors import RunFolderError


def both(value):
    """Metrics that are told apart at four digits."""
    metrics = {"hr@5": value + 0.0011, "hr@10": value + 0.0022, "ndcg@5": value + 0.0033, "ndcg@10": value + 0.0044, "mrr": value + 0.0055}
    return {"all": metrics, "unseen": {name: more + 0.1 for name, more in metrics.items()}}


LISTS = {"coverage": 0.12349, "gini": 0.87654, "novelty": 9.87654, "popularity_lift": 1.2349}
BEYOND = {"beyond_accuracy": {"list_length": 7, "all": LISTS, "unseen": {**LISTS, "popularity_lift": -0.5}, "held_out": {**LISTS, "popularity_lift": None}}}
LISTS_IN_WORDS = ["lists of 7", "12.3 %", "0.877", "9.88", "+123 %", "-50 %", "What people took"]
MEASURED = {
    "test": {**both(0.31), "parts": {"encoder": both(0.32), "counts": both(0.33)}},
    "validation": both(0.34),
    "groups": {
        "activity": {"few": {"users": 10, "from": 1, "to": 5, **both(0.35), "interval": {"of": "ndcg@10", "all": [0.2987, 0.3987], "unseen": [0.4, 0.5]}}},
        "popularity": {"head": {"users": 7, "from": 9, "to": 9, **both(0.36)}},
    },
    "baselines": {"popularity": {"test": both(0.01), "validation": both(0.03), "seconds": 2.0}, "markov": {"test": both(0.02)}},
}
DATA = {"data": {"users": 1234, "items": 77, "events": 5678, "fingerprint": "f00d"}}
COST = {"cost": {"rounds": 12, "users_trained": 300, "seconds": 75.0, "users_per_second": 4.0, "upload_bytes_per_user": 1500, "peak_rss_bytes": 2.5e8}}
PLAN = {"privacy": {"unit": "user", "trust": "central", "epsilon": 8.0, "delta": 1e-6, "noise_multiplier": 1.1, "clip_norm": 1.0, "accountant": "PLD"}}
CONFIG = {"seed": 7, "encoder": {"name": "sasrec", "width": 64}, "server": {"rounds": 12, "cohort": 25.0}, "task": [{"name": "next-item"}]}


def folder(path, *, config=None, lines=None, report=None):
    path.mkdir()
    if config is not None:
        (path / "run.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    if lines is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if report is not None:
        (path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return path


def page(*folders, public=False):
    out = folders[0].parent / "page.html"
    write_report(list(folders), out, public=public)
    return out.read_text(encoding="utf-8")


def numbers(value):
    """The metrics at any depth."""
    if not isinstance(value, dict):
        return []
    return [part for name, part in value.items() if isinstance(part, float) and name != "seconds"] + [
        number for part in value.values() for number in numbers(part)
    ]


def rounds(count, **more):
    return [{"round": at, "phase": "training", "seconds": 0.1, "users": 25, "loss": 5 - at / 10, **more} for at in range(1, count + 1)]


class Checked(HTMLParser):
    """Every tag that is opened is closed, in order; ids are unique; references are collected."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action", "data")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text):
    parser = Checked()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    return parser


def test_the_page_holds_every_metric_of_the_report(tmp_path):
    text = page(folder(tmp_path / "run", report={**DATA, **MEASURED}))
    found = numbers(MEASURED)
    assert len(found) == 10 * 9
    assert [value for value in found if f"{value:.4f}" not in text] == []
    assert [words for words in LISTS_IN_WORDS if words in text] == []
    for words in ("1,234 users", "77 items", "5,678 events", "Encoder alone", "Markov chain", "Few", "1 to 5", "0.2987–0.3987", "0.4000–0.5000"):
        assert words in text


def test_the_page_is_well_formed_and_fetches_nothing(tmp_path):
    one = folder(tmp_path / "one", config=CONFIG, lines=rounds(300, validation=both(0.2), epsilon=1.0), report={**DATA, **MEASURED, **COST, **PLAN})
    two = folder(tmp_path / "two", config=CONFIG, lines=rounds(3), report={**DATA, **MEASURED})
    for text in (page(one), page(one, two)):
        found = parsed(text)
        assert found.references == ["data:,"]
        assert "script" not in found.tags
        assert not re.search(r"https?:|//|@import|url\(", text)


def test_names_and_settings_are_escaped(tmp_path):
    nasty = "<img src=x onerror=alert(1)>&\"'"
    report = {
        **DATA,
        "test": {**both(0.3), "parts": {nasty: both(0.1)}},
        "baselines": {nasty: {"test": both(0.2)}},
        "privacy": {"accountant": nasty, "epsilon": 1.0},
    }
    text = page(folder(tmp_path / "<b>run", config={"seed": 1, "preset": nasty}, report={**report, "cost": {nasty: nasty}}))
    assert "<img" not in text
    assert "<b>" not in text
    assert "<title>&lt;b&gt;run" in text
    parsed(text)


def test_a_public_page_leaves_out_all_that_was_kept_for_the_researcher(tmp_path):
    lines = [{"round": 1, "phase": "training", "epsilon": 0.5, "researcher_only": {"loss": 4.321, "validation": both(0.2)}}]
    run = folder(
        tmp_path / "run",
        config={**CONFIG, "researcher_only": {"chosen": "by-peeking"}},
        lines=lines,
        report={**DATA, **PLAN, "researcher_only": {**MEASURED, **BEYOND}},
    )
    private, public = page(run), page(run, public=True)
    kept = [f"{value:.4f}" for value in numbers(MEASURED)] + ["4.321", "0.2044", "by-peeking", "Training loss", "Markov", "0.2987", *LISTS_IN_WORDS]
    assert [words for words in kept if words not in private] == []
    assert [words for words in kept if words in public] == []
    assert "For the researcher only" in private
    assert "For the researcher only" not in public
    assert "Epsilon spent" in public
    assert "ε = 8" in public
    parsed(public)


def test_what_is_in_the_lists_stands_on_the_page(tmp_path):
    text = page(folder(tmp_path / "run", report={**DATA, **MEASURED, **BEYOND}))
    assert [words for words in LISTS_IN_WORDS if words not in text] == []
    parsed(text)


def test_facts_about_the_contrast_stand_on_the_page(tmp_path):
    text = page(folder(tmp_path / "run", report={**DATA, "contrast": {"negatives": "invented histories", "gradient_ratio": None, "effective_rank": 12.25}}))
    for words in ("What the contrast does", "Negatives", "invented histories", "Effective rank", "12.25"):
        assert words in text


def test_a_run_without_a_plan_says_that_nothing_is_promised(tmp_path):
    text = page(folder(tmp_path / "run", config=CONFIG, report={**DATA, **MEASURED}))
    assert "No differential privacy is promised" in text
    assert "sees each user&#39;s exact update" in text
    assert "For the researcher only" not in text


def test_missing_parts_are_left_out(tmp_path):
    only_lines = page(folder(tmp_path / "a", lines=rounds(2)))
    assert "Training loss" in only_lines
    assert "<h2>Results" not in only_lines
    assert "<h2>Cost" not in only_lines
    only_config = page(folder(tmp_path / "b", config=CONFIG))
    assert "One SASRec encoder, learned by next-item" in only_config

    assert "Over the rounds" not in only_config
    only_report = page(folder(tmp_path / "c", report={"cost": {"rounds": 3}}))
    assert "<h2>Cost" in only_report
    assert "<h2>Settings" not in only_report
    for text in (only_lines, only_config, only_report):
        parsed(text)


def test_the_page_says_which_rounds_the_model_is_of(tmp_path):
    plain = page(folder(tmp_path / "plain", config=CONFIG, report={**MEASURED, **COST, "model": {"round": 12, "stopped_early": False, "average_from": None}}))
    assert "over 12 rounds of about 25 users." in plain and "the best on validation" not in plain and "the mean of" not in plain
    config = {**CONFIG, "server": {"rounds": 900, "cohort": 25.0}}
    stopped = page(folder(tmp_path / "stopped", config=config, report={**MEASURED, **COST, "model": {"round": 8, "stopped_early": True, "average_from": 5}}))
    assert "over 12 rounds of about 25 users. Training was stopped early, of 900 planned rounds." in stopped
    assert "What is reported is the model after round 8, the best on validation. Its weights are the mean of those after rounds 5 to 8." in stopped


def test_a_run_that_only_counts_says_so_and_shows_no_rounds(tmp_path):
    cost = {"rounds": 0, "users_trained": 0, "seconds": 9.0, "upload_bytes_per_user": 0, "counts_upload_bytes_per_user": 4_000_000}
    config = {"encoder": {"name": "sasrec"}, "counts": {"lags": 2}, "distillation": {"steps": 9}, "server": {"rounds": 0, "cohort": 64}}
    text = page(folder(tmp_path / "r", config=config, report={"cost": cost, "model": {"round": 1}}))
    assert "one SASRec encoder that the server taught from it. No round of training." in text
    assert "Upload, per user, once" in text and "4 MB" in text
    assert "Users trained" not in text and "0 rounds" not in text and "after round" not in text


def test_a_line_that_is_being_written_is_not_read_yet(tmp_path):
    run = folder(tmp_path / "run", lines=rounds(2))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "lo')
    assert "Training loss" in page(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 3: not a JSON object"):
        page(run)


def test_runs_of_the_same_data_share_a_chart_and_a_baseline_stands_once(tmp_path):
    one = folder(tmp_path / "one", report={**DATA, **MEASURED})
    two = folder(tmp_path / "two", report={**DATA, "test": both(0.5), "baselines": {"popularity": {"test": both(0.01)}, "markov": {"test": both(0.04)}}})
    text = page(one, two)
    assert text.count('class="bars"') == 1
    heads = re.findall(r'<th scope="row"><span class="mark \w+"></span>(.*?)</th>', text.split("<h3>Validation")[0])
    assert heads == ["two", "one", "one: item-to-item counts alone", "one: encoder alone", "Markov chain", "Markov chain", "Popularity"]


def test_runs_of_different_data_share_nothing(tmp_path):
    one = folder(tmp_path / "one", report={**DATA, "test": both(0.5)})
    two = folder(tmp_path / "two", report={"data": {"users": 5, "fingerprint": "beef"}, "test": both(0.4)})
    text = page(one, two)
    assert text.count('class="bars"') == 2
    parsed(text)


def test_settings_that_differ_between_runs_come_first_and_are_marked(tmp_path):
    one = folder(tmp_path / "one", config=CONFIG)
    two = folder(tmp_path / "two", config={**CONFIG, "server": {"rounds": 99, "cohort": 25.0}})
    rows = re.findall(r'<tr( class="differs")?><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', page(one, two))
    assert rows[0] == (' class="differs"', "server.rounds", "12", "99")
    assert [row[0] for row in rows[1:]] == [""] * (len(rows) - 1)


@pytest.mark.parametrize("path", ["/secret/place/ml-1m.inter.gz", "~/place/ml-1m.inter.gz", "C:\\secret\\place\\ml-1m.inter.gz"])
def test_a_page_names_no_folder_of_the_machine(tmp_path, path):
    text = page(folder(tmp_path / "run", config={"data": {"path": path}}))
    assert "ml-1m.inter.gz" in text
    assert "place" not in re.sub(r"(?s)<style>.*</style>", "", text)
    assert str(tmp_path) not in text


def test_two_folders_of_one_name_are_numbered(tmp_path):
    (tmp_path / "x").mkdir()
    text = page(folder(tmp_path / "run", lines=rounds(1)), folder(tmp_path / "x" / "run", lines=rounds(1)))
    assert "run (1)" in text
    assert "run (2)" in text


def test_bytes_and_seconds_are_told_in_units_that_people_read(tmp_path):
    text = page(folder(tmp_path / "run", report={"cost": {**COST["cost"], "download_bytes_per_user": 881_234_000}}))
    for words in ("1.5 kB", "881 MB", "250 MB", "1 min 15 s"):
        assert words in text


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"empty: no run\.toml, metrics\.jsonl or report\.json"):
        page(folder(tmp_path / "empty"))
    with pytest.raises(RunFolderError, match="no run folder was named"):
        write_report([], tmp_path / "page.html")


@pytest.mark.parametrize(("name", "text"), [("report.json", "{"), ("report.json", "[1]"), ("run.toml", "a = = 1")])
def test_a_damaged_file_is_named(tmp_path, name, text):
    run = folder(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(RunFolderError, match=re.escape(name)):
        page(run)
