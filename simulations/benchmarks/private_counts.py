"""What the presets under user-level privacy reach, each with fresh keys: the promise, both ranks, and every part alone.

A row is one `simulate` run with keys of its own from the operating system, so its noise is drawn anew; the settings come from the preset,
where they were chosen on validation events (which no epsilon covers). Rows are appended to results/private_counts.jsonl
as they finish; keys that are there with the same settings are not drawn again (--again draws all).

    python simulations/benchmarks/private_counts.py         (needs ml-1m.inter.gz and ml-1m.item.gz where $FEDSSL_DATA points)
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

PRESETS = ("ml-1m-private-8", "ml-1m-private-2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--keys", type=int, default=3, help="how many fresh pairs of keys")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--again", action="store_true", help="draw keys that were drawn already")
    arguments = parser.parse_args()
    for preset in arguments.presets:
        config = read_run(preset, arguments.overrides)
        dataset = load_dataset(config.data)
        chosen = config.model_dump(mode="json", exclude={"system"}, exclude_defaults=True)
        settings = results.settings_hash({"config": chosen, "data": dataset.histories.fingerprint})
        for key in range(1, arguments.keys + 1):
            row = None if arguments.again else results.newest("private_counts", preset=preset, settings=settings, key=key)
            if row is None:
                began = time.perf_counter()
                with TemporaryDirectory() as folder:
                    report = simulate(config, out=Path(folder) / "run", dataset=dataset).report
                row = results.append("private_counts", {"preset": preset, "settings": settings, "key": key, **_found(report, time.perf_counter() - began)})
            _show(row)


def _found(report: dict[str, Any], seconds: float) -> dict[str, Any]:
    hidden, stated = report["researcher_only"], report["privacy"]
    promise = {name: stated[name] for name in ("unit", "neighbours", "trust", "sampling", "accountant", "epsilon", "delta", "noise_multiplier", "clip_norm")}
    # The whole of it: reading nothing but the data set's load is left out, the evaluation of all users is in.
    return {"seconds": seconds, "privacy": promise, "rounds": report["cost"]["rounds"], "validation": hidden["validation"], "test": hidden["test"]}


def _show(row: dict[str, Any]) -> None:
    stated, parts = row["privacy"], row["test"].get("parts", {})
    alone = "".join(f"; {name} alone {pair(found)}" for name, found in parts.items())
    promise = f"epsilon {stated['epsilon']:.3f} at delta {stated['delta']:g}"
    found = f"NDCG@10 all / unseen, test {pair(row['test'])}{alone}; validation {pair(row['validation'])}"
    print(f"{row['preset']}, keys {row['key']}: {promise}; {found}; {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
