"""A store made from a file of any size: events go to disk in parts of users, are filtered and sorted a part at a time, and merged.

In memory stay the item tokens, some numbers an item and a user (bytes, not text), one block of the file and one part of the events.
"""

from __future__ import annotations

import heapq
import json
import shutil
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedssl.catalogue import Catalogue
from fedssl.config import DataConfig
from fedssl.data.dataset import Dataset, add_side_files, load_dataset, open_dataset, public_catalogue, put_rest, refuse_empty, write_dataset
from fedssl.data.histories import fingerprint_of, refuse_unknown
from fedssl.data.history_store import map_histories, put_about, written_beside
from fedssl.data.paths import find_path
from fedssl.data.readers import FORMATS, read_events
from fedssl.data.readers.blocks import Block, collect
from fedssl.data.split import check_has_targets, hold_out

PARTS = 64
"""Users are dealt to so many parts by a hash of their token; memory holds the events of one."""
EVENTS_AT_ONCE = 1 << 20
"""Events that are gathered before they are dealt, and that are written to the store at a time."""
_NEVER = np.iinfo(np.int64).max


def convert(config: DataConfig, folder: Path) -> Dataset:
    """Make the store of `[data]` in ``folder`` and open it.

    Guarantees:
      - the bytes of the store are those of ``write_dataset(load_dataset(config), folder)``;
      - memory does not grow with the events, but with items, users (some bytes each; the text of their tokens only in format lines, which looks
        for users listed twice) and the events of one user in ``PARTS``; a split by time, which no store needs, reads all times at once;
      - temporary files (up to 16 bytes an event, beside the store) are gone at the end, and nothing is left where it fails.

    A reader of one's own gives all events at once, and a store is loaded as it is: these are written from memory.
    Raises DataError and CatalogueMismatch as `load_dataset` and `write_dataset` do.
    """
    path = find_path(config.path)
    if path.is_dir() or (config.format != "auto" and config.format not in FORMATS):
        write_dataset(load_dataset(config), folder)
        return open_dataset(folder)
    with written_beside(folder) as beside:
        spill = beside / "spill"
        spill.mkdir()
        _convert(config, path, beside, spill)
        shutil.rmtree(spill)
    return open_dataset(folder)


def _convert(config: DataConfig, path: Path, folder: Path, spill: Path) -> None:
    blocks, bad = read_events(path, config.format, columns=config.columns, skip_bad_lines=config.skip_bad_lines)
    item_tokens, read_events_of_parts, has_times = _deal(blocks, spill)
    num_events = sum(map(sum, read_events_of_parts))
    if not num_events:
        collect((), bad, "the file holds no event; wanted one event or one user a line")
    parts = [_Part(spill, number, has_times) for number in range(PARTS)]
    num_users = sum(part.name_users(chunks) for part, chunks in zip(parts, read_events_of_parts))
    met_I = _core(parts, len(item_tokens), config.min_events)
    refuse_empty(int(met_I.sum()), num_events, config)

    lengths_of_parts = [part.sort() for part in parts]
    part_U = _merge_names(parts, lengths_of_parts, folder)
    lengths_U = np.empty(len(part_U), dtype=np.int64)
    for part, lengths in zip(parts, lengths_of_parts):
        lengths_U[part_U == part.number] = lengths[lengths > 0]
    cuts = np.concatenate([[0], np.cumsum(lengths_U)]).astype(np.int64)
    np.save(folder / "cuts.npy", cuts)

    catalogue, row_I = _number_items(parts, part_U, cuts, item_tokens, public_catalogue(config))
    with _Column(folder / "items.npy", "<i4") as items, _Column(folder / "times.npy", "<f8") as times:
        fingerprint = fingerprint_of(_merge_events(parts, part_U, cuts, row_I, items, times), cuts)
    if not has_times:
        (folder / "times.npy").unlink()

    histories = map_histories(folder, has_times=has_times, fingerprint=fingerprint)
    histories = hold_out(histories, config, config.path)
    dropped = {"users": num_users - len(part_U), "items": len(item_tokens) - int((met_I > 0).sum()), "events": num_events - len(histories.items)}
    dataset = add_side_files(Dataset(histories, catalogue, config.path, dropped, bad.count, bad.first), config)
    check_has_targets(dataset.histories, str(path))
    put_about(histories, folder)
    put_rest(dataset, folder, (int(lengths_U.min()), int(met_I[met_I > 0].min())))


def _deal(blocks: Iterable[Block], spill: Path) -> tuple[tuple[str, ...], list[list[int]], bool]:
    """Write the events to the files of their users' parts, in file order. Items become codes in order of first appearance.

    Returns the item tokens, for each part how many events each chunk gave it, and whether events have times. A user is a number within
    the chunk, and a line of `names` lists a chunk's tokens.
    """
    item_codes = _codes()
    events_of_parts: list[list[int]] = [[] for _ in range(PARTS)]
    has_times = False
    user_codes = _codes()
    gathered: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64] | None]] = []
    num_gathered = 0

    def deal() -> None:
        users, items = (np.concatenate([columns[side] for columns in gathered]) for side in (0, 1))
        times = np.concatenate([columns[2] for columns in gathered if columns[2] is not None] or [np.zeros(0)])
        tokens = list(user_codes)
        part_of_token = np.array([zlib.crc32(token.encode()) % PARTS for token in tokens], dtype=np.int16)
        token_order = np.argsort(part_of_token, kind="stable")
        token_cuts = np.searchsorted(part_of_token[token_order], np.arange(PARTS + 1))
        within = np.empty(len(tokens), dtype=np.int32)
        within[token_order] = np.arange(len(tokens)) - np.repeat(token_cuts[:-1], np.diff(token_cuts))
        part_of_event = part_of_token[users]
        order = np.argsort(part_of_event, kind="stable")
        cuts = np.searchsorted(part_of_event[order], np.arange(PARTS + 1))
        columns = {"users": within[users][order], "items": items[order]} | ({"times": times[order]} if len(times) else {})
        for part, (start, end) in enumerate(zip(cuts[:-1].tolist(), cuts[1:].tolist())):
            if start == end:
                continue
            events_of_parts[part].append(end - start)
            for name, column in columns.items():
                with (spill / f"{name}-{part}").open("ab") as file:
                    file.write(column[start:end].data)
            with (spill / f"names-{part}").open("a", encoding="utf-8") as text:
                text.write(json.dumps([tokens[at] for at in token_order[token_cuts[part] : token_cuts[part + 1]].tolist()]) + "\n")

    for block in blocks:
        has_times |= block.times is not None
        gathered.append((_encode(block.users, user_codes), _encode(block.items, item_codes), block.times))
        num_gathered += len(block.users)
        if num_gathered >= EVENTS_AT_ONCE:
            deal()
            user_codes, gathered, num_gathered = _codes(), [], 0
    if num_gathered:
        deal()
    return tuple(item_codes), events_of_parts, has_times


def _codes() -> defaultdict[str, int]:
    """A dict that gives a token it has not seen the next number."""
    # Not the dict's own length: a dict that refers to itself would stay in memory.
    return defaultdict(count(0).__next__)


def _encode(column: Sequence[str], codes: defaultdict[str, int]) -> NDArray[np.int32]:
    return np.fromiter(map(codes.__getitem__, column), np.int32, len(column))


@dataclass(frozen=True)
class _Part:
    """Some of the users, and their events in files of the spill folder."""

    spill: Path
    number: int
    has_times: bool

    def read(self, name: str, start: int = 0, events: int = -1) -> NDArray[Any]:
        """A column, or ``events`` entries of it from ``start`` on."""
        dtype = np.dtype(np.float64 if name == "times" else np.int32)
        path = self.spill / f"{name}-{self.number}"
        return np.fromfile(path, dtype, events, offset=start * dtype.itemsize) if path.exists() else np.empty(0, dtype)

    def write(self, name: str, column: NDArray[Any]) -> None:
        column.tofile(self.spill / f"{name}-{self.number}")

    def names(self) -> Iterator[str]:
        """Tokens of the users, one a line."""
        path = self.spill / f"names-{self.number}"
        if path.exists():
            with path.open(encoding="utf-8", newline="\n") as file:
                yield from map(json.loads, file)

    def name_users(self, events_of_chunks: list[int]) -> int:
        """Turn users from numbers within chunks into numbers within the part, in order of tokens as text. Returns how many there are."""
        codes = _codes()
        users, at = self.read("users"), 0
        for tokens, events in zip(self.names(), events_of_chunks, strict=True):
            users[at : at + events] = _encode(tokens, codes)[users[at : at + events]]
            at += events
        by_text = sorted(codes)
        number_of_code = np.empty(len(codes), dtype=np.int32)
        number_of_code[[codes[token] for token in by_text]] = np.arange(len(codes))
        self.write("users", number_of_code[users])
        with (self.spill / f"names-{self.number}").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(token) + "\n" for token in by_text)
        return len(codes)

    def filter(self, is_kept_I: NDArray[np.bool_], min_events: int) -> tuple[NDArray[np.int64], bool]:
        """Drop events of other items, then of users with fewer than ``min_events``. Returns the events of each item, and whether any went."""
        users, items = self.read("users"), self.read("items")
        kept = np.flatnonzero(is_kept_I[items])
        kept = kept[(np.bincount(users[kept], minlength=1) >= min_events)[users[kept]]]
        has_dropped = len(kept) < len(users)
        if has_dropped:
            items = items[kept]
            self.write("users", users[kept])
            self.write("items", items)
            if self.has_times:
                self.write("times", self.read("times")[kept])
        return np.bincount(items, minlength=len(is_kept_I)), has_dropped

    def sort(self) -> NDArray[np.int64]:
        """Put the events in order of user, time, file. Returns the events of each user, those without any too."""
        users = self.read("users")
        times = self.read("times")
        order = np.lexsort((times, users)) if self.has_times else np.argsort(users, kind="stable")
        self.write("items", self.read("items")[order])
        if self.has_times:
            self.write("times", times[order])
        (self.spill / f"users-{self.number}").unlink(missing_ok=True)
        return np.bincount(users)


def _core(parts: list[_Part], num_items: int, min_events: int) -> NDArray[np.int64]:
    """The k-core, as `k_core` has it, in passes over the parts. Returns the events of each item that are left. Shape: (I,)."""
    is_kept_I = np.ones(num_items, dtype=np.bool_)
    met_I = sum((part.filter(is_kept_I, 1)[0] for part in parts), np.zeros(num_items, dtype=np.int64))
    has_dropped = min_events > 1
    while has_dropped:
        is_kept_I = met_I >= min_events
        met_I, has_dropped = np.zeros(num_items, dtype=np.int64), False
        for part in parts:
            met_of_part, dropped = part.filter(is_kept_I, min_events)
            met_I += met_of_part
            has_dropped |= dropped
    return met_I


def _merge_names(parts: list[_Part], lengths_of_parts: list[NDArray[np.int64]], folder: Path) -> NDArray[np.uint16]:
    """Write the names of all users with events, in order as text. Returns the part of each. Shape: (U,)."""

    def named(part: _Part, lengths: NDArray[np.int64]) -> Iterator[tuple[str, int]]:
        return ((name, part.number) for name, has_events in zip(part.names(), (lengths > 0).tolist()) if has_events)

    part_of_user, sizes = array("H"), array("q", [0])
    with _Column(folder / "names.npy", "u1") as column:
        waiting = bytearray()
        for name, number in heapq.merge(*map(named, parts, lengths_of_parts)):
            spelled = name.encode()
            part_of_user.append(number)
            sizes.append(len(spelled))
            waiting += spelled
            if len(waiting) >= 1 << 20:
                column.append(np.frombuffer(bytes(waiting), dtype=np.uint8))
                waiting.clear()
        column.append(np.frombuffer(bytes(waiting), dtype=np.uint8))
    np.save(folder / "name_cuts.npy", np.cumsum(np.frombuffer(sizes, dtype=np.int64)))
    return np.frombuffer(part_of_user, dtype=np.uint16)


def _number_items(
    parts: list[_Part], part_U: NDArray[np.uint16], cuts: NDArray[np.int64], item_tokens: tuple[str, ...], public: Catalogue | None
) -> tuple[Catalogue, NDArray[np.int32]]:
    """The catalogue, and the row of each item code: by first appearance in the order of all events, or as ``public`` has them."""
    first_I = np.full(len(item_tokens), _NEVER)
    for part in parts:
        mine = np.flatnonzero(part_U == part.number)
        lengths = cuts[mine + 1] - cuts[mine]
        items = part.read("items")
        place = np.arange(len(items)) + np.repeat(cuts[mine] - (np.cumsum(lengths) - lengths), lengths)
        first_of_part = np.full(len(item_tokens), _NEVER)
        # The last of many writes to one place stays: here that of the first event.
        first_of_part[items[::-1]] = place[::-1]
        np.minimum(first_I, first_of_part, out=first_I)
    occurring = np.flatnonzero(first_I < _NEVER)
    if public is None:
        by_appearance = occurring[np.argsort(first_I[occurring])]
        public = Catalogue(tuple(item_tokens[code] for code in by_appearance.tolist()))
    row_I = np.array([public.rows.get(token, 0) for token in item_tokens], dtype=np.int32)
    refuse_unknown(item_tokens, occurring[row_I[occurring] == 0], public)
    return public, row_I


def _merge_events(
    parts: list[_Part], part_U: NDArray[np.uint16], cuts: NDArray[np.int64], row_I: NDArray[np.int32], items: _Column, times: _Column
) -> Iterator[NDArray[np.int32]]:
    """Write rows and times of all events, user after user, some whole users at a time; yields the rows that were written."""
    done_of_part = [0] * len(parts)
    begin, num_users = 0, len(part_U)
    while begin < num_users:
        end = max(begin + 1, int(np.searchsorted(cuts, cuts[begin] + EVENTS_AT_ONCE, side="right")) - 1)
        starts, lengths = cuts[begin:end] - cuts[begin], np.diff(cuts[begin : end + 1])
        rows, moments = np.empty(cuts[end] - cuts[begin], dtype=np.int32), np.empty(cuts[end] - cuts[begin] if parts[0].has_times else 0)
        for number in np.unique(part_U[begin:end]).tolist():
            is_mine = part_U[begin:end] == number
            size_of_mine = lengths[is_mine]
            events = int(size_of_mine.sum())
            place = np.arange(events) + np.repeat(starts[is_mine] - (np.cumsum(size_of_mine) - size_of_mine), size_of_mine)
            rows[place] = row_I[parts[number].read("items", done_of_part[number], events)]
            if len(moments):
                moments[place] = parts[number].read("times", done_of_part[number], events)
            done_of_part[number] += events
        items.append(rows)
        times.append(moments)
        yield rows
        begin = end


class _Column:
    """A .npy file of one column whose length is known at its end: the bytes of `numpy.save`."""

    def __init__(self, path: Path, dtype: str):
        self._dtype, self._count = np.dtype(dtype), 0
        self._file: IO[bytes] = path.open("wb")

    def append(self, values: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self._count += len(values)

    def __enter__(self) -> _Column:
        self._header()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._file.seek(0)
            self._header()
        finally:
            self._file.close()

    def _header(self) -> None:
        # Headers are padded, so that one of no entries takes the room of one of many.
        about = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, about)
