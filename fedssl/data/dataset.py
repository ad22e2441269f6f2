"""A data set ready for a run: histories, the catalogue they speak of, where they came from, what the filter dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedssl.catalogue import Catalogue, read_catalogue, write_catalogue
from fedssl.config import DataConfig
from fedssl.data.features_file import read_features
from fedssl.data.histories import Histories, make_histories
from fedssl.data.history_store import open_histories, put_histories, read_about, written_beside
from fedssl.data.interactions import Interactions, k_core
from fedssl.data.paths import find_path
from fedssl.data.readers import read_interactions, read_items, read_users
from fedssl.data.split import check_has_targets, hold_out
from fedssl.errors import CatalogueMismatch, DataError

DATASET_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Dataset:
    """Histories and their catalogue.

    ``dropped``: users, items and events that the filter took away. ``bad_lines``: lines of the file that were passed over because they
    could not be read; ``first_bad``: file, line and reason of the first. ``user_attributes``: what a side file says of users, by token;
    it is for a probe alone, and no model, catalogue or record sees it. ``fewest``: events of any user, and of any item that occurs, where a
    store knows them. ``features`` (I, F): what `[data] features` says of the items.
    """

    histories: Histories
    catalogue: Catalogue
    path: str
    dropped: Mapping[str, int]
    bad_lines: int = 0
    first_bad: str = ""
    user_attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fewest: tuple[int, int] | None = None
    features: NDArray[np.float32] | None = None


def load_dataset(config: DataConfig) -> Dataset:
    """What `[data]` asks for: a file read, filtered, sorted and split, or a store opened memory-mapped and split.

    A store is taken as it is; it is refused where it does not keep the promise of ``min_events``. Raises DataError for a path
    or file that cannot be used and where nobody is left to test, CatalogueMismatch for items that a given catalogue does not list.
    """
    path = find_path(config.path)
    if path.is_dir():
        dataset = open_dataset(path)
        _check_is_core(dataset, config.min_events)
        public = public_catalogue(config)
        if public is not None and public.hash != dataset.catalogue.hash:
            raise CatalogueMismatch(f"{path}: the store speaks of another catalogue than {config.catalogue}; convert the data again with that catalogue")
        dataset = replace(dataset, histories=hold_out(dataset.histories, config, str(path)))
    else:
        dataset = make_dataset(read_interactions(path, config.format, columns=config.columns, skip_bad_lines=config.skip_bad_lines), config)
    dataset = add_side_files(dataset, config)
    check_has_targets(dataset.histories, str(path))
    return dataset


def add_side_files(dataset: Dataset, config: DataConfig) -> Dataset:
    """The data set with what the side files of ``config`` say of its items and users. Raises DataError for files of others."""
    if config.items:
        dataset = replace(dataset, catalogue=_describe_items(dataset.catalogue, config.items))
    if config.features:
        dataset = replace(dataset, features=read_features(find_path(config.features), dataset.catalogue))
    if config.users:
        dataset = replace(dataset, user_attributes=_describe_users(dataset.histories.names, config.users))
    return dataset


def make_dataset(interactions: Interactions, config: DataConfig) -> Dataset:
    """Filter, sort, number and split events that are already in memory.

    Raises DataError where the filter leaves nothing, or the split cannot be made.
    """
    kept = k_core(interactions, config.min_events)
    refuse_empty(kept.num_events, interactions.num_events, config)
    histories, catalogue = make_histories(kept, public_catalogue(config))
    dropped = {
        "users": len(interactions.user_tokens) - len(kept.user_tokens),
        "items": len(interactions.item_tokens) - len(kept.item_tokens),
        "events": interactions.num_events - kept.num_events,
    }
    histories = hold_out(histories, config, config.path or "the interactions")
    return Dataset(histories, catalogue, config.path, dropped, interactions.bad_lines, interactions.first_bad)


def refuse_empty(left: int, of: int, config: DataConfig) -> None:
    """Raise DataError where the filter left no event."""
    if not left:
        where = config.path or "the interactions"
        raise DataError(f"{where}: none of the {of} events is left where users and items need [data] min_events = {config.min_events}; lower it")


def public_catalogue(config: DataConfig) -> Catalogue | None:
    """The catalogue that `[data] catalogue` names, or None."""
    return read_catalogue(find_path(config.catalogue)) if config.catalogue else None


def write_dataset(dataset: Dataset, folder: Path) -> None:
    """Write a store that `open_dataset` maps: the histories, `catalogue.jsonl`, `users.jsonl` where users have attributes,
    `dataset.json`. Never half there.

    Raises DataError where ``folder`` already holds something, or cannot be written.
    """
    with written_beside(folder) as beside:
        put_histories(dataset.histories, beside)
        put_rest(dataset, beside, _fewest(dataset.histories))


def put_rest(dataset: Dataset, folder: Path, fewest: tuple[int, int]) -> None:
    """Write what a store holds beside its histories. ``fewest``: events of any user, and of any item that occurs."""
    write_catalogue(dataset.catalogue, folder / "catalogue.jsonl")
    if dataset.user_attributes:
        _write_users(dataset.user_attributes, folder / "users.jsonl")
    about = {
        "format": DATASET_FORMAT,
        "catalogue": dataset.catalogue.hash,
        "dropped": dict(dataset.dropped),
        "bad_lines": dataset.bad_lines,
        "first_bad": dataset.first_bad,
        "fewest": list(fewest),
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def open_dataset(folder: Path, *, verify: Literal["sample", "whole"] = "sample") -> Dataset:
    """A data set memory-mapped from a store: a million users open in well under a second, and names are read when asked for.

    ``verify`` as in `open_histories`; whole also looks at every row. Raises DataError for a folder that is no store, damaged, or of a
    newer format.
    """
    about = read_about(folder, "dataset.json", DATASET_FORMAT)
    histories = open_histories(folder, verify=verify)
    catalogue = read_catalogue(folder / "catalogue.jsonl")
    if catalogue.hash != about.get("catalogue"):
        raise DataError(f"{folder}/catalogue.jsonl: not the catalogue that was written with the histories; make the store again with `fedssl data convert`")
    fewest = about.get("fewest")
    is_old = not (isinstance(fewest, list) and len(fewest) == 2 and all(isinstance(number, int) for number in fewest))
    if (verify == "whole" or is_old) and histories.num_events and not (histories.items.min() >= 1 and histories.items.max() <= catalogue.num_items):
        raise DataError(f"{folder}: histories name rows outside the catalogue's 1 to {catalogue.num_items}; make the store again with `fedssl data convert`")
    dropped, bad_lines = about.get("dropped"), about.get("bad_lines")
    return Dataset(
        histories,
        catalogue,
        str(folder),
        dict(dropped) if isinstance(dropped, dict) else {},
        bad_lines if isinstance(bad_lines, int) else 0,
        str(about.get("first_bad", "")),
        _read_users(folder / "users.jsonl") if (folder / "users.jsonl").exists() else {},
        None if is_old or fewest is None else (fewest[0], fewest[1]),
    )


def _describe_items(catalogue: Catalogue, path: str) -> Catalogue:
    """The catalogue with titles and attributes of a side file over those it had."""
    titles, attributes = read_items(find_path(path))
    if not any(token in catalogue.rows for token in attributes):
        first_known, first_named = catalogue.tokens[0], next(iter(attributes), "none")
        raise DataError(f"{path}: names no item of the data; items here are like {first_known!r}, there like {first_named!r}")
    return replace(
        catalogue,
        titles={**catalogue.titles, **{token: title for token, title in titles.items() if token in catalogue.rows}},
        attributes={**catalogue.attributes, **{token: known for token, known in attributes.items() if token in catalogue.rows}},
    )


def _describe_users(names: Sequence[str], path: str) -> dict[str, dict[str, str]]:
    """Attributes of the users among ``names``, in that order."""
    found = read_users(find_path(path))
    known = {name: found[name] for name in names if name in found}
    if not known:
        raise DataError(f"{path}: names no user of the data; users here are like {names[0]!r}, there like {next(iter(found), 'none')!r}")
    return known


def _write_users(attributes: Mapping[str, Mapping[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps({"user": token, "attributes": dict(known)}, ensure_ascii=False) + "\n" for token, known in attributes.items())


def _read_users(path: Path) -> dict[str, dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            lines = [json.loads(line) for line in file]
        return {str(line["user"]): {str(name): str(value) for name, value in line["attributes"].items()} for line in lines}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); make the store again with `fedssl data convert`") from None


def _check_is_core(dataset: Dataset, min_events: int) -> None:
    of_user, of_item = dataset.fewest or _fewest(dataset.histories)
    if min(of_user, of_item) < min_events:
        raise DataError(
            f"{dataset.path}: the store has users with {of_user} and items with {of_item} events, [data] min_events asks for {min_events}; "
            f"set min_events = {max(1, min(of_user, of_item))}, or convert the data again"
        )


def _fewest(histories: Histories) -> tuple[int, int]:
    """Events of any user, and of any item that occurs; reads all items."""
    met = np.bincount(histories.items, minlength=1)
    return int(histories.lengths.min(initial=histories.num_events)), int(met[met > 0].min(initial=histories.num_events))
