"""The README's tables, from results/*.jsonl: every number there was printed by a script beside this one.

python simulations/benchmarks/tables.py            (rewrites the part of README.md between the markers)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deployment_tables
import learning_tables
import private_tables
import results

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def main() -> None:
    README.write_text(with_tables(README.read_text()))


def with_tables(text: str) -> str:
    """A README with the tables of today's results between its markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    parts = [
        learning_tables.quality("ml-1m"),
        learning_tables.quality("beauty"),
        learning_tables.published(),
        learning_tables.quality("ml-100k"),
        learning_tables.quality("ml-100k-counts"),
        learning_tables.CURVES,
        learning_tables.parts_that_help(),
        learning_tables.cold_items(),
        learning_tables.transfer(),
        private_tables.clipping(),
        private_tables.private(),
        private_tables.learning(),
        private_tables.fleet(),
        throughput(),
        peers(),
        workers(),
        memory(),
        scale(),
        counts_at_scale(),
        deployment_tables.device(),
        kills(),
        deployment_tables.deployment(),
        deployment_tables.faults(),
        deployment_tables.many_nodes(),
    ]
    return f"{before}{BEGIN}\n{chr(10).join(part for part in parts if part)}\n{END}{after}"


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
        found.append(
            f"a million heads, all trained before, add {with_heads - without:.0f} MB to the {without:.0f} MB that are resident after rounds without any"
        )
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
    parts = []
    row = results.newest("kills")
    if row is not None:
        parts.append(
            f"**Kills** (`python simulations/benchmarks/kills.py`): {row['kills']} `kill -9` at random moments of {row['runs']} private runs, each resumed "
            f"until it ended; of {row['given_out']:,} releases and uploads {row['unknown_to_the_ledger']} that the ledger on disk did not know, "
            f"{row['two_under_one_attempt']} that differed from another under the same charge, {row['other_than_never_killed']} files or charges other than "
            "those of a run that was never killed."
        )
    row = results.newest("device_kills")
    if row is not None:
        parts.append(
            f"On a device's ledger alone (`python simulations/benchmarks/device_kills.py`) {row['kills']} `kill -9`, {row['between_charge_and_answer']} "
            f"of them between the charge and its answer: {row['events_lost']} of {row['events']} events lost, {row['released_uncharged']} of "
            f"{row['released']} answers uncharged, {row['released_unlike']} second answers that differ."
        )
    return "\n".join([*parts, ""]) if parts else ""


if __name__ == "__main__":
    main()
