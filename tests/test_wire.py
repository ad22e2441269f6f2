"""Records survive their way as bytes and as Flower records, and whatever else arrives is a WireError."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from safetensors.numpy import save

from fedssl import wire
from fedssl.config import EncoderConfig, HeadConfig, LocalConfig, PrivacyConfig, ServerConfig, TaskConfig
from fedssl.errors import WireError
from fedssl.recipe import Recipe
from fedssl.records import Address, Download, SparseSum, Upload

ADDRESS = Address("run-1", "training", 3, attempt=1, exchange=0)
RECIPE = Recipe(
    seed=1,
    num_items=5,
    catalogue="ab" * 32,
    encoder=EncoderConfig(),
    task=(TaskConfig(name="next-item"),),
    counts=None,
    head=HeadConfig(),
    local=LocalConfig(),
    server=ServerConfig(),
    privacy=PrivacyConfig(),
)
COUNTS = SparseSum(np.array([0, 2, 2], np.int32), np.array([4, 0, 1], np.int32), np.array([1, -2, 3], np.int64), (5, 5))
DOWNLOAD = Download(ADDRESS, RECIPE, {"items": np.arange(6, dtype=np.float32).reshape(3, 2), "bias": np.ones((), np.float32)}, np.array([4, 9]), settled=2)
UPLOAD = Upload(ADDRESS, RECIPE.hash, {"update/items": np.arange(4).reshape(2, 2), "users": np.ones(1, np.int32), "counts": COUNTS})

names = st.text(max_size=12)
addresses = st.builds(Address, st.text("abc-0 ", max_size=8), st.sampled_from(["counts", "training"]), *[st.integers(0, 2**62)] * 3)
leaves = st.sampled_from([np.float32, np.int32, np.int64]).flatmap(lambda kind: arrays(kind, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))
sums = st.sampled_from([np.int32, np.int64]).flatmap(lambda kind: arrays(kind, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))


@st.composite
def sparse_sums(draw: st.DrawFn) -> SparseSum:
    cells = sorted(draw(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 3)))))
    values = draw(arrays(draw(st.sampled_from([np.int32, np.int64])), len(cells)))
    return SparseSum(np.array([r for r, _ in cells], np.int32), np.array([c for _, c in cells], np.int32), values, (7, 4))


users = st.none() | arrays(np.int64, st.integers(0, 4))
clips = st.none() | st.floats(1e-12, 1e12)
downloads = st.builds(Download, addresses, st.just(RECIPE), st.dictionaries(names, leaves, max_size=3), users=users, settled=st.integers(0, 9), clip_norm=clips)
uploads = st.builds(Upload, addresses, st.just(RECIPE.hash), st.dictionaries(names, sums | sparse_sums(), max_size=3))


def same(left: object, right: object) -> bool:
    """Equal in every bit, dtype and shape."""
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, Download | Upload | SparseSum):
        return type(left) is type(right) and same(vars(left), vars(right))
    return left == right


@given(downloads)
@settings(max_examples=60, deadline=None)
def test_a_download_survives_both_ways_bit_for_bit(download: Download):
    assert same(wire.download_from_bytes(wire.to_bytes(download)), download)
    assert same(wire.download_from_record_dict(wire.to_record_dict(download)), download)


@given(uploads)
@settings(max_examples=60, deadline=None)
def test_an_upload_survives_both_ways_bit_for_bit(upload: Upload):
    assert same(wire.upload_from_bytes(wire.to_bytes(upload)), upload)
    assert same(wire.upload_from_record_dict(wire.to_record_dict(upload)), upload)


def test_equal_records_give_equal_bytes_whatever_the_order_of_their_names():
    turned = Upload(ADDRESS, RECIPE.hash, dict(reversed(UPLOAD.sums.items())))
    assert wire.to_bytes(turned) == wire.to_bytes(UPLOAD)
    assert wire.to_bytes(wire.upload_from_bytes(wire.to_bytes(UPLOAD))) == wire.to_bytes(UPLOAD)
    assert list(wire.upload_from_bytes(wire.to_bytes(turned)).sums) == list(wire.upload_from_record_dict(wire.to_record_dict(UPLOAD)).sums)


def test_arrays_that_are_not_contiguous_or_not_little_endian_travel_by_their_numbers():
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    odd: dict[str, NDArray[Any]] = {"columns": grid[:, ::2], "turned": grid.T, "big": grid.astype(">f4")}
    download = Download(ADDRESS, RECIPE, odd)
    for back in (wire.download_from_bytes(wire.to_bytes(download)), wire.download_from_record_dict(wire.to_record_dict(download))):
        assert back.tensors["columns"].tolist() == [[0, 2], [4, 6], [8, 10]]
        assert back.tensors["turned"].tolist() == grid.T.tolist()
        assert back.tensors["big"].tolist() == grid.tolist()


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.uint8, np.int16, np.complex64, np.bool_, object])
def test_other_dtypes_do_not_travel(kind: Any):
    with pytest.raises(WireError, match=r"items: dtype \w+ does not travel; wanted int32, int64, float32"):
        wire.to_bytes(Download(ADDRESS, RECIPE, {"items": np.zeros(2, kind)}))
    with pytest.raises(WireError, match="does not travel"):
        wire.to_record_dict(Download(ADDRESS, RECIPE, {"items": np.zeros(2, kind)}))


def test_a_sum_of_floats_is_refused_on_arrival():
    sent = Upload(ADDRESS, RECIPE.hash, {"loss": np.zeros(2, np.float32)})  # type: ignore[dict-item]
    with pytest.raises(WireError, match="sum 'loss' is float32; sums are whole numbers"):
        wire.upload_from_bytes(wire.to_bytes(sent))


def test_tensors_of_a_message_share_its_bytes():
    content = wire.to_record_dict(DOWNLOAD)
    arrays = content["tensors"]
    assert isinstance(arrays, ArrayRecord)
    seen = wire.download_from_record_dict(content).tensors["items"]
    assert np.shares_memory(seen, np.frombuffer(arrays["tensor/items"].data, np.float32))
    assert not seen.flags.writeable


def test_a_download_addressed_to_others_shares_the_bytes_of_its_weights():
    content = wire.to_record_dict(DOWNLOAD)
    other = wire.with_users(content, np.array([7]))
    assert wire.download_from_record_dict(other).users == np.array([7])
    assert wire.download_from_record_dict(wire.with_users(content, None)).users is None
    assert wire.download_from_record_dict(content).users is not None
    left, right = (wire.download_from_record_dict(one).tensors["items"] for one in (content, other))
    assert np.shares_memory(left, right)


def test_a_hello_survives_and_is_not_taken_for_a_download():
    hello = wire.Hello(np.array([3, 5]), version="9.9", recipe_formats=(1, 2))
    back = wire.hello_from_record_dict(wire.hello_to_record_dict(hello))
    assert (back.users.tolist(), back.version, back.recipe_formats) == ([3, 5], "9.9", (1, 2))
    with pytest.raises(WireError, match="download: came a record of kind 'hello'"):
        wire.download_from_record_dict(wire.hello_to_record_dict(hello))
    with pytest.raises(WireError, match="hello: came a record of kind 'upload'"):
        wire.hello_from_record_dict(wire.to_record_dict(UPLOAD))


def test_an_upload_where_a_download_was_wanted_is_named():
    with pytest.raises(WireError, match="download: came a record of kind 'upload'"):
        wire.download_from_bytes(wire.to_bytes(UPLOAD))
    with pytest.raises(WireError, match="upload: came a record of kind 'download'"):
        wire.upload_from_record_dict(wire.to_record_dict(DOWNLOAD))


def headed(record: Download | Upload, **changes: object) -> bytes:
    """The bytes of a record with some values of its header changed."""
    header, tensors = wire._take_apart(record)
    return save(tensors, {"fedssl": json.dumps({**json.loads(header), **changes})})


def test_another_format_number_says_who_must_upgrade():
    with pytest.raises(WireError, match="wire format 2, this version reads 1; install the fedssl that wrote it"):
        wire.download_from_bytes(headed(DOWNLOAD, format=2))
    with pytest.raises(WireError, match="wire format 0, this version reads 1; the sender's fedssl is too old"):
        wire.download_from_bytes(headed(DOWNLOAD, format=0))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": True},
        {"format": "1"},
        {"format": None},
        {"kind": None},
        {"kind": ["download"] * 1000},
        {"address": None},
        {"address": {}},
        {"address": {"run": "r", "phase": "p", "round": -1, "attempt": 0, "exchange": 0}},
        {"address": {"run": "r", "phase": "p", "round": 10**30, "attempt": 0, "exchange": 0}},
        {"address": {"run": "r\n", "phase": "p", "round": 1, "attempt": 0, "exchange": 0}},
        {"address": {"run": "\ud800", "phase": "p", "round": 1, "attempt": 0, "exchange": 0}},
        {"address": {"run": "r" * 2000, "phase": "p", "round": 1, "attempt": 0, "exchange": 0}},
        {"settled": 1.5},
        *({"clip_norm": wrong} for wrong in (0.0, -1.0, 1e-13, 1e13, float("nan"), float("inf"), 1, "1", True)),
        {"recipe": ""},
        {"recipe": "[" * 100_000},
        {"recipe": RECIPE.canonical.replace(":", ": ")},
        {"recipe": RECIPE.canonical.replace('"num_items":5', '"num_items":0')},
        {"recipe": RECIPE.canonical.replace('"format":1', '"format":2')},
    ],
)
def test_a_header_with_a_wrong_value_is_a_wire_error(changes: dict[str, object]):
    with pytest.raises(WireError) as caught:
        wire.download_from_bytes(headed(DOWNLOAD, **changes))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["rows", "columns", "values"])
def test_a_sparse_sum_without_one_of_its_parts_is_a_wire_error(name: str):
    header, tensors = wire._take_apart(UPLOAD)
    del tensors[f"sparse/{name}/counts"]
    with pytest.raises(WireError, match="sparse sum 'counts' lacks its rows, columns or values"):
        wire.upload_from_bytes(save(tensors, {"fedssl": header}))


@pytest.mark.parametrize(
    ("rows", "columns", "what"),
    [
        ([1, 0], [0, 0], "not sorted"),
        ([1, 1], [2, 2], "not sorted"),
        ([0, 5], [0, 0], "outside"),
        ([0, 0], [-1, 0], "outside"),
        ([0], [0, 1], "differ in length"),
    ],
)
def test_a_sparse_sum_that_breaks_its_promise_is_a_wire_error(rows: list[int], columns: list[int], what: str):
    broken = SparseSum(np.array(rows, np.int32), np.array(columns, np.int32), np.ones(len(rows), np.int32), (5, 5))
    with pytest.raises(WireError, match=what):
        wire.upload_from_bytes(wire.to_bytes(Upload(ADDRESS, RECIPE.hash, {"counts": broken})))


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 2**24 + 1, 200])
def test_an_absurd_header_size_is_refused_before_anything_is_read(length: int):
    with pytest.raises(WireError):
        wire.download_from_bytes(struct.pack("<Q", length) + b"{}" * 60)


WHOLE = wire.to_bytes(UPLOAD)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: struct.pack("<Q", len(tail)) + tail))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_a_wire_error(data: bytes):
    for read in (wire.download_from_bytes, wire.upload_from_bytes):
        with pytest.raises(WireError):
            read(data)


@given(st.integers(0, len(WHOLE) - 1))
@settings(max_examples=200, deadline=None)
def test_a_cut_record_is_a_wire_error(length: int):
    with pytest.raises(WireError):
        wire.upload_from_bytes(WHOLE[:length])


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=500, deadline=None)
def test_flipped_bytes_give_a_record_or_a_wire_error(flips: list[tuple[int, int]]):
    data = bytearray(WHOLE)
    for place, value in flips:
        data[place] = value
    try:
        upload = wire.upload_from_bytes(bytes(data))
    except WireError:
        return
    wire.to_bytes(upload)


@given(st.sampled_from([DOWNLOAD, UPLOAD]), st.data())
@settings(max_examples=200, deadline=None)
def test_a_message_that_was_tampered_with_gives_a_record_or_a_wire_error(record: Download | Upload, data: st.DataObject):
    content = wire.to_record_dict(record)
    held = content["tensors"]
    assert isinstance(held, ArrayRecord)
    name = data.draw(st.sampled_from(sorted(held)))
    shape = data.draw(st.lists(st.integers(-2, 2**40) | st.integers(0, 4), max_size=40).map(tuple))
    dtype, style = data.draw(st.sampled_from(["float32", "int32", "int64", "object", "f4,f4", "O"])), data.draw(st.sampled_from([wire._STYPE, "numpy.ndarray"]))
    held[data.draw(st.sampled_from([name, "users", "tensor/new", "sparse/rows/counts"]))] = Array(dtype, shape, style, data.draw(st.binary(max_size=40)))
    for read in (wire.download_from_record_dict, wire.upload_from_record_dict):
        try:
            read(content)
        except WireError:
            continue


@pytest.mark.parametrize("shape", [(0, 2**31, 2**31, 2**31), (0, 2**62), (0, -1), (2**63,), (1,) * 33, (1, 1)])
def test_a_shape_that_no_array_can_have_is_a_wire_error(shape: tuple[int, ...]):
    content = wire.to_record_dict(DOWNLOAD)
    held = content["tensors"]
    assert isinstance(held, ArrayRecord)
    held["tensor/items"] = Array("float32", shape, wire._STYPE, b"")
    with pytest.raises(WireError, match="tensor 'tensor/items' has 0 bytes"):
        wire.download_from_record_dict(content)
    metadata = {"fedssl": wire._take_apart(DOWNLOAD)[0]}
    header = json.dumps({"__metadata__": metadata, "tensor/items": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    with pytest.raises(WireError):
        wire.download_from_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"header": ConfigRecord(), "tensors": ArrayRecord()}),
        RecordDict({"header": ConfigRecord({"json": 3}), "tensors": ArrayRecord()}),
        RecordDict({"header": ConfigRecord({"json": "[" * 100_000}), "tensors": ArrayRecord()}),
        RecordDict({"header": ArrayRecord(), "tensors": ConfigRecord()}),
    ],
)
def test_a_message_without_its_parts_is_a_wire_error(content: RecordDict):
    for read in (wire.download_from_record_dict, wire.upload_from_record_dict, wire.hello_from_record_dict):
        with pytest.raises(WireError):
            read(content)


def test_the_wire_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import fedssl.wire"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
