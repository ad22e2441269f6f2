"""Records on their way: Download, Upload and Hello as bytes and as Flower records, with a format number.

Both forms hold the same two things: a small JSON header (format number, kind, address, recipe) and named tensors, little
endian, int32, int64 or float32. Bytes are safetensors with the header in its metadata, so there is no pickle anywhere, and
equal records give equal bytes. Whatever arrives gives a record that keeps the promises of `records.py`, or a WireError;
never another exception. The only file of the library that imports Flower.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import safetensors
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from safetensors.numpy import save

from fedssl import __version__
from fedssl.errors import ConfigError, WireError
from fedssl.privacy.adaptive_clip import LARGEST_CLIP, SMALLEST_CLIP
from fedssl.recipe import RECIPE_FORMAT, Recipe, read_recipe
from fedssl.records import Address, Download, Ints, SparseSum, Upload

WIRE_FORMAT = 1
# 16 MiB: names, an address and a recipe take kilobytes; a longer header is an attack or a broken file.
MAX_HEADER_BYTES = 1 << 24
MAX_NAME = 1000

Kind = Literal["download", "upload", "hello"]
Tensors = dict[str, NDArray[Any]]
LedgerHead = tuple[int, bytes]
"""How many rows a node's ledger of uploads has, and the chain of the last one (`fedssl.privacy.uploads.UploadLedger.head`)."""
_DTYPES = {"I32": "int32", "I64": "int64", "F32": "float32"}
_PARTS = ("rows", "columns", "values")
# Raw little-endian numbers. Flower's own "numpy.ndarray" means the .npy format, which costs a copy each way.
_STYPE = "fedssl.little-endian"


@dataclass(frozen=True)
class Hello:
    """What a node answers when the server asks who it is.

    ``users``: the numbers of the users it hosts, (U,). ``version``: of fedssl there. ``recipe_formats``: those it reads.
    """

    users: NDArray[np.int64]
    version: str = __version__
    recipe_formats: tuple[int, ...] = (RECIPE_FORMAT,)


# ---- bytes ----


def to_bytes(record: Download | Upload) -> bytes:
    """A record as safetensors; equal records give equal bytes. Raises WireError for a tensor of another dtype than the three."""
    header, tensors = _take_apart(record)
    return save(tensors, {"fedssl": header})


def download_from_bytes(data: bytes) -> Download:
    """The Download in ``data``. Raises WireError for anything else, and for another format number."""
    return _make_download(*_read_bytes(data))


def upload_from_bytes(data: bytes) -> Upload:
    """The Upload in ``data``. Raises WireError for anything else, and for another format number."""
    return _make_upload(*_read_bytes(data))


def _read_bytes(data: bytes) -> tuple[str, Tensors]:
    if len(data) < 8:
        raise WireError(f"record of {len(data)} bytes: shorter than the 8 bytes that say how long its header is; was the transfer cut?")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise WireError(f"record of {len(data)} bytes: claims a header of {length} (largest read: {MAX_HEADER_BYTES}); cut short, or not written by fedssl")
    try:
        header = json.loads(data[8 : 8 + length])["__metadata__"]["fedssl"]
        found = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise WireError(f"record of {len(data)} bytes: not a whole record of fedssl ({type(error).__name__}: {error}); was the transfer cut?") from None
    tensors: Tensors = {}
    for name, tensor in found:
        if tensor["dtype"] not in _DTYPES:
            raise WireError(f"record: tensor {_quote(name)} is {tensor['dtype']}; wanted one of {', '.join(_DTYPES)}")
        tensors[name] = _view(tensor["data"], _DTYPES[tensor["dtype"]], tuple(tensor["shape"]), name=name)
    return header, tensors


# ---- Flower records ----


def to_record_dict(record: Download | Upload) -> RecordDict:
    """A record for a Flower message. Raises WireError for a tensor of another dtype than the three."""
    return _to_flower(*_take_apart(record))


def with_users(content: RecordDict, users: NDArray[np.int64] | None) -> RecordDict:
    """The same Download for other users. The bytes of its weights are shared: encode once a round, then address each node."""
    other = RecordDict({name: record for name, record in content.items() if name != "users"})
    if users is not None:
        other["users"] = ArrayRecord({"users": _to_array(_plain(users, name="users"))})
    return other


def with_ledger_head(content: RecordDict, head: LedgerHead | None) -> RecordDict:
    """The same record, and beside it the head of a node's ledger of uploads: the newest that the server knows, or the node's own."""
    if head is None:
        return content
    return RecordDict({**content, "ledger": ConfigRecord({"rows": head[0], "chain": head[1]})})


def ledger_head_of(content: RecordDict) -> LedgerHead | None:
    """The head that came beside a record; None where none did. Raises WireError for what is none."""
    found = content.get("ledger")
    if found is None:
        return None
    rows, chain = (found.get("rows"), found.get("chain")) if isinstance(found, ConfigRecord) else (None, None)
    if type(rows) is not int or not 0 < rows < 2**63 or not isinstance(chain, bytes) or len(chain) != 32:
        raise WireError("message: the head of a ledger is a number of rows and 32 bytes; was it written by fedssl?")
    return rows, chain


def download_from_record_dict(content: RecordDict) -> Download:
    """The Download in ``content``; its tensors are read-only views of the message's bytes. Raises WireError for anything else."""
    return _make_download(*_read_flower(content))


def upload_from_record_dict(content: RecordDict) -> Upload:
    """The Upload in ``content``; its sums are read-only views of the message's bytes. Raises WireError for anything else."""
    return _make_upload(*_read_flower(content))


def hello_to_record_dict(hello: Hello) -> RecordDict:
    """A node's answer to the query ``hello``."""
    header = _header("hello", version=hello.version, recipe_formats=list(hello.recipe_formats))
    return _to_flower(header, {"users": _plain(hello.users, name="users")})


def hello_from_record_dict(content: RecordDict) -> Hello:
    """What a node said of itself. Raises WireError for anything else, and for another format number."""
    header, tensors = _read_flower(content)
    values = _read_header(header, "hello")
    users = _take_users(tensors, kind="hello")
    if users is None or tensors:
        raise WireError("hello: wanted the users this node hosts, and nothing else")
    formats = _get(values, "recipe_formats", list)
    if not all(type(number) is int for number in formats):
        raise WireError("hello: recipe_formats are not whole numbers")
    return Hello(users, version=_name(values, "version"), recipe_formats=tuple(formats))


def _to_flower(header: str, tensors: Tensors) -> RecordDict:
    # Users have a record of their own, so that `with_users` exchanges them without touching the weights.
    arrays = {name: _to_array(array) for name, array in tensors.items()}
    users = arrays.pop("users", None)
    content = RecordDict({"header": ConfigRecord({"json": header}), "tensors": ArrayRecord(arrays)})
    if users is not None:
        content["users"] = ArrayRecord({"users": users})
    return content


def _read_flower(content: RecordDict) -> tuple[str, Tensors]:
    header, arrays, users = content.get("header"), content.get("tensors"), content.get("users", ArrayRecord())
    if not (isinstance(header, ConfigRecord) and isinstance(arrays, ArrayRecord) and isinstance(users, ArrayRecord)):
        raise WireError(f"message with records {_quote(', '.join(content))}: wanted 'header' and 'tensors'; was it written by fedssl?")
    if "users" in arrays or set(users) - {"users"}:
        raise WireError("message: users belong into the record 'users', and nothing else does")
    text = header.get("json")
    if not isinstance(text, str) or len(text) > MAX_HEADER_BYTES:
        raise WireError(f"message: its header is missing, not a text, or longer than {MAX_HEADER_BYTES} characters")
    tensors: Tensors = {}
    for name, array in [*arrays.items(), *users.items()]:
        if array.stype != _STYPE or array.dtype not in _DTYPES.values():
            raise WireError(
                f"message: tensor {_quote(name)} is {_quote(array.dtype)} as {_quote(array.stype)}; wanted {', '.join(_DTYPES.values())} as {_STYPE}"
            )
        tensors[name] = _view(array.data, array.dtype, tuple(array.shape), name=name)
    return text, tensors


def _to_array(array: NDArray[Any]) -> Array:
    return Array(array.dtype.name, array.shape, _STYPE, array.tobytes())


# ---- header and tensors of each kind ----


def _take_apart(record: Download | Upload) -> tuple[str, Tensors]:
    """Header and tensors of a record, tensors in the order of their names."""
    tensors: Tensors = {}
    address = vars(record.address)
    if isinstance(record, Download):
        for name in sorted(record.tensors):
            tensors[f"tensor/{name}"] = _plain(record.tensors[name], name=name)
        if record.users is not None:
            tensors["users"] = _plain(record.users, name="users")
        clip = {} if record.clip_norm is None else {"clip_norm": float(record.clip_norm)}
        return _header("download", address=address, recipe=record.recipe.canonical, settled=record.settled, **clip), tensors
    shapes: dict[str, list[int]] = {}
    for name in sorted(record.sums):
        value = record.sums[name]
        if isinstance(value, SparseSum):
            shapes[name] = [int(size) for size in value.shape]
            for part in _PARTS:
                tensors[f"sparse/{part}/{name}"] = _plain(getattr(value, part), name=f"{name}.{part}")
        else:
            tensors[f"sum/{name}"] = _plain(value, name=name)
    return _header("upload", address=address, recipe=record.recipe, sparse=shapes), tensors


def _make_download(header: str, tensors: Tensors) -> Download:
    values = _read_header(header, "download")
    users = _take_users(tensors, kind="download")
    named = {name.removeprefix("tensor/"): tensors[name] for name in sorted(tensors) if name.startswith("tensor/")}
    if len(named) != len(tensors):
        raise WireError(f"download: {len(tensors) - len(named)} tensors that belong nowhere; was it written by fedssl?")
    settled = _number(values, "settled")
    clip_norm = _clip_norm(values)
    return Download(_address(values), _recipe(_get(values, "recipe", str)), named, users=users, settled=settled, clip_norm=clip_norm)


def _make_upload(header: str, tensors: Tensors) -> Upload:
    values = _read_header(header, "upload")
    sums: dict[str, Ints | SparseSum] = {}
    for name, shape in _get(values, "sparse", dict).items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 <= size < 2**31 for size in shape)):
            raise WireError(f"upload: the shape of sparse sum {_quote(name)} is not two whole numbers below 2^31")
        parts = [tensors.pop(f"sparse/{part}/{name}", None) for part in _PARTS]
        sums[name] = _sparse(parts, (shape[0], shape[1]), name=name)
    for name, array in tensors.items():
        label = name.removeprefix("sum/")
        if label == name or label in sums:
            raise WireError(f"upload: tensor {_quote(name)} belongs to no sum, or to one that is listed twice")
        if array.dtype.kind != "i":
            raise WireError(f"upload: sum {_quote(label)} is {array.dtype.name}; sums are whole numbers, int32 or int64")
        sums[label] = array
    return Upload(_address(values), _name(values, "recipe"), dict(sorted(sums.items())))


def _sparse(parts: list[NDArray[Any] | None], shape: tuple[int, int], *, name: str) -> SparseSum:
    """The matrix of three tensors, or a WireError where it is not sorted, repeats a cell, or leaves its shape."""
    rows, columns, values = parts
    if rows is None or columns is None or values is None:
        raise WireError(f"upload: sparse sum {_quote(name)} lacks its rows, columns or values")
    if not (rows.dtype == columns.dtype == np.int32 and values.dtype.kind == "i" and rows.ndim == 1 and rows.shape == columns.shape == values.shape):
        raise WireError(
            f"upload: rows, columns and values of sparse sum {_quote(name)} differ in length or are not whole numbers (int32, int32, int32 or int64)"
        )
    if len(rows):
        if min(rows.min(), columns.min()) < 0 or rows.max() >= shape[0] or columns.max() >= shape[1]:
            raise WireError(f"upload: sparse sum {_quote(name)} has cells outside its shape {shape}")
        cells = rows.astype(np.int64) * shape[1] + columns
        if not (cells[1:] > cells[:-1]).all():
            raise WireError(f"upload: cells of sparse sum {_quote(name)} are not sorted by (row, column), or one comes twice")
    return SparseSum(rows, columns, values, shape)


def _take_users(tensors: Tensors, *, kind: Kind) -> NDArray[np.int64] | None:
    users = tensors.pop("users", None)
    if users is not None and (users.dtype != np.int64 or users.ndim != 1):
        raise WireError(f"{kind}: users are {users.dtype.name} of shape {users.shape}; wanted int64 of shape (U,)")
    return users


# ---- small checked readers ----


def _header(kind: Kind, **values: object) -> str:
    return json.dumps({"format": WIRE_FORMAT, "kind": kind, **values}, sort_keys=True, separators=(",", ":"))


def _read_header(header: object, wanted: Kind) -> Mapping[str, Any]:
    try:
        values = json.loads(header) if isinstance(header, str) else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise WireError(f"{wanted}: its header is not JSON with a format number; was it written by fedssl?")
    number, kind = values["format"], values.get("kind")
    if number != WIRE_FORMAT:
        advice = "install the fedssl that wrote it" if number > WIRE_FORMAT else "the sender's fedssl is too old, upgrade it"
        raise WireError(f"{wanted}: wire format {number}, this version reads {WIRE_FORMAT}; {advice}", "version")
    if kind != wanted:
        raise WireError(f"{wanted}: came a record of kind {_quote(kind)}; server and node mix up who sends what")
    return values


def _address(values: Mapping[str, Any]) -> Address:
    fields = _get(values, "address", dict)
    return Address(
        run=_name(fields, "run"),
        phase=_name(fields, "phase"),
        round=_number(fields, "round"),
        attempt=_number(fields, "attempt"),
        exchange=_number(fields, "exchange"),
    )


# A run has one recipe, and it arrives in every Download of every node.
@lru_cache(maxsize=16)
def _recipe(text: str) -> Recipe:
    try:
        recipe = read_recipe(text, where="download")
        is_canonical = recipe.canonical == text
    except (ConfigError, ValueError, RecursionError) as error:
        raise WireError(f"download: its recipe cannot be read ({error})") from None
    if not is_canonical:
        raise WireError("download: its recipe reads otherwise here, so its hash would too; install one version of fedssl on server and nodes")
    return recipe


def _get(values: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(values.get(name), kind):
        raise WireError(f"record: its header has no {name}, or not as {kind.__name__}; was it written by fedssl?")
    return values[name]


def _number(values: Mapping[str, Any], name: str) -> int:
    number = values.get(name)
    if type(number) is not int or not 0 <= number < 2**63:
        raise WireError(f"record: {name} is not a whole number from 0 to 2^63")
    return number


def _clip_norm(values: Mapping[str, Any]) -> float | None:
    clip = values.get("clip_norm")
    if clip is not None and (type(clip) is not float or not SMALLEST_CLIP <= clip <= LARGEST_CLIP):
        raise WireError(f"download: clip_norm is no number from {SMALLEST_CLIP:g} to {LARGEST_CLIP:g}")
    return clip


def _name(values: Mapping[str, Any], name: str) -> str:
    text: str = _get(values, name, str)
    if len(text) > MAX_NAME or not text.isprintable():
        raise WireError(f"record: {name} is longer than {MAX_NAME} characters, or holds characters that cannot be printed")
    return text


def _quote(value: object) -> str:
    """What came, for an error message: short and printable, whatever it was."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(array: NDArray[Any], *, name: str) -> NDArray[Any]:
    """Contiguous and little endian, of the same numbers; no copy where it is so already."""
    if array.dtype.name not in _DTYPES.values():
        raise WireError(f"{name}: dtype {array.dtype.name} does not travel; wanted {', '.join(_DTYPES.values())}")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _view(data: bytes | bytearray, dtype: str, shape: tuple[int, ...], *, name: str) -> NDArray[Any]:
    """The numbers in ``data``, not copied."""
    kind = np.dtype(dtype).newbyteorder("<")
    is_shape = len(shape) <= 32 and all(type(size) is int and size >= 0 for size in shape)
    # numpy refuses (0, 2^62, 2^62) too, although it holds nothing.
    if not is_shape or len(data) != math.prod(shape) * kind.itemsize or math.prod(size or 1 for size in shape) * kind.itemsize >= 2**63:
        raise WireError(f"record: tensor {_quote(name)} has {len(data)} bytes, which is not {dtype} of shape {_quote(shape)}")
    return np.frombuffer(data, kind).reshape(shape)
