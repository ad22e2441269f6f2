"""What each part of a preset gives: runs without it on the same seeds, compared user by user.

Runs are rows of results/paired_runs.jsonl and are not run again. A comparison, a row of results/part_gains.jsonl, says how NDCG@10 `unseen` of the
test differs. Encoder and first item vectors are replaced by the plain ones, SASRec and random vectors.

    python simulations/benchmarks/parts.py ml-100k-counts --lr 0.003 0.006 0.012        (needs ml-100k.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

from typing import Any

import results
from fedssl_simulations.run_files import read_run
from paired import arguments_of, arm_of, data_of, gain, ndcg, ranks_of, said
from quality import without_previous_item

from fedssl.config import RunConfig

WHOLE = "whole"
PARTS = (
    "HGRN, against SASRec",
    "HGRN, against GRU4Rec",
    "item vectors that begin with the counts, against random ones",
    "the counts' score beside the encoder's",
    "previous item",
    "history's mean",
)


def main() -> None:
    arguments = arguments_of(__doc__, one="this part")
    preset, dataset = data_of(arguments)
    configs = [read_run(arguments.preset, arguments.overrides, seed=seed) for seed in arguments.seed]
    rates, whole = arm_of(WHOLE, preset, configs, dataset, arguments)
    for name in PARTS:
        fewer = [without(name, config) for config in configs]
        if fewer == configs or (arguments.only and name not in arguments.only):
            continue
        rates_without, rows = arm_of(f"without {name}", preset, fewer, dataset, arguments)
        one = gain(ndcg, ranks_of(rows), ranks_of(whole))
        about: dict[str, Any] = {"preset": preset, "name": name, "seeds": arguments.seed, "runs": [row["settings"] for row in (*rows, *whole)]}
        if rates is not None:
            about["rates"] = [rates_without, rates]
        if results.newest("part_gains", **about) is None:
            results.append("part_gains", {**about, "gains": {"NDCG@10": one}})
        print(f"{preset}, {name}: NDCG@10 unseen of the test {said(one)}", flush=True)


def without(name: str, config: RunConfig) -> RunConfig:
    """A preset's settings with a part taken out or made plain; as they are where it has none."""
    encoder, counts = config.encoder, config.counts
    if name == "previous item":
        return config.model_copy(update={"task": without_previous_item(config.task)})
    if name == "history's mean":
        return config.model_copy(update={"head": config.head.model_copy(update={"history": 0.0})})
    if name.startswith("the counts' score"):
        return config if counts is None else config.model_copy(update={"counts": counts.model_copy(update={"strength": 0.0})})
    if name.startswith("item vectors"):
        return config.model_copy(update={"encoder": encoder.model_copy(update={"first_items": "random"})})
    if encoder.name != "hgrn":
        return config
    return config.model_copy(update={"encoder": encoder.model_copy(update={"name": name.rsplit(" ", 1)[-1].lower()})})


if __name__ == "__main__":
    main()
