"""What a personal head is worth: runs with and without it on the same seeds, compared user by user.

Runs are rows of results/paired_runs.jsonl and are not run again. A comparison, a row of results/head_gains.jsonl, says how NDCG@10 `unseen` of the
test differs, and the mean of 1 / rank over the tenth of users who are served worst.

    python simulations/benchmarks/heads.py ml-100k --seed 1 2 3        (needs ml-100k.inter.gz where $FEDSSL_DATA points)
"""

from __future__ import annotations

from typing import Any

import results
from fedssl_simulations.run_files import read_run
from paired import arguments_of, arm_of, data_of, gain, ndcg, ranks_of, said, worst_tenth

from fedssl.config import HeadConfig

NONE = "no head"
HEADS = {
    "history": HeadConfig(history=3.0),
    "user vector": HeadConfig(name="user-vector", lr=2.0),
}


def main() -> None:
    arguments = arguments_of(__doc__, one="this head beside none")
    preset, dataset = data_of(arguments)
    configs = [read_run(arguments.preset, arguments.overrides, seed=seed) for seed in arguments.seed]
    arms = {}
    for name, head in {NONE: HeadConfig(), **HEADS}.items():
        if name == NONE or not arguments.only or name in arguments.only:
            arms[name] = arm_of(name, preset, [config.model_copy(update={"head": head}) for config in configs], dataset, arguments)
    for name, (rates, rows) in arms.items():
        if name == NONE:
            continue
        before, after = ranks_of(arms[NONE][1]), ranks_of(rows)
        gains = {"NDCG@10": gain(ndcg, before, after), "worst tenth, mean of 1 / rank": gain(worst_tenth, before, after)}
        runs = [row["settings"] for row in (*arms[NONE][1], *rows)]
        about: dict[str, Any] = {"preset": preset, "name": name, "seeds": arguments.seed, "runs": runs}
        if rates is not None:
            about["rates"] = [arms[NONE][0], rates]
        if results.newest("head_gains", **about) is None:
            results.append("head_gains", {**about, "gains": gains})
        for what, one in gains.items():
            print(f"{preset}, {name}: {what} unseen of the test {said(one)}", flush=True)


if __name__ == "__main__":
    main()
