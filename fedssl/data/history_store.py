"""A store of histories: a folder of .npy columns that are memory-mapped, and `histories.json`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedssl.data.histories import HeldFrom, Histories
from fedssl.data.stored_names import StoredNames
from fedssl.data.watch import marks_of
from fedssl.errors import DataError

STORE_FORMAT = 2
"""2: with a split by time. A store without one is written as format 1."""

SAMPLED_PAGES, PAGE_BYTES = 256, 4096
"""What `open_histories` reads of a longer column by itself: so many pages, evenly spread; a column of up to 1 MiB is read whole."""

_COLUMNS: dict[str, np.dtype[Any]] = {
    "items": np.dtype("<i4"),
    "cuts": np.dtype("<i8"),
    "times": np.dtype("<f8"),
    "names": np.dtype("u1"),
    "name_cuts": np.dtype("<i8"),
}


def write_histories(histories: Histories, folder: Path) -> None:
    """Write a store that `open_histories` maps: .npy columns and `histories.json`. Written beside and renamed, so never half there.

    Raises DataError where ``folder`` already holds something, or cannot be written.
    """
    with written_beside(folder) as beside:
        put_histories(histories, beside)


def put_histories(histories: Histories, folder: Path) -> None:
    """Write the files of a store into a folder that exists, in place."""
    spelled = [name.encode() for name in histories.names]
    columns: dict[str, NDArray[Any] | None] = {
        "items": histories.items,
        "cuts": histories.cuts,
        "times": histories.times,
        "names": np.frombuffer(b"".join(spelled), dtype=np.uint8),
        "name_cuts": np.cumsum([0, *map(len, spelled)], dtype=np.int64),
    }
    for name, column in columns.items():
        if column is not None:
            np.save(folder / f"{name}.npy", np.ascontiguousarray(column, dtype=_COLUMNS[name]))
    put_about(histories, folder)


def put_about(histories: Histories, folder: Path) -> None:
    """Write `histories.json` beside columns that are already there."""
    about: dict[str, Any] = {} if histories.held_from is None else {"held_from": histories.held_from}
    about |= {"format": STORE_FORMAT if about else 1, "users": histories.num_users, "events": histories.num_events}
    about |= {"fingerprint": histories.fingerprint_of_events, "times": histories.times is not None, "sample": _sample(folder, histories.times is not None)}
    (folder / "histories.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def open_histories(folder: Path, *, verify: Literal["sample", "whole"] = "sample") -> Histories:
    """Histories memory-mapped from a store: only what is read takes memory.

    ``verify``: sample holds the sizes of all columns, their first, last and 254 more pages, and all of the smaller columns against the
    checksum that was written with them: that finds a file that was cut, exchanged or never finished, in milliseconds whatever the
    size, and not one changed byte in a large column. whole reads every item and cut, and finds that too.
    Raises DataError for a folder that is no store, was written by a newer fedssl, is cut short, or holds other bytes than were written.
    """
    about = read_about(folder, "histories.json", STORE_FORMAT)
    marks = marks_of(folder / f"{name}.npy" for name in _COLUMNS)
    names, name_cuts = _map(folder, "names"), _map(folder, "name_cuts")
    items, cuts = _map(folder, "items"), _map(folder, "cuts")
    times = _map(folder, "times") if about.get("times") else None
    _check_cuts(cuts, len(items), folder / "cuts.npy")
    _check_cuts(name_cuts, len(names), folder / "name_cuts.npy")
    if len(name_cuts) != len(cuts) or (times is not None and len(times) != len(items)):
        raise DataError(f"{folder}: columns of different lengths; the store is damaged, make it again with `fedssl data convert`")
    histories = Histories(items, cuts, times, StoredNames(names, name_cuts), _held_from(about, times is not None, folder), marks)
    differs = "sample" in about and about["sample"] != _sample(folder, times is not None)
    if differs or ((verify == "whole" or "sample" not in about) and histories.fingerprint_of_events != about.get("fingerprint")):
        raise DataError(f"{folder}: the bytes are not those that were written (fingerprint differs); make it again with `fedssl data convert`")
    histories.__dict__["fingerprint_of_events"] = about.get("fingerprint")
    return histories


def map_histories(folder: Path, *, has_times: bool, fingerprint: str) -> Histories:
    """Histories of columns that were just written, without a split and without a look at them."""
    columns = {name: _map(folder, name) for name in _COLUMNS if name != "times" or has_times}
    histories = Histories(columns["items"], columns["cuts"], columns.get("times"), StoredNames(columns["names"], columns["name_cuts"]))
    histories.__dict__["fingerprint_of_events"] = fingerprint
    return histories


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its name when the block ends well, and is removed when it does not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: already there and not empty; remove it, or name another folder")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.replace(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error}); is there room, and may you write there?") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_about(folder: Path, name: str, newest: int) -> dict[str, Any]:
    """The JSON object of a store with its format number checked. Raises DataError for a missing, damaged or newer one."""
    path = folder / name
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: no {name}, so this is not a store; make one with `fedssl data convert`") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); make the store again with `fedssl data convert`") from None
    number = about.get("format") if isinstance(about, dict) else None
    if not isinstance(number, int) or number < 1:
        raise DataError(f"{path}: no format number; make the store again with `fedssl data convert`")
    if number > newest:
        raise DataError(f"{path}: format {number}, this version reads up to {newest}; install the fedssl that wrote it")
    return dict(about)


def _held_from(about: dict[str, Any], has_times: bool, folder: Path) -> HeldFrom | None:
    if "held_from" not in about:
        return None
    try:
        validation, test = map(float, about["held_from"])
    except (TypeError, ValueError):
        has_times = False
    if not has_times:
        raise DataError(f"{folder}: a split by time without its two times, or without times of events; make the store again")
    return HeldFrom(validation, test)


def _map(folder: Path, name: str) -> NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        column = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: missing, damaged or cut short ({error}); make the store again with `fedssl data convert`") from None
    if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype != _COLUMNS[name]:
        raise DataError(f"{path}: not a column of {_COLUMNS[name]}; make the store again with `fedssl data convert`")
    return column


def _sample(folder: Path, has_times: bool) -> str:
    """SHA-256 over the sizes of a store's columns, and some pages of each."""
    digest = hashlib.sha256()
    for name in _COLUMNS:
        if name != "times" or has_times:
            with (folder / f"{name}.npy").open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{name} {size}\n".encode())
                if size <= SAMPLED_PAGES * PAGE_BYTES:
                    digest.update(file.read())
                else:
                    for page in range(SAMPLED_PAGES):
                        file.seek(page * (size - PAGE_BYTES) // (SAMPLED_PAGES - 1))
                        digest.update(file.read(PAGE_BYTES))
    return digest.hexdigest()


def _check_cuts(cuts: NDArray[np.int64], end: int, path: Path) -> None:
    if not (len(cuts) and cuts[0] == 0 and cuts[-1] == end and (np.diff(cuts) >= 0).all()):
        raise DataError(f"{path}: does not cut {end} entries from the first to the last; the store is damaged, make it again with `fedssl data convert`")
