"""Quality against rounds, seconds and bytes, as docs/quality.svg: the curves that quality.py kept in results/quality.jsonl.

python simulations/benchmarks/curves.py            (rewrites docs/quality.svg)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from fedssl_simulations.charts import LineChart, Series, line_chart
from learning_tables import rows_of

PAGE = Path(__file__).parents[2] / "docs" / "quality.svg"
PRESETS = ("ml-1m", "beauty", "ml-100k", "ml-100k-counts")
NAMES = {"federated, weights by positions": "weights by positions", "federated, equal weights, summed loss": "users weigh alike"}
AXES = {"round": ("round", 1.0), "seconds": ("seconds of training", 1.0), "upload_bytes_a_user": ("megabytes that a user has sent", 1e6)}
STYLE = """
  .page { fill: #ffffff; } .ink { fill: #1d2433; } .soft { fill: #566076; } .grid { stroke: #dfe3ea; } .axis { stroke: #566076; }
  .c0 { stroke: #1f6feb; } .c1 { stroke: #c2570c; } .curve { fill: none; stroke-width: 2; } .dashed { stroke-dasharray: 6 4; }
  .band { stroke: none; fill-opacity: .15; }
  .band.c0 { fill: #1f6feb; } .band.c1 { fill: #c2570c; } .name { font-size: 15px; font-weight: 600; }
  .small { font-size: 12.5px; } .mid { text-anchor: middle; } .end { text-anchor: end; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #12161f; } .ink { fill: #e8ecf4; } .soft { fill: #a9b3c6; } .grid { stroke: #2a3140; } .axis { stroke: #a9b3c6; }
    .c0 { stroke: #6ea8ff; } .c1 { stroke: #f5a25d; } .band.c0 { fill: #6ea8ff; } .band.c1 { fill: #f5a25d; }
  }
"""


def main() -> None:
    PAGE.write_text(page())
    print(PAGE)


def page() -> str:
    """The curves of today's results as SVG."""
    panels, about = [], []
    for preset in PRESETS:
        rows = rows_of(preset)
        curves = {name: found for key, name in NAMES.items() if (found := [row["curve"] for row in rows[key].values() if row.get("curve")])}
        for axis, (label, unit) in AXES.items():
            if curves:
                series = [one_line(name, colour, found, axis, unit) for colour, (name, found) in enumerate(curves.items())]
                panels.append(line_chart(f"{preset}, against {label}", series, x_label=label, digits=".4f"))
                about.append(f"{panels[-1].title}: {panels[-1].about}")
    return drawn(panels, ". ".join(about))


def one_line(name: str, colour: int, curves: list[Sequence[Mapping[str, Any]]], axis: str, unit: float) -> Series:
    """The mean of seeds at each validation, between the least and the most."""
    points = list(zip(*curves, strict=True))
    values = [[point["unseen"] for point in seeds] for seeds in points]
    low, high = ([end(found) for found in values] if len(curves) > 1 else [] for end in (min, max))
    xs = [fmean(point[axis] for point in seeds) / unit for seeds in points]
    return Series(name=name, colour=colour, xs=xs, ys=[fmean(found) for found in values], dashed=colour == 1, low=low, high=high)


def drawn(panels: Sequence[LineChart], about: str) -> str:
    """The charts side by side, a preset a row, as one SVG."""
    across = len(AXES)
    wide, high = 560, 320
    width, height = across * wide, 60 + high * max(1, -(-len(panels) // across))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title about" font-family="system-ui, sans-serif">',
        '<title id="title">NDCG@10 over items not met, on validation events of 2,000 users, the whole recommender</title>',
        f'<desc id="about">{escape(about)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]
    for place, name in enumerate(NAMES.values()):
        x = 56 + 240 * place
        lines.append(
            f'<path class="curve c{place}{" dashed" if place else ""}" d="M{x} 26h36"/><text class="ink small" x="{x + 44}" y="30">{escape(name)}</text>'
        )
    for number, chart in enumerate(panels):
        lines.append(f'<g transform="translate({wide * (number % across)} {60 + high * (number // across)})">')
        lines.append(f'<text class="ink name" x="{chart.left}" y="4">{escape(chart.title)}</text>')
        for tick in chart.y_ticks:
            lines.append(f'<path class="grid" d="M{chart.left} {tick.at}H{chart.right}"/>')
            lines.append(f'<text class="soft small end" x="{chart.left - 8}" y="{tick.at + 4}">{tick.label}</text>')
        lines.append(f'<path class="axis" d="M{chart.left} {chart.bottom}H{chart.right}"/>')
        lines += [f'<text class="soft small mid" x="{tick.at}" y="{chart.bottom + 18}">{tick.label}</text>' for tick in chart.x_ticks]
        lines.append(f'<text class="soft small mid" x="{(chart.left + chart.right) / 2}" y="{chart.bottom + 38}">{escape(chart.x_label)}</text>')
        for one in chart.lines:
            lines += [f'<path class="band c{one.colour}" d="{one.band}"/>'] if one.band else []
            lines.append(f'<path class="curve c{one.colour}{" dashed" if one.dashed else ""}" d="{one.path}"/>')
        lines.append("</g>")
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    main()
