"""What clipping alone costs: the preset ml-1m with users who weigh alike, with and without a clip on every user's update, and no noise.

The norms of updates stand beside, so that it shows how many the clip shortens. Rows are appended to results/clipping.jsonl
as they finish; what is there with the same settings is not run again.

    python simulations/benchmarks/clipping.py         (needs ml-1m.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import results
from fedssl_simulations.run import simulate
from fedssl_simulations.run_files import read_run
from quality import pair

from fedssl.data.dataset import load_dataset
from fedssl.round_lines import read_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=float, default=1.0, help="L2 norm of a user's whole update")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    rows = []
    for clip in ("none", f"{arguments.clip:g}"):
        alike = ["server.weighting=equal", "local.reduction=sum", "evaluation.every=0", f"privacy.clip_norm={clip}"]
        config = read_run("ml-1m", [*alike, *arguments.overrides])
        dataset = load_dataset(config.data)
        chosen = config.model_dump(mode="json", exclude={"system"}, exclude_defaults=True)
        settings = results.settings_hash({"config": chosen, "data": dataset.histories.fingerprint})
        row = results.newest("clipping", settings=settings)
        if row is None:
            with TemporaryDirectory() as folder:
                report = simulate(config, out=Path(folder) / "run", dataset=dataset).report
                norms = [line["update_norm"] for line in read_lines(Path(folder) / "run" / "metrics.jsonl") if "update_norm" in line]
            about = {"clip_norm": config.privacy.clip_norm, "encoder": config.encoder.name, "rounds": config.server.rounds, "seed": config.seed}
            medians = {q: float(np.median([norm[q] for norm in norms])) for q in ("0.1", "0.5", "0.9")}
            found = {"seconds": report["cost"]["seconds"], "validation": report["validation"], "test": report["test"]}
            row = results.append("clipping", {"settings": settings, **about, "median_of_update_norms": medians, **found})
        encoder, norms = row["test"].get("parts", {}).get("encoder", row["test"]), row["median_of_update_norms"]
        print(f"clip {clip}: test {pair(row['test'])}, encoder alone {pair(encoder)}; norms {norms}; {row['seconds']:.0f} s", flush=True)
        rows.append(encoder)
    kept = " / ".join(f"{rows[1][which]['ndcg@10'] / rows[0][which]['ndcg@10']:.3f}" for which in ("all", "unseen"))
    print(f"encoder alone, with the clip: {kept} of without")


if __name__ == "__main__":
    main()
