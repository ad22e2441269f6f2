"""A new catalogue from a checkpoint of another one: quality after the first rounds, beside a run from nothing.

The model of the preset is taught on MovieLens-1M for some rounds, once a seed, with features of titles, then carried over to MovieLens-100K
(`fedssl simulate --from`) in three ways: with items matched by title where both have them; with no item shared, by features; and with no item
shared and no features, so that the encoder's body alone is carried. After every few rounds 943 people are validated; the last is the test.

    python simulations/benchmarks/transfer.py --seed 1 2 3      (needs both data sets and their .item files where $FEDSSL_DATA points)
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import results
from fedssl_simulations.embed import Encode, sentence_encoder
from fedssl_simulations.run import Progress, simulate
from fedssl_simulations.run_files import read_run

from fedssl.catalogue import Catalogue
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset, load_dataset

PRESET = "ml-100k"
VARIANTS = ("from nothing", "body alone", "body and features", "body, features and shared items")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--source-rounds", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=90)
    parser.add_argument("--every", type=int, default=30)
    arguments = parser.parse_args()
    common = ["counts=none", "evaluation.users=0"]
    source_overrides = [*common, "data.path=ml-1m.inter.gz", "data.items=ml-1m.item.gz", "server.cohort=64", "evaluation.every=0"]
    source_overrides.append(f"server.rounds={arguments.source_rounds}")
    target_overrides = [*common, "data.items=ml-100k.item.gz", f"server.rounds={arguments.rounds}", f"evaluation.every={arguments.every}"]
    settings = results.settings_hash([source_overrides, target_overrides, read_run(PRESET).model_dump(mode="json")])
    encode = sentence_encoder()
    source, target = (with_titles(load_dataset(read_run(PRESET, overrides).data), encode) for overrides in (source_overrides, target_overrides))
    rows = []
    for seed in arguments.seed:
        found = {name: results.newest("transfer", settings=settings, seed=seed, name=name) for name in VARIANTS}
        if not all(found.values()):
            found = measured(read_run(PRESET, source_overrides, seed=seed), source, read_run(PRESET, target_overrides, seed=seed), target, settings)
        rows += [row for row in found.values() if row is not None]
        print(f"seed {seed} done", flush=True)
    print(table(rows))


def measured(source_config: RunConfig, source: Dataset, config: RunConfig, target: Dataset, settings: str) -> dict[str, dict[str, Any] | None]:
    """One source, and a target run of each variant."""
    apart = replace(target, catalogue=Catalogue(tuple(f"100k {token}" for token in target.catalogue.tokens)))
    rows: dict[str, dict[str, Any] | None] = {}
    with TemporaryDirectory() as folder:
        began = simulate(source_config, out=Path(folder) / "source", dataset=source)
        start = str(began.folder / "checkpoints" / began.report["model"]["checkpoint"])
        print(f"source: {began.report['test']['unseen']['ndcg@10']:.4f} on its own test", flush=True)
        datasets = dict(zip(VARIANTS, (replace(apart, features=None), replace(apart, features=None), apart, target)))
        for name in VARIANTS:
            curve: list[list[float]] = []

            def said(progress: Progress, curve: list[list[float]] = curve) -> None:
                if progress.validation is not None:
                    curve.append([progress.facts.round, progress.validation["unseen"]["ndcg@10"]])

            clock = time.perf_counter()
            begin = config if name == VARIANTS[0] else config.model_copy(update={"start": start})
            run = simulate(begin, out=Path(folder) / name.replace(" ", "-").replace(",", ""), dataset=datasets[name], on_progress=said)
            curve.append([config.server.rounds, run.report["validation"]["unseen"]["ndcg@10"]])
            about = {"curve": curve, "test": run.report["test"]["unseen"], "seconds": time.perf_counter() - clock}
            rows[name] = results.append("transfer", {"name": name, "seed": config.seed, "settings": settings, **about})
            print(f"  {name}: {curve}", flush=True)
    return rows


def with_titles(dataset: Dataset, encode: Encode) -> Dataset:
    """The data set with title and year as the items' tokens, as MovieLens-1M has them, and features of these."""
    attributes, titles = dataset.catalogue.attributes, dataset.catalogue.titles
    said = [f"{titles.get(token, token)} ({attributes.get(token, {}).get('release_year', '')})" for token in dataset.catalogue.tokens]
    # Of two items of one name the second keeps its own token.
    tokens = tuple(name if name not in said[:place] else f"{name} {token}" for place, (name, token) in enumerate(zip(said, dataset.catalogue.tokens)))
    genres = [next((value for key, value in attributes.get(token, {}).items() if key in ("genre", "class")), "") for token in dataset.catalogue.tokens]
    vectors = encode([f"{name}. {genre}" for name, genre in zip(said, genres)])
    return replace(dataset, catalogue=Catalogue(tokens), features=np.concatenate([np.ones((len(vectors), 1), dtype=np.float32), vectors], axis=1))


def table(rows: list[dict[str, Any]]) -> str:
    """NDCG@10 `unseen` on the validation event after so many rounds, the mean over seeds."""
    rounds = [int(number) for number, _ in rows[0]["curve"]]
    head = f"| begins with | {' | '.join(f'after {number} rounds' for number in rounds)} | over from nothing at the first, each seed |"
    lines = [head, "|" + "---|" * (len(rounds) + 2)]
    nothing = {row["seed"]: row["curve"][0][1] for row in rows if row["name"] == VARIANTS[0]}
    for name in VARIANTS:
        mine = [row for row in rows if row["name"] == name]
        means = np.mean([[value for _, value in row["curve"]] for row in mine], axis=0)
        more = ", ".join(f"{row['curve'][0][1] - nothing[row['seed']]:+.4f}" for row in mine)
        lines.append(f"| {name} | {' | '.join(f'{value:.4f}' for value in means)} | {more} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
