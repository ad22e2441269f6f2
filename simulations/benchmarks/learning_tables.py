"""The README's tables of what is learned: quality on each data set, and what tasks, heads, features and other models give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import cold_items as cold
import results
import transfer as carried
from cells import spread

QUALITY = (
    ("popularity", "popularity"),
    ("each alone", "each user alone (128 of them)"),
    ("markov", "Markov, last three items decayed"),
    ("log-lift counts", "item-to-item counts alone, log-lift"),
    ("central", "central training of the same encoder"),
    ("central, half the learning rate", "central training, half the learning rate"),
    ("central, twice the learning rate", "central training, twice the learning rate"),
    ("federated, equal weights", "**federated**, users weigh alike, mean loss"),
    ("federated, equal weights, summed loss", "**federated**, users weigh alike, summed loss"),
    ("federated, weights by positions", "**federated**, weights by positions"),
    ("federated, weights by positions, without the previous item", "**federated**, weights by positions, without the task previous item"),
    ("federated, weights by positions, BERT4Rec and masked item", "**federated**, weights by positions, BERT4Rec with masked item instead"),
    (
        "federated, weights by positions, BERT4Rec and masked item, three times the rounds",
        "**federated**, weights by positions, BERT4Rec with masked item instead, three times the rounds",
    ),
    ("federated, weights by positions, with contrast", "**federated**, weights by positions, the contrastive task beside"),
    ("federated, weights by positions, with a head", "**federated**, weights by positions, a user vector kept by each"),
    ("federated, weights by positions, with the previous item", "**federated**, weights by positions, + the task previous item"),
    ("federated, weights by positions, with the history's mean", "**federated**, weights by positions, + the head of the history's mean"),
    ("federated, weights by positions, with the previous item and the history's mean", "**federated**, weights by positions, + both"),
)

PUBLISHED = (
    ("eSASRec ([2025](https://arxiv.org/abs/2508.06450))", "central", 0.177, 0.052),
    ("ICSRec ([2023](https://arxiv.org/abs/2310.14318))", "central", 0.201, 0.058),
    ("HSTU, large ([2024](https://arxiv.org/abs/2402.17152))", "central", 0.216, None),
    ("DuoRec ([2021](https://arxiv.org/abs/2110.05730))", "central", None, 0.044),
    ("CoFedRec ([2024](https://arxiv.org/abs/2411.01690))", "federated", 0.089, None),
)
"""NDCG@10 `unseen` on MovieLens-1M and Beauty, leave-one-out over the whole catalogue, as others printed it."""
OURS = (
    ("ours, encoder alone", "federated, weights by positions", "encoder"),
    ("ours, encoder and counts", "federated, weights by positions", ""),
    ("ours, with the head of the history's mean", "federated, weights by positions, with the history's mean", ""),
)

CURVES = """![NDCG@10 `unseen` on the validation event against rounds, seconds of training and bytes that a user has sent](docs/quality.svg)

*The whole recommender's NDCG@10 `unseen` on the validation event (`python simulations/benchmarks/curves.py` draws what `quality.py` recorded).*
"""


NOTES = {
    "ml-100k": " A small SASRec without counts, for trials of tasks and heads; it stands below the counts, and `ml-100k-counts` is what recommends best there."
}


def quality(preset: str) -> str:
    """A preset's rows, each the mean over the seeds that were run, with the least and the most."""
    found = rows_of(preset)
    if not found:
        return ""
    newest = list(found["federated, weights by positions"].values())[-1]
    lines = [
        f"**Preset `{preset}`**: NDCG@10 on the held-out last event, ranked against the whole catalogue (`python simulations/benchmarks/quality.py {preset}`; "
        f"2 cores of {newest['cpu']}). Means over seeds (least to most); seconds are of training, by mean, with whatever else ran on the machine."
        f"{NOTES.get(preset, '')}",
        "",
        "| recommender | `all` | `unseen` | seeds | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, label in QUALITY:
        rows = list(found[name].values())
        if not rows:
            continue
        parts = rows[0]["test"].get("parts", {})
        if "encoder" in parts:
            lines.append(line(f"{label}: encoder alone", [row["test"]["parts"]["encoder"] for row in rows], rows))
            lines.append(line(f"{label}: encoder and counts", [row["test"] for row in rows], rows))
        else:
            lines.append(line(label, [row["test"] for row in rows], rows))
    central, equal, positions = (found[name] for name in ("central", "federated, equal weights, summed loss", "federated, weights by positions"))
    if "counts" in newest["test"].get("parts", {}):
        lines.append(line("the preset's item-to-item counts alone", [row["test"]["parts"]["counts"] for row in positions.values()], []))
    said = []
    for rows, label in ((positions, "weights by positions"), (equal, "equal weights (summed loss)")):
        if set(central) & set(rows):
            said.append(f"Federated with {label} reaches, `all` / `unseen`, {share(rows, central)} of central training (encoder alone).")
    if set(positions) & set(equal):
        alone = share(equal, positions)
        with_counts = f" with the counts, {alone} without" if "parts" in newest["test"] else ""
        said.append(f"Equal weights reach {share(equal, positions, whole=True)} of weights by positions{with_counts}.")
    if said:
        lines += ["", " ".join(said)]
    return "\n".join([*lines, ""])


def published() -> str:
    """Our means over seeds beside what others printed."""
    both, lines = [rows_of(preset) for preset in ("ml-1m", "beauty")], []
    for label, name, part in OURS:
        if not all(name in found for found in both):
            continue
        tests = [[row["test"]["parts"][part] if part else row["test"] for row in found[name].values()] for found in both]
        cells = " | ".join(f"{fmean(test['unseen']['ndcg@10'] for test in some):.4f}" for some in tests)
        lines.append(f"| **{label}** | federated, a user a client | {cells} |")
    for name, how, *values in PUBLISHED:
        lines.append(f"| {name} | {how} | {' | '.join('' if value is None else f'{value:.3f}' for value in values)} |")
    about = (
        "leave-one-out over the whole catalogue; filters and numbers of items differ a little from paper to paper, so a small difference says nothing. "
        "CoFedRec, the best federated result we found, is quoted second-hand and knows no order of events"
    )
    head = ["| recommender | trained | MovieLens-1M | Beauty |", "|---|---|---|---|"]
    return "\n".join([f"**Beside what others printed**, NDCG@10 `unseen`, {about}.", "", *head, *lines, ""])


def rows_of(preset: str) -> dict[str, dict[int, dict[str, Any]]]:
    """A preset's rows by name and seed, the newest of each, of the settings that were run last; rows of others are what the preset once was."""
    mine = [row for row in results.rows("quality") if row["preset"] == preset]
    last = next((row["settings"] for row in reversed(mine) if row["name"] == "federated, weights by positions"), None)
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in mine:
        if row["settings"] == last:
            found[row["name"]][row["seed"]] = row
    return found


def share(rows: Mapping[int, Mapping[str, Any]], of: Mapping[int, Mapping[str, Any]], *, whole: bool = False) -> str:
    """The ratio of means over the seeds that both have, of the encoder alone or of the whole recommender."""
    seeds = sorted(set(rows) & set(of))

    def total(some: Mapping[int, Mapping[str, Any]], which: str) -> float:
        tests = [some[seed]["test"] for seed in seeds]
        return sum(float((test if whole else test.get("parts", {}).get("encoder", test))[which]["ndcg@10"]) for test in tests)

    return " / ".join(f"{total(rows, which) / total(of, which):.3f}" for which in ("all", "unseen"))


def line(label: str, found: list[Mapping[str, Any]], rows: list[dict[str, Any]]) -> str:
    """A row of a table of quality. ``rows``: for the seeds and the seconds; none: both are left empty."""
    cells = [
        f"{found[0][which]['ndcg@10']:.4f}" if len({one[which]["ndcg@10"] for one in found}) == 1 else spread([one[which] for one in found])
        for which in ("all", "unseen")
    ]
    seeds = ", ".join(str(row["seed"]) for row in rows)
    seconds = f"{sum(row['seconds'] for row in rows) / len(rows):.0f}" if rows else ""
    return f"| {label} | {' | '.join(cells)} | {seeds} | {seconds} |"


def parts_that_help() -> str:
    """What a task and a head are worth, by the newest comparison over three seeds, and what steps between rounds are."""
    lines = []
    rounds = {row["settings"]: row["rounds"] for row in results.rows("paired_runs")}
    for file, beside in (("task_gains", "next item"), ("head_gains", "no head")):
        newest = {(row["preset"], rounds[row["runs"][0]], _number_of_rates(row), row["name"]): row for row in results.rows(file) if len(row["seeds"]) > 2}
        for (preset, number, _, name), row in sorted(newest.items(), key=lambda one: one[0]):
            rates = rates_tried(row)
            gains = dict(row["gains"])
            if len(gains) == 2 and file == "task_gains" and len({str(one) for one in gains.values()}) == 1:
                del gains["all users"]  # they all have so short a history
            for what, one in gains.items():
                what = f"NDCG@10, {what}" if file == "task_gains" else what
                lines.append(f"| {name}, against {beside} | {preset}, {number} rounds{rates} | {what} | {_gain(one)} |")
            if "rounds_to_95" in row:
                what = f"rounds until 95 % of the last validation of {beside} alone"
                lines.append(f"| {name}, against {beside} | {preset}, {number} rounds{rates} | {what} | {_rounds(*row['rounds_to_95'])} |")
    for row in {(row["preset"], row["name"]): row for row in results.rows("part_gains") if len(row["seeds"]) > 2}.values():
        number = f"{row['preset']}, {rounds[row['runs'][0]]} rounds{rates_tried(row)}"
        lines.append(f"| {row['name']}, taken from the whole preset | {number} | NDCG@10 | {_gain(row['gains']['NDCG@10'])} |")
    for head in ("user vector", "user vector and history"):
        row = results.newest("adaptation", name=head)
        if row is None:
            continue
        name = f"{head}, with a step at each event, against without (`adapt = {row['rate']:g}`)"
        lines.append(f"| {name} | {row['preset']} | NDCG@10 of the last 5 of 10 events, one by one | {_gain(row['gains']['unseen'])} |")
    if not lines:
        return ""
    head = "| with | preset | `unseen` of the test | without | with | gain (95 % over users) | seeds |\n|---|---|---|---|---|---|---|\n"
    about = "runs with and without, compared user by user over three seeds (`python simulations/benchmarks/tasks.py`, `heads.py`, `parts.py`, `adaptation.py`)"
    return f"**Tasks and heads** ([docs/tasks.md](docs/tasks.md)): {about}.\n\n{head}" + "\n".join(lines) + "\n"


def rates_tried(row: Mapping[str, Any]) -> str:
    """The learning rates at which two arms are compared, each arm's best of as many; nothing where none were tried."""
    before, after = row.get("rates", (None, None))
    if before is None or after is None:
        return ""
    return f", best of {len(before['validated'])} learning rates each ({before['best']:g} without, {after['best']:g} with)"


def _number_of_rates(row: Mapping[str, Any]) -> int:
    return len(row["rates"][0]["validated"]) if row.get("rates") else 0


def _gain(one: Mapping[str, Any]) -> str:
    (low, high), (least, most) = one["interval"], one["seeds"]
    return f"{one['before']:.4g} | {one['after']:.4g} | {one['gain']:+.1%} ({low:+.1%} to {high:+.1%}) | {least:+.1%} to {most:+.1%}"


def _rounds(before: list[int | None], after: list[int | None]) -> str:
    """Rounds of each seed, and how many more; a seed that never came so far has no number."""
    cells = [", ".join("never" if number is None else str(number) for number in numbers) for numbers in (before, after)]
    more = [second / first - 1 for first, second in zip(before, after, strict=True) if first is not None and second is not None]
    return f"{' | '.join(cells)} |  | {'' if len(more) < len(before) else f'{min(more):+.0%} to {max(more):+.0%}'}"


def cold_items() -> str:
    """Items and people not met in training, with and without features of items."""
    found = [_cold_rows(rows_left_out) for rows_left_out in (0.25, 0.0)]
    left_out, none_left_out = found
    if not left_out:
        return ""
    about = (
        f"`{left_out[0]['preset']}`, {len(left_out)} seeds, a tenth of the items and of the people kept from training, `unseen`, without features of items and "
        "with them (`python simulations/benchmarks/cold_items.py --features ... --set server.rows_left_out=0.25`); intervals over people"
    )
    text = f"**Items and people not met before** ([docs/new-items.md](docs/new-items.md)): {about}.\n\n{cold.table(left_out)}\n"
    if none_left_out:
        name = next(iter(none_left_out[0]["groups"]))
        *_, low, high, difference = cold.cells(none_left_out, name)
        text += f"\nWithout `rows_left_out`, {name}: NDCG@10 {low} without features, {high} with them, {difference}.\n"
    return text


def _cold_rows(rows_left_out: float) -> list[dict[str, Any]]:
    newest = results.newest("cold_items", rows_left_out=rows_left_out)
    rows = [] if newest is None else [row for row in results.rows("cold_items") if row["settings"] == newest["settings"] and "rows_left_out" in row]
    return list({row["seed"]: row for row in rows}.values())


def transfer() -> str:
    """The first rounds on a new catalogue from a checkpoint of another one."""
    newest = results.newest("transfer")
    if newest is None:
        return ""
    rows = list({(row["name"], row["seed"]): row for row in results.rows("transfer") if row["settings"] == newest["settings"]}.values())
    seeds = len({row["seed"] for row in rows})
    about = f"MovieLens-100K from a model of MovieLens-1M, NDCG@10 `unseen` on the validation event, {seeds} seeds, intervals of 95 % over people"
    where = "[docs/new-items.md](docs/new-items.md); `python simulations/benchmarks/transfer.py`"
    return f"**A new catalogue from a checkpoint** ({where}): {about}.\n\n{carried.table(rows)}\n"
