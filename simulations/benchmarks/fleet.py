"""What epsilon 2 costs a fleet of a million: the preset ml-1m-fleet, and the same run with a millionth of its noise.

The noise of a fleet on a mean is that of its size (`privacy.fleet_users`), and the people at hand, who learn for it, are promised nothing.
So a fleet a million times larger is the same run without noise: same clip, same coins, same code.
Rows are appended to results/fleet.jsonl as they finish; what is there with the same settings is not run again.

    python simulations/benchmarks/fleet.py         (needs ml-1m.inter.gz and ml-1m.item.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import results
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run
from quality import pair

from fedssl.data.dataset import load_dataset

PRESET, QUIETER = "ml-1m-fleet", 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1, help="how many fresh pairs of keys")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    config = read_run(PRESET, arguments.overrides)
    dataset = load_dataset(config.data)
    chosen = config.model_dump(mode="json", exclude={"system"}, exclude_defaults=True)
    settings = results.settings_hash({"config": chosen, "data": dataset.histories.fingerprint})
    for key in range(1, arguments.keys + 1):
        found = []
        for quieter in (1, QUIETER):
            row = results.newest("fleet", settings=settings, key=key, quieter=quieter)
            if row is None:
                fleet = config.privacy.model_copy(update={"fleet_users": config.privacy.fleet_users * quieter})
                began = time.perf_counter()
                with TemporaryDirectory() as folder:
                    report = simulate(config.model_copy(update={"privacy": fleet}), out=Path(folder) / "run", dataset=dataset).report
                about = {"preset": PRESET, "settings": settings, "key": key, "quieter": quieter, "seconds": time.perf_counter() - began}
                row = results.append("fleet", {**about, "privacy": report["privacy"], **_hidden(report)})
            found.append(row)
            parts = "".join(f"; {name} alone {pair(part)}" for name, part in row["test"]["parts"].items())
            print(f"keys {key}, noise / {quieter:,}: test {pair(row['test'])}{parts}; validation {pair(row['validation'])}; {row['seconds']:.0f} s", flush=True)
        for name, of in {"whole": found, **{part: [row["test"]["parts"][part] for row in found] for part in ("encoder", "counts")}}.items():
            tests = [one.get("test", one) for one in of]
            kept = " / ".join(f"{tests[0][which]['ndcg@10'] / tests[1][which]['ndcg@10']:.3f}" for which in ("all", "unseen"))
            print(f"keys {key}, {name}: {kept} of the run without noise", flush=True)


def _hidden(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report["researcher_only"][name] for name in ("validation", "test")}


if __name__ == "__main__":
    main()
