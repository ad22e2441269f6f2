"""The README's tables of devices: what one costs, what a deployment reaches, its faults, and what many nodes cost its server."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

import results


def faults() -> str:
    """What a deployment was put through, and what came of it."""
    lines = [
        "**Faults of a deployment** (`python simulations/benchmarks/deployment_faults.py`; a SuperLink with TLS and node authentication, devices with agents):",
        "",
        "| fault | what came of it |",
        "|---|---|",
    ]
    row = _summed("deployment_kills")
    if row is not None:
        what = ", ".join(f"{count} {name}" for name, count in sorted(row["killed"].items(), key=lambda one: -one[1]))
        uncharged = row["uncharged"] + row["server_released_uncharged"]
        lines.append(
            f"| {row['kills']} `kill -9` in real rounds: {what} | {row['runs_ended']} of {row['runs']} runs ended (resumed by hand {row['resumed_by_hand']} "
            f"times); {row['events_lost']} of {row['events']:,} events lost; {uncharged} of {row['released']} uploads and {row['rounds']} rounds uncharged; "
            f"{row['unlike']} second answers that differ |"
        )
    row = results.newest("deployment_uploads")
    if row is not None:
        wrong = len(row["not_refused_so"]) + len(row["files_unlike"])
        strangers = ", ".join(f"a node that {name}" for name in ("is not registered", "trusts another authority"))
        lines.append(
            f"| {row['lies']} kinds of upload ({', '.join(row['refused_as'])}); a node of an older version; {strangers} | {wrong} not refused as "
            f"they should be; the model is that of the honest nodes, to the byte; {row['nodes_joined']} nodes joined, all of them registered |"
        )
    row = results.newest("deployment_troubles")
    if row is not None:
        troubles = [name for name in row["seen"] if not name.startswith("everybody")]
        came = f"not seen: {', '.join(row['not_seen'])}" if row["not_seen"] else "after each a round came in which all three devices answered"
        lines.append(
            f"| {', '.join(troubles)}; the server's disk is full | {came}; {row['events_lost']} of "
            f"{row['events']:,} events lost; {row['uncharged'] + row['released_uncharged']} releases uncharged |"
        )
    return "\n".join([*lines, ""]) if len(lines) > 4 else ""


def _summed(name: str) -> dict[str, Any] | None:
    """The counts of all rows with the newest one's settings."""
    rows = results.rows(name)
    rows = [row for row in rows if row["settings"] == rows[-1]["settings"]]
    if not rows:
        return None
    killed = Counter[str]()
    for row in rows:
        killed.update(row["killed"])
    return {"killed": dict(killed), **{key: sum(row[key] for row in rows) for key, value in rows[0].items() if isinstance(value, int)}}


def many_nodes() -> str:
    row = results.newest("fleet_nodes")
    if row is None:
        return ""
    cpu, peak = row["cpu_seconds_a_node_a_round"], row["peak_rss_mb"]
    used = ", ".join(f"{name} {cpu[name]:.3f} s" for name in ("flower-superlink", "flwr-serverapp"))
    return (
        f"**Many nodes** (`python simulations/benchmarks/fleet_nodes.py`): {row['nodes']} nodes that speak Flower's Fleet protocol from one process, a user "
        f"each, held {row['rounds']} rounds on one SuperLink, everybody asked, {row['refused']} answers refused or missed: "
        f"{row['seconds_a_node_a_round']:.2f} s a node a round with the nodes' own training on the same two cores (CPU: {used}), "
        f"{row['upload_bytes'] / 1e3:.0f} kB up and as much down; resident at their peak: "
        f"{', '.join(f'{name} {size} MB' for name, size in peak.items() if size > 50)}.\n"
    )


def device() -> str:
    row = results.newest("device")
    if row is None:
        return ""
    alike = [one["measured"] for one in results.rows("device") if one["settings"] == row["settings"]]
    found = {name: f"{statistics.median(one[name] for one in alike):.{0 if name.endswith('MB') else 2}f}" for name in row["measured"]}
    answers = [one["recommend soon p50 ms"] for one in alike]
    parts = [
        f"start to first recommendation {found['start to first recommendation s']} s",
        f"`Recommend` soon after a new event {found['recommend soon p50 ms']} ms ({min(answers):.1f} to {max(answers):.1f}), 99% below "
        f"{found['recommend soon p99 ms']} ms, at once after one {found['recommend at once p50 ms']} ms, with nothing new "
        f"{found['recommend again p50 ms']} ms (a call that asks for nothing: {found['bare call soon p50 ms']} ms soon after another call, "
        f"{found['bare call p50 ms']} ms at once)",
        f"`Record`, on the disk, and a step of the head {found['record p50 ms']} ms, 99% below {found['record p99 ms']} ms",
        f"agent idle {found['idle MB']} MB, after a training {found['after a training MB']} MB",
        f"the process that trains {found['training child MB']} MB for {found['training s']} s, and Flower's ClientApp beside it {found['ClientApp MB']} MB",
        f"a training ends {found['gate to the end of a training s']} s after a gate closes",
    ]
    about = f"{row['items']:,} items, 1.82 million cells of counts, a history of {row['history']}; asked over its socket; medians of {len(alike)} runs"
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
        f"| fleet | {' | '.join(head)} | same bytes | seconds a round |\n|---|{'---|' * len(head)}---|---|\n" + "\n".join(lines) + "\n" + _processes()
    )


def _processes() -> str:
    """What each process of a deployment holds, Flower's own among them."""
    rows = [row for row in results.rows("deployment") if row["kind"] == "devices" and row.get("megabytes")]
    if not rows:
        return ""
    found = []
    for kind, one in rows[-1]["megabytes"].items():
        found.append(f"{kind} {one['idle']:.0f} and {one['most']:.0f}" if "idle" in one else f"{kind} {one['most']:.0f}")
    about = "the same script; the ServerApp's is mostly the accountant's, for noise as small as there"
    return f"\nResident MB of each process there, while nothing trains and at most ({about}): {'; '.join(found)}.\n"
