"""The README's tables, from results/*.jsonl: every number there was printed by a script beside this one.

python simulations/benchmarks/tables.py            (rewrites the part of README.md between the markers)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deployment_tables
import results

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
QUALITY = (
    ("popularity", "popularity"),
    ("each alone", "each user alone (a sample)"),
    ("markov", "Markov, last three items decayed"),
    ("log-lift counts", "item-to-item counts alone, log-lift"),
    ("central", "central training of the same encoder"),
    ("federated, equal weights", "**federated**, users weigh alike, mean loss"),
    ("federated, equal weights, summed loss", "**federated**, users weigh alike, summed loss"),
    ("federated, weights by positions", "**federated**, weights by positions"),
    ("federated, weights by positions, with contrast", "**federated**, weights by positions, the contrastive task beside"),
    ("federated, weights by positions, with a head", "**federated**, weights by positions, a user vector kept by each"),
)


CURVES = """![NDCG@10 `unseen` on the validation event against rounds, seconds of training and bytes that a user has sent](docs/quality.svg)

*The whole recommender's NDCG@10 `unseen` on the validation event (`python simulations/benchmarks/curves.py` draws what `quality.py` recorded).*
"""


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    parts = [
        quality("ml-1m"),
        quality("beauty"),
        quality("ml-100k"),
        CURVES,
        parts_that_help(),
        clipping(),
        private(),
        learning(),
        fleet(),
        throughput(),
        peers(),
        workers(),
        memory(),
        scale(),
        counts_at_scale(),
        device(),
        kills(),
        deployment(),
        deployment_tables.faults(),
        deployment_tables.many_nodes(),
    ]
    README.write_text(f"{before}{BEGIN}\n{chr(10).join(part for part in parts if part)}\n{END}{after}")


def quality(preset: str) -> str:
    """A preset's rows, each the mean over the seeds that were run, with the least and the most."""
    newest = results.newest("quality", preset=preset, name="federated, weights by positions")
    if newest is None:
        return ""
    # Rows of other settings are what the preset once was; of one seed the newest counts.
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name, _ in QUALITY}
    for row in results.rows("quality"):
        if (row["preset"], row["settings"]) == (preset, newest["settings"]) and row["name"] in found:
            found[row["name"]][row["seed"]] = row
    lines = [
        f"**Preset `{preset}`**: NDCG@10 on the held-out last event, ranked against the whole catalogue (`python simulations/benchmarks/quality.py {preset}`; "
        f"2 cores of {newest['cpu']}). Means over seeds (least to most); seconds are of training, by mean, with whatever else ran on the machine.",
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
    if set(central) & set(equal):
        said.append(f"{share(equal, central)} of central training (encoder alone)")
    if set(positions) & set(equal):
        alone = share(equal, positions)
        with_counts = f" with the counts, {alone} without" if "parts" in newest["test"] else ""
        said.append(f"{share(equal, positions, whole=True)} of weights by positions{with_counts}")
    if said:
        lines += ["", f"Federated with equal weights (summed loss) reaches, `all` / `unseen`, {'; '.join(said)}."]
    return "\n".join([*lines, ""])


def private() -> str:
    """The presets under user-level privacy: the mean and the range over keys of the newest settings."""
    lines = []
    for preset in ("ml-1m-private-8", "ml-1m-private-2"):
        newest = results.newest("private_counts", preset=preset)
        if newest is None:
            continue
        stated, rows = newest["privacy"], _drawn("private_counts", preset=preset)
        if not lines:
            lines = [
                f"**User-level privacy**, MovieLens-1M's own 6,040 users: NDCG@10 on the test event, mean (least to most) of {len(rows)} fresh pairs "
                "of keys (`python simulations/benchmarks/private_counts.py`). "
                f"Unit: {stated['unit']}; neighbours: {stated['neighbours']}; trust: {stated['trust']}; every user once, no sampling; accountant: "
                f"{stated['accountant']}; delta {stated['delta']:g}. All that is released is counted, totals too. Outside epsilon: the catalogue, the "
                "5-core filter, and the settings, which were chosen on validation events.",
                "",
                "| preset | epsilon | whole, `all` | whole, `unseen` | counts alone | encoder alone (distilled) | seconds |",
                "|---|---|---|---|---|---|---|",
            ]
        found = [row["test"] for row in rows]
        cells = [_spread([one["all"] for one in found]), _spread([one["unseen"] for one in found])]
        for part in ("counts", "encoder"):
            has_part = all(part in one.get("parts", {}) for one in found)
            cells.append(" / ".join(_spread([one["parts"][part][which] for one in found]) for which in ("all", "unseen")) if has_part else "")
        seconds = max(row["seconds"] for row in rows)
        lines.append(f"| `{preset}` | {stated['epsilon']:.3f} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join([*lines, ""]) if lines else ""


def learning() -> str:
    """Ways of learning under noise: the newest settings of each, and the presets' own rows at the end."""
    ways, popularity = list(dict.fromkeys(row["way"] for row in results.rows("private_learning"))), results.newest("quality", preset="ml-1m", name="popularity")
    if not ways or popularity is None:
        return ""
    lines = [
        "**Ways of learning under user-level privacy**, the same people and promise (user, central, delta 1e-05): NDCG@10 on the test event of what would be "
        "recommended, `all` / `unseen` (`python simulations/benchmarks/private_learning.py`, of the few step sizes tried, those that validated best; "
        "one pair of keys, where "
        f"more were drawn their mean). Popularity without privacy: {_mean_pair([popularity['test']])}.",
        "",
        "| way | epsilon 8 | epsilon 2 |",
        "|---|---|---|",
    ]
    for way in ways:
        cells = []
        for epsilon in (8, 2):
            cells.append(_mean_pair([row["test"] for row in _drawn("private_learning", way=way, epsilon=epsilon)]))
        lines.append(f"| {way} | {' | '.join(cells)} |")
    for part, label in (
        ("counts", "**counts first**"),
        ("encoder", "**counts first: the encoder distilled from them, alone**"),
        ("", "**counts first, both: the presets**"),
    ):
        cells = []
        for epsilon in (8, 2):
            rows = _drawn("private_counts", preset=f"ml-1m-private-{epsilon}")
            cells.append(_mean_pair([row["test"]["parts"][part] if part else row["test"] for row in rows]))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _mean_pair(found: list[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    return " / ".join(f"{sum(one[which]['ndcg@10'] for one in found) / len(found):.4f}" for which in ("all", "unseen"))


def _drawn(name: str, **match: Any) -> list[dict[str, Any]]:
    """The rows that match and have the newest one's settings, one a pair of keys."""
    rows = [row for row in results.rows(name) if all(row[key] == value for key, value in match.items())]
    return list({row["key"]: row for row in rows if row["settings"] == rows[-1]["settings"]}.values())


def fleet() -> str:
    """What a fleet's epsilon costs, beside the same run with a millionth of its noise."""
    newest = results.newest("fleet", quieter=1)
    if newest is None:
        return ""
    without = results.newest("fleet", settings=newest["settings"], key=newest["key"], quieter=1_000_000)
    if without is None:
        return ""
    stated, found = newest["privacy"], []
    for name in ("whole", "encoder", "counts"):
        ours, theirs = (row["test"] if name == "whole" else row["test"]["parts"][name] for row in (newest, without))
        kept = " / ".join(f"{ours[which]['ndcg@10'] / theirs[which]['ndcg@10']:.3f}" for which in ("all", "unseen"))
        found.append(f"{name} {_mean_pair([ours])}, {kept} of the run without noise")
    return (
        f"**A fleet's price** (preset `ml-1m-fleet`, `python simulations/benchmarks/fleet.py`): what epsilon {stated['epsilon']:.3f} at delta "
        f"{stated['delta']:g} would cost {stated['fleet_users']:,} users; the 6,040 at hand are promised nothing. NDCG@10 on the test event, "
        f"`all` / `unseen`: {'; '.join(found)} (a millionth of the noise).\n"
    )


def clipping() -> str:
    rows = [row for row in results.rows("clipping") if row["clip_norm"] is not None]
    if not rows:
        return ""
    clipped = rows[-1]
    plain = [row for row in results.rows("clipping") if row["clip_norm"] is None and (row["encoder"], row["rounds"]) == (clipped["encoder"], clipped["rounds"])]
    if not plain:
        return ""
    found = [row["test"]["parts"]["encoder"] for row in (clipped, plain[-1])]
    kept = " / ".join(f"{found[0][which]['ndcg@10'] / found[1][which]['ndcg@10']:.3f}" for which in ("all", "unseen"))
    rounds, norm = clipped["rounds"], plain[-1]["median_of_update_norms"]["0.5"]
    return (
        f"**Clipping alone** (`python simulations/benchmarks/clipping.py --set server.rounds={rounds}`): `ml-1m` with users who weigh alike, {rounds} rounds, "
        f"every update clipped to {clipped['clip_norm']:g} where the median norm was {norm:.2f} without: the encoder alone reaches {_mean_pair(found[:1])}, "
        f"{kept} of the run without a clip.\n"
    )


def _spread(found: list[Mapping[str, float]]) -> str:
    values = [one["ndcg@10"] for one in found]
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


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
        f"{found[0][which]['ndcg@10']:.4f}" if len({one[which]["ndcg@10"] for one in found}) == 1 else _spread([one[which] for one in found])
        for which in ("all", "unseen")
    ]
    seeds = ", ".join(str(row["seed"]) for row in rows)
    seconds = f"{sum(row['seconds'] for row in rows) / len(rows):.0f}" if rows else ""
    return f"| {label} | {' | '.join(cells)} | {seeds} | {seconds} |"


def throughput() -> str:
    rows = [row for steps in (1, 3) if (row := results.newest("throughput", steps=steps)) is not None]
    if not rows:
        return ""
    names = list(rows[0]["ms_a_user"])
    lines = [
        "**Speed**: milliseconds a user, ML-1M, width 64, 2 blocks, window 50, 256 negatives a user, one thread; whole federated rounds of 512 with "
        "every update clipped (`python simulations/benchmarks/throughput.py`).",
        "",
        "| local steps | " + " | ".join(names) + " | of the floor | times the loop | outside `client_round` |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for row in rows:
        times = " | ".join(f"{row['ms_a_user'][name]:.2f}" for name in names)
        lines.append(f"| {row['steps']} | {times} | {row['of_the_floor']:.2f} | {row['times_the_loop']:.2f} | {row['outside_client_round']:.1%} |")
    return "\n".join([*lines, ""])


def peers() -> str:
    rows = [row for steps in (1, 3) if (row := results.newest("peers", steps=steps)) is not None]
    if not rows:
        return ""
    versions, cohorts = rows[0]["versions"], rows[0]["cohorts"]
    lines = [
        "**Beside others**: the same job, one thread of training each, round after round in turn; the clipped updates of all are held to ours first "
        f"(`python simulations/benchmarks/peers.py`; pfl-research {versions['pfl']}, Flower's simulation runtime {versions['flwr']}). Flower has a node for "
        "each of the 6,040 users, which is the job, and 64 nodes that all train in each round, which is the least it can cost a user.",
        "",
        "| users a second | users a round | " + " | ".join(f"{steps} | ours is faster by" for steps in ("one step", "three steps")[: len(rows)]) + " |",
        "|---|---|" + "---|---|" * len(rows),
    ]
    for name, cohort in cohorts.items():
        cells = [f"{row['users_per_second'][name]:.0f} | {row['times'].get(name, 1):.1f}" for row in rows]
        lines.append(f"| {name} | {cohort} | {' | '.join(cells)} |")
    floors = [found for row in rows if (found := results.newest("throughput", steps=row["steps"])) is not None]
    if len(floors) == len(rows):
        most = [row["ms_a_user"]["Flower"] / min(floor["ms_a_user"].values()) for row, floor in zip(rows, floors, strict=True)]
        lines += [
            "",
            "Next to Flower nothing on this machine could be 100 times as fast: the floor above, a plain batch that makes no update of any user, "
            f"would be {' and '.join(f'{value:.0f}' for value in most)} times as fast.",
        ]
    return "\n".join([*lines, ""])


def workers() -> str:
    rows = [
        row for name in ("one step, 256 negatives", "three steps, 256 negatives", "preset ml-1m, whole softmax") if (row := results.newest("workers", job=name))
    ]
    if not rows:
        return ""
    found = "; ".join(f"{row['job']}, cohort {row['cohort']}: {row['times_one']['2']:.2f}" for row in rows)
    same = "the same bytes of weights for 1, 2 and 4" if all(row["same_bytes"] for row in rows) else "NOT the same bytes for 1, 2 and 4"
    what = "whole rounds with two worker processes are so many times as fast as with one"
    return f"**Both cores**: {what} (`python simulations/benchmarks/workers.py`; {same}): {found}.\n"


def memory() -> str:
    row = results.newest("memory")
    if row is None:
        return ""
    found = "; ".join(f"{name} {value / 1e6:.0f} MB" for name, value in row["bytes"].items())
    return f"**Memory** at its peak, PSS over all processes (`python simulations/benchmarks/memory.py`): {found}.\n"


def parts_that_help() -> str:
    """What a task and a head are worth, by the newest comparison over three seeds."""
    lines = []
    for file, beside in (("task_gains", "next item"), ("head_gains", "no head")):
        newest = {(row["preset"], row["name"]): row for row in results.rows(file) if len(row["seeds"]) > 2}
        for (preset, name), row in newest.items():
            for what, one in row["gains"].items():
                (low, high), (least, most) = one["interval"], one["seeds"]
                what = f"NDCG@10, {what}" if file == "task_gains" else what
                change = f"{one['gain']:+.1%} ({low:+.1%} to {high:+.1%}) | {least:+.1%} to {most:+.1%}"
                lines.append(f"| {name}, against {beside} | `{preset}` | {what} | {one['before']:.4g} | {one['after']:.4g} | {change} |")
    if not lines:
        return ""
    head = "| with | preset | `unseen` of the test | without | with | gain (95 % over users) | seeds |\n|---|---|---|---|---|---|---|\n"
    about = "runs with and without, compared user by user over three seeds (`python simulations/benchmarks/tasks.py`, `heads.py`)"
    return f"**Tasks and heads** ([docs/tasks.md](docs/tasks.md)): {about}.\n\n{head}" + "\n".join(lines) + "\n"


def scale() -> str:
    found = []
    converted = [row for row in results.rows("scale") if row["what"] == "convert"]
    if converted:
        row = max(converted, key=lambda row: row["events"])
        found.append(f"{row['events']:,} events converted in {row['cpu_seconds']:.0f} s of CPU and {row['peak_rss_bytes'] / 1e6:.0f} MB")
    opened = results.newest("scale", what="open", users=1_000_000)
    if opened:
        found.append(f"a store of a million users opened in {opened['seconds']:.2f} s, {opened['added_bytes'] / 1e6:.0f} MB")
    made = results.newest("scale", what="synthesize")
    if made:
        found.append(f"a million users synthesized in {made['seconds']:.0f} s")
    row = results.newest("scale", what="round")
    if row:
        cpu = row["cpu_seconds"]
        found.append(f"a round of 1,000 with heads {cpu[0]:.2f} s of CPU from 10,000 users, {cpu[1]:.2f} s from 1,000,000")
        if "cpu_seconds_without_heads" in row:
            found[-1] += f", and there {row['cpu_seconds_without_heads']:.2f} s without heads"
    heads = results.newest("scale", what="heads")
    if heads:
        with_heads, without = heads["rss_bytes"] / 1e6, heads["without"]["rss_bytes"] / 1e6
        found.append(f"resident after rounds {with_heads:.0f} MB with a million heads, all trained before, and {without:.0f} MB without any")
    return f"**A million users** (`python simulations/benchmarks/scale.py`): {'; '.join(found)}.\n" if found else ""


def counts_at_scale() -> str:
    """Item-to-item counts of large catalogues, and what a cut keeps."""
    rows = [row for items in (100_000, 1_000_000) for case in ("at once", "in 8 blocks", "under a plan") if (row := _scaled(items, case)) is not None]
    if not rows:
        return ""
    lines = [
        f"**Counts of large catalogues** (`python simulations/benchmarks/counts_at_scale.py`): invented, {rows[0]['users']:,} users of 50 events "
        "in one process, which adds the memory below, node and server together; without a plan "
        "the 20 largest cells of a row are kept (`counts.top`), under a plan 1,000 items.",
        "",
        "| items | counts | seconds of CPU | memory added | a user sends | and is sent | a device holds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        megabytes = [f"{row[name] / 1e6:.{digits}f} MB" for name, digits in (("added_bytes", 0), ("device_bytes", 1))]
        told = f"{row['upload_bytes'] / 1e3:,.1f} kB | {row['download_bytes'] / 1e3:,.1f} kB"
        lines.append(f"| {row['items']:,} | {row['case']} | {row['cpu_seconds']:.0f} | {megabytes[0]} | {told} | {megabytes[1]} |")
    for preset in ("beauty", "ml-1m"):
        row = results.newest("counts_at_scale", what="cut", preset=preset)
        if row is not None:
            whole, *cut = row["cut"]
            kept = ", ".join(f"{one['top']} cells {one['all'] / whole['all']:.3f} / {one['unseen'] / whole['unseen']:.3f}" for one in cut)
            lines += ["", f"Of what `{preset}`'s whole counts alone reach (NDCG@10 on the test event, `all` / `unseen`) the largest of each row keep: {kept}."]
    return "\n".join([*lines, ""])


def _scaled(items: int, case: str) -> dict[str, Any] | None:
    return results.newest("counts_at_scale", what="scale", items=items, case=case)


def kills() -> str:
    row = results.newest("kills")
    if row is None:
        return ""
    return (
        f"**Kills** (`python simulations/benchmarks/kills.py`): {row['kills']} `kill -9` at random moments of {row['runs']} private runs, each resumed "
        f"until it ended; of {row['given_out']:,} releases and uploads {row['unknown_to_the_ledger']} that the ledger on disk did not know, "
        f"{row['two_under_one_attempt']} that differed from another under the same charge, {row['other_than_never_killed']} files or charges other than "
        "those of a run that was never killed.\n"
    )


def device() -> str:
    row = results.newest("device")
    if row is None:
        return ""
    found = {name: f"{value:.0f}" if name.endswith("MB") else f"{value:.2g}" for name, value in row["measured"].items()}
    parts = [
        f"start to first recommendation {found['start to first recommendation s']} s",
        f"`Recommend` {found['recommend p50 ms']} ms, 99% below {found['recommend p99 ms']} ms",
        f"`Record`, on the disk, {found['record p50 ms']} ms, 99% below {found['record p99 ms']} ms",
        f"agent idle {found['idle MB']} MB, after a training {found['after a training MB']} MB",
        f"the process that trains {found['training child MB']} MB for {found['training s']} s, and Flower's ClientApp beside it {found['ClientApp MB']} MB",
        f"a training ends {found['gate to the end of a training s']} s after a gate closes",
    ]
    about = f"{row['items']:,} items, 1.82 million cells of counts, a history of {row['history']}; the agent asked over its socket"
    return f"**A device** (`python simulations/benchmarks/device.py`; {about}): {'; '.join(parts)}.\n"


def deployment() -> str:
    fleets = {"nodes": "two nodes of 25 users", "devices": "three devices with agents"}
    lines = []
    for kind, words in fleets.items():
        row = results.newest("deployment", kind=kind)
        if row is not None:
            rounds = list(row["apart"])
            cells = [f"{row[name][number]:.0e}" if row[name][number] else "0" for name in ("apart", "apart_other") for number in rounds]
            lines.append(f"| {words} | {' | '.join(cells)} | {'yes' if row['same_bytes'] else 'no'} | {row['round_seconds']:.0f} |")
    if not lines:
        return ""
    head = [f"{what} {number}" for what in ("after round", "other chunks, two threads: after round") for number in rounds]
    return (
        "**Deployed against simulated**, everything on (Adam, dropout, a head, counts, clip, noise by keys that both know), over a SuperLink with TLS and node "
        "authentication: the largest difference of any weight from the simulation in the same chunks, and from one in other chunks on two threads "
        f"(`python simulations/benchmarks/deployment.py`; the largest weight is {row['largest']:.1f}; a round is mostly waiting and new processes).\n\n"
        f"| fleet | {' | '.join(head)} | same bytes | seconds a round |\n|---|{'---|' * len(head)}---|---|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
