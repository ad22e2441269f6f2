"""What the issue says of admission, a sentence of it at a time: whatever is refused is counted by kind, and the model is what it is without that node."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedssl_server.exchange import MOST_WORDS
from fedssl_simulations.grids import Handler, InProcessGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from small import PLAN, small_config, small_dataset, train

from fedssl import wire
from fedssl.records import SparseSum, Upload
from fedssl.server_round import State

PIECES = [np.arange(0, 8), np.arange(8, 16), np.arange(16, 24)]
CLIPPED = small_config({"server": {"rounds": 1, "cohort": 24}}, {"privacy": {"clip_norm": 0.2}, "system": {"users_per_chunk": 1}})
Answer = Callable[[Message, Upload], RecordDict | Error]


def node_2_says(answer: Answer) -> Callable[[Handler], Handler]:
    """Node 2 sends whatever it likes; it is shown what it was asked, and what an honest node would say."""

    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            reply = handler(message, context)
            if context.node_id != 2:
                return reply
            return Message(answer(message, wire.upload_from_record_dict(reply.content)), reply_to=message)

        return handle

    return tamper


def changed(change: Callable[[Upload], Upload]) -> Answer:
    return lambda message, upload: wire.to_record_dict(change(upload))


def with_header(**values: Any) -> Answer:
    """An honest answer with other values in its header."""

    def answer(message: Message, upload: Upload) -> RecordDict:
        content = wire.to_record_dict(upload)
        header = json.loads(str(content["header"]["json"])) | values
        return RecordDict({**content, "header": ConfigRecord({"json": json.dumps(header)})})

    return answer


def with_tensor(name: str, tensor: Array) -> Answer:
    def answer(message: Message, upload: Upload) -> RecordDict:
        content = wire.to_record_dict(upload)
        return RecordDict({**content, "tensors": ArrayRecord({**content["tensors"], name: tensor})})

    return answer


def raw(numbers: np.ndarray, stype: str = "fedssl.little-endian") -> Array:
    return Array(numbers.dtype.name, numbers.shape, stype, numbers.tobytes())


def the_model_without_node_2(config: Any = CLIPPED, **more: Any) -> State:
    return train(config, small_dataset(), shards=PIECES, owner_U=np.repeat(np.array([0, -1, 2], dtype=np.int32), 8), **more)[0]


def assert_refused(answer: Answer, kind: str, words: str = "") -> None:
    state, facts = train(CLIPPED, small_dataset(), shards=PIECES, tamper=node_2_says(answer))
    assert facts[0].refused.keys() == {2} and words in facts[0].refused[2]
    assert facts[0].refused_for == {kind: 1}
    assert torch.equal(state.weights_P, the_model_without_node_2().weights_P)
    assert len(facts[0].refused[2]) <= MOST_WORDS


WEIGHTS = 40 * 8  # About the size of the update; its exact shape is not what these are refused for.


@pytest.mark.parametrize("number", [0, 2])
def test_format_an_upload_of_an_older_or_a_newer_version_of_the_protocol_is_refused(number: int):
    assert_refused(with_header(format=number), "version", f"wire format {number}, this version reads 1")


@pytest.mark.parametrize("header", [{"format": "1"}, {"kind": "download"}, {"address": "here"}, {"sparse": {"update": [9, 9]}}, {"recipe": 5}])
def test_format_what_is_not_written_as_an_upload_is_refused(header: dict[str, Any]):
    assert_refused(with_header(**header), "form")


def test_format_an_upload_that_is_empty_or_of_other_records_is_refused():
    assert_refused(lambda message, upload: RecordDict(), "form")
    assert_refused(lambda message, upload: RecordDict({"header": ArrayRecord(), "tensors": ConfigRecord()}), "form")


@pytest.mark.parametrize("name", ["history", "head", "items", "users", "Update", "update "])
def test_declared_names_a_sum_of_any_other_name_is_refused(name: str):
    assert_refused(changed(lambda upload: replace(upload, sums={**upload.sums, name: np.array([3, 1], dtype=np.int32)})), "names", "not declared")


@pytest.mark.parametrize("name", ["update", "weight", "loss"])
def test_declared_names_a_sum_that_is_left_out_is_refused(name: str):
    assert_refused(changed(lambda upload: replace(upload, sums={other: value for other, value in upload.sums.items() if other != name})), "names", "missing")


@pytest.mark.parametrize("shape", ["shorter", "longer", "axis", "number"])
def test_shapes_a_sum_of_another_shape_is_refused(shape: str):
    reshape = {"shorter": lambda u: u[:-1], "longer": lambda u: np.append(u, u[:1]), "axis": lambda u: u[None], "number": lambda u: u[0].reshape(())}[shape]
    assert_refused(changed(lambda upload: replace(upload, sums={**upload.sums, "update": reshape(upload.sums["update"])})), "form", "has shape")


@pytest.mark.parametrize("dtype", ["float64", "float16", "complex64", "uint8", "int16", "object", "float32"])
def test_dtype_a_sum_that_is_not_of_whole_numbers_of_32_or_64_bits_is_refused(dtype: str):
    numbers = np.zeros(WEIGHTS, dtype="int64" if dtype == "object" else dtype)
    assert_refused(with_tensor("sum/update", Array(dtype, numbers.shape, "fedssl.little-endian", numbers.tobytes())), "form")


def test_dtype_a_sum_whose_bytes_are_not_of_its_shape_or_are_pickled_is_refused():
    assert_refused(with_tensor("sum/update", Array("int64", (WEIGHTS,), "fedssl.little-endian", b"12345")), "form")
    assert_refused(with_tensor("sum/update", raw(np.zeros(WEIGHTS, np.int64), stype="numpy.ndarray")), "form")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e30])
def test_finite_nan_infinity_and_1e30_cannot_be_said(number: float):
    for dtype in (np.float32, np.float64):
        assert_refused(with_tensor("sum/update", raw(np.full(WEIGHTS, number, dtype=dtype))), "form")


@pytest.mark.parametrize("number", [10**9, 2**62, -(2**63)])
def test_finite_the_largest_whole_numbers_are_refused(number: int):
    assert_refused(
        changed(lambda upload: replace(upload, sums={**upload.sums, "update": np.full_like(upload.sums["update"], number, np.int64)})), "coordinates"
    )


FEW = small_config(
    {"server": {"rounds": 1, "cohort": 6, "sampling": "poisson"}}, {"privacy": {"clip_norm": 0.2}, "system": {"users_per_chunk": 1}, "local": {"lr": 50.0}}
)


def test_norm_the_sum_of_more_users_than_were_asked_of_a_node_is_refused_though_it_hosts_them():
    """Local steps so long that every update is as long as the clip, and the same for all: all eight users of node 2 make more than those who were asked."""

    def all_of_mine(message: Message, upload: Upload) -> RecordDict:
        download = wire.download_from_record_dict(message.content)
        assert download.users is not None and 0 < len(download.users) < 8
        factor = 8 / len(download.users)
        return wire.to_record_dict(replace(upload, sums={**upload.sums, "update": (upload.sums["update"] * factor).astype(np.int64)}))

    state, facts = train(FEW, small_dataset(), shards=PIECES, tamper=node_2_says(all_of_mine))
    assert facts[0].refused_for in ({"norm": 1}, {"coordinates": 1}) and "user(s)" in facts[0].refused[2]
    assert torch.equal(state.weights_P, the_model_without_node_2(FEW).weights_P)


def one_long_coordinate(users_worth: float) -> Answer:
    def answer(message: Message, upload: Upload) -> RecordDict:
        update = np.zeros_like(upload.sums["update"], dtype=np.int64)
        update[5] = int(users_worth * 2**24)
        return wire.to_record_dict(replace(upload, sums={**upload.sums, "update": update}))

    return answer


def test_norm_under_a_plan_what_is_one_step_longer_than_the_clip_of_those_asked_is_refused(tmp_path: Path):
    config = small_config(PLAN, {"privacy": {"clip_norm": 0.5}, "server": {"cohort": 24, "rounds": 1}, "system": {"users_per_chunk": 1}})
    folders = [tmp_path / name for name in ("longest", "longer", "without")]
    for folder in folders:
        folder.mkdir()
    # All eight users of each node are asked: rate 1. The clip is 2^24 steps.
    _, passed = train(config, small_dataset(), shards=PIECES, folder=folders[0], tamper=node_2_says(one_long_coordinate(8.0)))
    assert passed[0].refused_for == {}
    state, refused = train(config, small_dataset(), shards=PIECES, folder=folders[1], tamper=node_2_says(one_long_coordinate(8.0 + 2**-24)))
    assert refused[0].refused_for in ({"norm": 1}, {"coordinates": 1})
    assert torch.equal(state.weights_P, the_model_without_node_2(config, folder=folders[2]).weights_P)


class TwiceGrid(InProcessGrid):
    """Every answer comes twice."""

    def pull_messages(self, message_ids: Any) -> list[Message]:
        return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]


def test_one_a_round_the_second_answer_of_a_node_is_passed_over_and_counted():
    state, facts = train(CLIPPED, small_dataset(), shards=PIECES, grid=TwiceGrid)
    assert facts[0].refused == {} and facts[0].refused_for == {"unasked": 3} and facts[0].weight == 24.0
    assert torch.equal(state.weights_P, train(CLIPPED, small_dataset(), shards=PIECES)[0].weights_P)


def test_replay_what_was_good_in_one_round_is_refused_in_the_next():
    config = small_config({"server": {"rounds": 2, "cohort": 24}}, {"privacy": {"clip_norm": 0.2}, "system": {"users_per_chunk": 1}})
    kept: list[RecordDict] = []

    def again(message: Message, upload: Upload) -> RecordDict:
        kept.append(wire.to_record_dict(upload))
        return kept[0]

    states: list[State] = []
    state, facts = train(config, small_dataset(), shards=PIECES, tamper=node_2_says(again), on_round=lambda state, facts: states.append(state))
    assert [fact.refused_for for fact in facts] == [{}, {"exchange": 1}]
    assert torch.equal(state.weights_P, the_model_without_node_2(config, state=states[0]).weights_P)


@pytest.mark.parametrize("place", [{"round": 2}, {"attempt": 1}, {"exchange": 1}, {"phase": "counts"}, {"run": "another"}])
def test_replay_an_upload_for_another_round_or_run_is_refused(place: dict[str, Any]):
    assert_refused(changed(lambda upload: replace(upload, address=replace(upload.address, **place))), "exchange", "another exchange")


def test_an_upload_after_another_recipe_is_refused():
    assert_refused(changed(lambda upload: replace(upload, recipe="0" * 64)), "recipe")


@pytest.mark.parametrize(
    ("name", "numbers", "kind"), [("update", 100_000_000 // 8, "form"), ("x" * 100_000_000, 1, "names")], ids=["a sum of 100 MB", "a name of 100 MB"]
)
def test_an_upload_of_100_mb_is_refused_in_few_words(name: str, numbers: int, kind: str):
    assert_refused(with_tensor(f"sum/{name}", raw(np.zeros(numbers, dtype=np.int64))), kind)


def test_counts_of_100_mb_are_refused_for_their_shape_and_for_cells_that_come_twice():
    config = small_config({"counts": {}, "server": {"rounds": 1}})
    cells = 100_000_000 // 16

    def of(shape: tuple[int, int]) -> Answer:
        rows, columns = np.divmod(np.arange(cells), shape[1])
        matrix = SparseSum((rows % shape[0]).astype(np.int32), columns.astype(np.int32), np.ones(cells, np.int64), shape)
        return lambda message, upload: wire.to_record_dict(replace(upload, sums={"counts": matrix}) if upload.address.phase == "counts" else upload)

    for shape, words in (((37, 37), "comes twice"), ((5000, 5000), "wanted (37, 37)")):
        _, facts = train(config, small_dataset(), shards=PIECES, tamper=node_2_says(of(shape)))
        assert facts[0].refused_for == {"form": 1} and words in facts[0].refused[2]
        assert facts[1].refused_for == {}


def test_what_a_node_says_of_its_failure_is_short_and_on_one_line():
    words = "item 17\n" * 100_000
    _, facts = train(CLIPPED, small_dataset(), shards=PIECES, tamper=node_2_says(lambda message, upload: Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, words)))
    assert facts[0].refused_for == {"failed": 1}
    assert "\n" not in facts[0].refused[2] and len(facts[0].refused[2]) <= MOST_WORDS


def test_counts_of_what_was_refused_add_up_by_kind_and_an_honest_node_is_in_none():
    config = small_config({"server": {"rounds": 1, "cohort": 24}}, {"privacy": {"clip_norm": 0.2}, "system": {"users_per_chunk": 1}})
    pieces = np.array_split(np.arange(24), 6)
    lies: dict[int, Answer] = {
        1: with_header(format=0),
        2: changed(lambda upload: replace(upload, recipe="0" * 64)),
        3: with_header(format=9),
        4: changed(lambda upload: replace(upload, sums={})),
        5: lambda message, upload: Error(ErrorCode.UNKNOWN, "no"),
    }

    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            reply = handler(message, context)
            lie = lies.get(context.node_id)
            return Message(lie(message, wire.upload_from_record_dict(reply.content)), reply_to=message) if lie else reply

        return handle

    _, facts = train(config, small_dataset(), shards=pieces, tamper=tamper)
    assert facts[0].refused_for == {"version": 2, "recipe": 1, "names": 1, "failed": 1}
    assert (facts[0].refused.keys(), facts[0].nodes, facts[0].nodes_used) == ({1, 2, 3, 4, 5}, 6, 1)
    assert sum(facts[0].refused_for.values()) == len(facts[0].refused)
