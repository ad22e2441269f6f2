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
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "HGRN, against SASRec": ("encoder", {"name": "sasrec"}),
    "HGRN, against GRU4Rec": ("encoder", {"name": "gru4rec"}),
    "item vectors that begin with the counts, against random ones": ("encoder", {"first_items": "random"}),
    "the counts' score beside the encoder's": ("counts", {"strength": 0.0}),
    "previous item": ("task", {}),
    "history's mean": ("head", {"history": 0.0}),
}
"""A section of the settings, and what stands there where the part is taken out or made plain; the tasks are a list."""


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
    section, plain = PARTS[name]
    before = getattr(config, section)
    if before is None or (name.startswith("HGRN") and before.name != "hgrn"):
        return config
    return config.model_copy(update={section: without_previous_item(before) if section == "task" else before.model_copy(update=plain)})


if __name__ == "__main__":
    main()
