"""A new catalogue from a checkpoint of another one: quality after the first rounds, beside a run from nothing.

The model of the preset is taught on MovieLens-1M for some rounds, once a seed, with features of titles, then carried over to MovieLens-100K
(`fedssl simulate --from`) in three ways: with items matched by title where both have them; with no item shared, by features; and with no item
shared and no features, so that the encoder's body alone is carried. After every few rounds 943 people are validated; the last is tested.
Intervals are of 95 %, over people, who are drawn with their ranks of all seeds.

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
from fedssl_simulations.run import Progress, Run, simulate
from fedssl_simulations.run_files import read_run
from paired import gain, ndcg

from fedssl.catalogue import Catalogue
from fedssl.config import RunConfig
from fedssl.data.dataset import Dataset, load_dataset
from fedssl.evaluation import Ranks, evaluate

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
    target_overrides = [*common, "data.items=ml-100k.item.gz", f"server.rounds={arguments.rounds}", "evaluation.every=0"]
    settings = results.settings_hash([source_overrides, target_overrides, arguments.every, read_run(PRESET).model_dump(mode="json")])
    encode = sentence_encoder()
    source, target = (with_titles(load_dataset(read_run(PRESET, overrides).data), encode) for overrides in (source_overrides, target_overrides))
    rows = []
    for seed in arguments.seed:
        found = {name: results.newest("transfer", settings=settings, seed=seed, name=name) for name in VARIANTS}
        if not all(found.values()):
            configs = (read_run(PRESET, overrides, seed=seed) for overrides in (source_overrides, target_overrides))
            found = measured(*configs, source, target, settings, arguments.every)
        rows += [row for row in found.values() if row is not None]
        print(f"seed {seed} done", flush=True)
    print(table(rows))


def measured(source_config: RunConfig, config: RunConfig, source: Dataset, target: Dataset, settings: str, every: int) -> dict[str, dict[str, Any] | None]:
    """One source, and a target run of each variant."""
    apart = replace(target, catalogue=Catalogue(tuple(f"100k {token}" for token in target.catalogue.tokens)))
    rows: dict[str, dict[str, Any] | None] = {}
    with TemporaryDirectory() as folder:
        began = simulate(source_config, out=Path(folder) / "source", dataset=source)
        start = str(began.folder / "checkpoints" / began.report["model"]["checkpoint"])
        print(f"source: {began.report['test']['unseen']['ndcg@10']:.4f} on its own test", flush=True)
        datasets = dict(zip(VARIANTS, (replace(apart, features=None), replace(apart, features=None), apart, target)))
        for name in VARIANTS:
            clock = time.perf_counter()
            begin = config if name == VARIANTS[0] else config.model_copy(update={"start": start})
            curve, first, run = stopped_on_the_way(begin, Path(folder) / name.replace(" ", "-").replace(",", ""), datasets[name], every)
            test = evaluate(run.model, run.dataset.histories, "test")
            about = {"curve": curve, "first_ranks": first, "ranks": _ranks(test), "test": run.report["test"]["unseen"]}
            rows[name] = results.append("transfer", {"name": name, "seed": config.seed, "settings": settings, **about, "seconds": time.perf_counter() - clock})
            print(f"  {name}: {curve}", flush=True)
    return rows


def stopped_on_the_way(config: RunConfig, out: Path, dataset: Dataset, every: int) -> tuple[list[list[float]], list[float], Run]:
    """A run that is validated every so many rounds: [round, NDCG@10 `unseen`] each time, everybody's ranks the first time, and the run in the end."""
    curve: list[list[float]] = []
    first: list[float] = []
    for goal in range(every, config.server.rounds + 1, every):
        reached = [goal - every]

        def note(progress: Progress, reached: list[int] = reached) -> None:
            reached[0] = progress.facts.round

        def is_there(reached: list[int] = reached, goal: int = goal) -> bool:
            return reached[0] >= goal

        if out.exists():
            run = simulate(resume=out, dataset=dataset, on_progress=note, should_stop=is_there)
        else:
            run = simulate(config, out=out, dataset=dataset, on_progress=note, should_stop=is_there)
        found = evaluate(run.model, run.dataset.histories, "validation")
        curve.append([goal, found.summary()["unseen"]["ndcg@10"]])
        first = first or _ranks(found)
    return curve, first, run


def _ranks(found: Ranks) -> list[float]:
    """Ranks `unseen`; those behind the tenth, which are all one to NDCG@10, as 11."""
    return np.minimum(found.unseen[next(iter(found.unseen))], 11.0).tolist()


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
    """NDCG@10 `unseen` on the validation event after so many rounds, the mean over seeds, and how much more than from nothing."""
    rounds = [int(number) for number, _ in rows[0]["curve"]]
    gained = " | ".join(f"{when}, over from nothing" for when in (f"after {rounds[0]}", f"test after {rounds[-1]}"))
    head = f"| begins with | {' | '.join(f'after {number} rounds' for number in rounds)} | {gained} |"
    lines = [head, "|" + "---|" * (len(rounds) + 3)]
    nothing = [row for row in rows if row["name"] == VARIANTS[0]]
    for name in VARIANTS:
        mine = [row for row in rows if row["name"] == name]
        means = np.mean([[value for _, value in row["curve"]] for row in mine], axis=0)
        cells = [f"{value:.4f}" for value in means]
        for which in ("first_ranks", "ranks"):
            found = gain(ndcg, *(np.array([row[which] for row in some]) for some in (nothing, mine)))
            low, high = found["interval"]
            cells.append("" if name == VARIANTS[0] else f"{found['gain']:+.0%} ({low:+.0%} to {high:+.0%})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
