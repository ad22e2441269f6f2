"""What a step of the head from each recorded event is worth between two rounds: a person's last ten events, one after another, with and without.

A run with a user-vector is trained on what people met before those ten (it holds the first two of them out itself). Then each of the ten is ranked after all
events before it, with the run's own head and the steps so far, and only then takes its step: that of a device (`DeviceRecommender.step`, which a test
holds to the same slope), for all people at once. The step size is the one that was best on the first five events; the last five say what it gives there.
Intervals are of 95 %, over people, who are drawn with their ranks of all seeds. Rows of results/adaptation.jsonl.

    python simulations/benchmarks/adaptation.py --seed 1 2 3        (needs ml-100k.inter.gz where $FEDSSL_DATA points)
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
import torch
from fedssl_simulations.run import Run, simulate
from fedssl_simulations.run_files import read_run
from numpy.typing import NDArray
from paired import Floats, gain, ndcg, said

from fedssl.config import HeadConfig, RunConfig
from fedssl.data.dataset import Dataset, load_dataset
from fedssl.data.histories import Histories
from fedssl.evaluation import ranks
from fedssl.heads.history import history_vectors
from fedssl.weights import ITEMS

LAST, CHOSEN_ON, HELD_OUT = 10, 5, 2
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HEADS = {
    "user vector": HeadConfig(name="user-vector", lr=2.0),
    "user vector and history": HeadConfig(name="user-vector", lr=2.0, history=3.0),
}
SPLITS = ("unseen", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="ml-100k")
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--dry", action="store_true", help="do not append to results/")
    arguments = parser.parse_args()
    dataset = load_dataset(read_run(arguments.preset, arguments.overrides).data)
    for name, head in HEADS.items():
        configs = [read_run(arguments.preset, arguments.overrides, seed=seed).model_copy(update={"head": head}) for seed in arguments.seed]
        chosen = [config.model_dump(mode="json", exclude={"system"}, exclude_defaults=True) for config in configs]
        settings = results.settings_hash([chosen, dataset.histories.fingerprint, RATES, LAST, CHOSEN_ON])
        row = None if arguments.dry else results.newest("adaptation", settings=settings)
        if row is None:
            began = time.process_time()
            found = compared(np.stack([run_and_follow(config, dataset) for config in configs]))
            cpu = round(time.process_time() - began, 1)
            row = {"preset": arguments.preset, "name": name, "seeds": arguments.seed, "rates": RATES, **found, "cpu_seconds": cpu, "settings": settings}
            if not arguments.dry:
                results.append("adaptation", row)
        print_row(row)


def run_and_follow(config: RunConfig, dataset: Dataset) -> NDArray[np.float64]:
    """One run, and the ranks (rates, people, LAST, splits) of what people met after it; the first rate is none."""
    histories = dataset.histories
    people = np.flatnonzero(histories.lengths >= LAST + 1)
    with TemporaryDirectory() as folder:
        run = simulate(config, out=Path(folder) / "run", dataset=replace(dataset, histories=without_newest(histories, LAST - HELD_OUT)))
        return followed(run, [histories.of(person) for person in people.tolist()], people)


def without_newest(histories: Histories, number: int) -> Histories:
    """The same people without their newest events."""
    ends = np.maximum(histories.cuts[1:] - number, histories.cuts[:-1])
    is_kept = np.repeat(ends, histories.lengths) > np.arange(histories.num_events)
    cuts = np.concatenate([[0], np.cumsum(ends - histories.cuts[:-1])])
    return Histories(histories.items[is_kept], cuts, None if histories.times is None else histories.times[is_kept], histories.names)


@torch.no_grad()
def followed(run: Run, histories: list[NDArray[np.int32]], people: NDArray[np.int64]) -> NDArray[np.float64]:
    """Ranks (rates, people, LAST, splits) of each of the newest events after all before it. Heads of each rate step on after each event."""
    table_ID, strength = run.state.released(run.recipe)[ITEMS], run.recipe.head.history
    assert run.model._heads is not None
    heads = {rate: torch.from_numpy(run.model._heads(people)) for rate in (0.0, *RATES)}
    found: dict[float, list[NDArray[np.float64]]] = {rate: [] for rate in heads}
    for back in range(LAST, 0, -1):
        before, targets = [history[:-back] for history in histories], np.array([history[-back] for history in histories], dtype=np.int64)
        seen = np.repeat(np.arange(len(before)), [len(rows) for rows in before]), np.concatenate(before)
        hidden_UD = run.model.encode(before) + strength * history_vectors(before, table_ID)
        said = run.model(before, people)
        counted = said["score"] - said["encoder"] if "encoder" in said else 0.0
        for rate, heads_UD in heads.items():
            scores_UI = (hidden_UD + heads_UD) @ table_ID.T
            overall, unseen = ranks(scores_UI + counted, targets, seen)
            found[rate].append(np.stack([unseen, overall], axis=-1))
            scores_UI[:, 0] = -torch.inf
            heads[rate] = heads_UD + rate * (table_ID[targets] - scores_UI.softmax(1) @ table_ID)
    return np.stack([np.stack(each, axis=1) for each in found.values()])


def compared(ranks_SRUEP: NDArray[np.float64]) -> dict[str, Any]:
    """The rate that is best on the first events by NDCG@10 `unseen`, and what it gives on the others. Axes: seeds, rates, people, events, splits."""
    first, last = ranks_SRUEP[..., :CHOSEN_ON, :], ranks_SRUEP[..., CHOSEN_ON:, :]
    on_first, on_last = ([[ndcg(some[:, rate, :, :, split]) for rate in range(len(RATES) + 1)] for split in range(len(SPLITS))] for some in (first, last))
    best = 1 + int(np.argmax(on_first[0][1:]))
    gains = {name: gain(ndcg, *(_of(last, rate, split) for rate in (0, best))) for split, name in enumerate(SPLITS)}
    tried = {name: {"first": on_first[split], "last": on_last[split]} for split, name in enumerate(SPLITS)}
    return {"people": ranks_SRUEP.shape[2], "ndcg": tried, "rate": RATES[best - 1], "gains": gains}


def _of(ranks_SRUEP: NDArray[np.float64], rate: int, split: int) -> Floats:
    return ranks_SRUEP[:, rate, :, :, split]


def print_row(row: dict[str, Any]) -> None:
    about = f"{row['preset']}, {row['name']}"
    for part in ("first", "last"):
        tried = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in zip((0.0, *row["rates"]), row["ndcg"]["unseen"][part], strict=True))
        print(f"{about}: NDCG@10 unseen of the {part} {CHOSEN_ON if part == 'first' else LAST - CHOSEN_ON} events by step size {tried}", flush=True)
    for split, found in row["gains"].items():
        print(f"{about}: step size {row['rate']:g}, NDCG@10 {split} of the last {LAST - CHOSEN_ON} events {said(found)}", flush=True)


if __name__ == "__main__":
    main()
