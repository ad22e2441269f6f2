"""The README's tables of what clipping and privacy cost."""

from __future__ import annotations

from typing import Any

import results
from cells import mean_pair, spread


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
        cells = [spread([one["all"] for one in found]), spread([one["unseen"] for one in found])]
        for part in ("counts", "encoder"):
            has_part = all(part in one.get("parts", {}) for one in found)
            cells.append(" / ".join(spread([one["parts"][part][which] for one in found]) for which in ("all", "unseen")) if has_part else "")
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
        f"more were drawn their mean). Popularity without privacy: {mean_pair([popularity['test']])}.",
        "",
        "| way | epsilon 8 | epsilon 2 |",
        "|---|---|---|",
    ]
    for way in ways:
        cells = []
        for epsilon in (8, 2):
            cells.append(mean_pair([row["test"] for row in _drawn("private_learning", way=way, epsilon=epsilon)]))
        lines.append(f"| {way} | {' | '.join(cells)} |")
    for part, label in (
        ("counts", "**counts first**"),
        ("encoder", "**counts first: the encoder distilled from them, alone**"),
        ("", "**counts first, both: the presets**"),
    ):
        cells = []
        for epsilon in (8, 2):
            rows = _drawn("private_counts", preset=f"ml-1m-private-{epsilon}")
            cells.append(mean_pair([row["test"]["parts"][part] if part else row["test"] for row in rows]))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


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
        found.append(f"{name} {mean_pair([ours])}, {kept} of the run without noise")
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
        f"every update clipped to {clipped['clip_norm']:g} where the median norm was {norm:.2f} without: the encoder alone reaches {mean_pair(found[:1])}, "
        f"{kept} of the run without a clip.\n"
    )
