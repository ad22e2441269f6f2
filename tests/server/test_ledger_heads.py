"""A device whose disk was put back to an older one is noticed by who knows its ledger's newest head, and refused."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import CATALOGUE, SERVER, make_device, write_policy
from device import recipe_of as recipe_of_device
from fedssl_client.app import app
from fedssl_client.device_folder import training_socket
from fedssl_client.policy import read_policy
from fedssl_client.service import serving
from fedssl_server.ledger_heads import LedgerHeads, digest, note_key
from fedssl_server.serve import serve
from fedssl_simulations.grids import Handler, InProcessGrid
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from small import small_config, small_dataset, train

from fedssl import wire
from fedssl.catalogue import write_catalogue
from fedssl.errors import LedgerBehind, RunFolderError, UploadRefused, WireError
from fedssl.privacy.uploads import open_device

A, B = b"a" * 32, b"b" * 32
PIECES = [np.arange(0, 8), np.arange(8, 16), np.arange(16, 24)]
CONFIG = small_config({"server": {"rounds": 3, "cohort": 24}}, {"privacy": {"clip_norm": 0.2}, "system": {"users_per_chunk": 1}})


def test_a_head_that_grows_or_stays_the_same_is_taken_and_an_older_one_refused(tmp_path: Path):
    heads = LedgerHeads(tmp_path / "heads.json")
    heads.take(1, (4, A))
    heads.take(1, (4, A))
    for older in ((3, A), (3, B), (4, B), None):
        with pytest.raises(UploadRefused, match=r"older one|no head of its ledger") as error:
            heads.take(1, older)
        assert error.value.kind == "ledger"
    heads.take(1, (6, B))
    assert heads.known(1) == (6, B)


def test_a_node_that_never_sent_a_head_needs_none(tmp_path: Path):
    heads = LedgerHeads(tmp_path / "heads.json")
    heads.take(2, None)
    heads.save()
    assert heads.known(2) is None and not (tmp_path / "heads.json").exists()


def test_heads_outlive_the_process_and_a_file_that_was_spoiled_is_not_passed_over(tmp_path: Path):
    path = tmp_path / "heads.json"
    heads = LedgerHeads(path)
    heads.take(2**63 + 5, (9, A))
    heads.save()
    assert LedgerHeads(path).known(2**63 + 5) == (9, A)
    for spoiled in ("", "[1]", '{"1": 5}', '{"1": [1, "xy"]}', path.read_text()[:-5]):
        path.write_text(spoiled)
        with pytest.raises(RunFolderError, match=r"heads.json: cannot be read"):
            LedgerHeads(path)


def test_a_head_goes_by_the_nodes_key_whatever_number_flower_gives_it_next(tmp_path: Path):
    (tmp_path / "anna.pub").write_text("ecdsa-sha2-nistp384 AAAA anna@phone\n")
    (tmp_path / "ben.pub").write_text("ecdsa-sha2-nistp384 BBBB ben@phone\n")
    note_key(tmp_path, "7", digest(tmp_path / "anna.pub"))
    heads = LedgerHeads(tmp_path / "ledger_heads.json")
    heads.take(7, (4, A))
    heads.take(5, (2, B))
    heads.save()
    # A SuperLink without memory: other numbers, the same keys, one of which is called otherwise now.
    (tmp_path / "anna.pub").write_text("ecdsa-sha2-nistp384 AAAA anna\n")
    note_key(tmp_path, "8", digest(tmp_path / "anna.pub"))
    note_key(tmp_path, "9", digest(tmp_path / "ben.pub"))
    heads = LedgerHeads(tmp_path / "ledger_heads.json")
    assert (heads.known(7), heads.known(8), heads.known(9), heads.known(5)) == ((4, A), (4, A), None, (2, B))
    with pytest.raises(UploadRefused, match="older one"):
        heads.take(8, (3, A))
    (tmp_path / "node_keys.json").write_text("[")
    with pytest.raises(RunFolderError, match=r"node_keys.json: cannot be read"):
        LedgerHeads(tmp_path / "ledger_heads.json")


@pytest.mark.parametrize("head", [{"rows": 0, "chain": A}, {"rows": -1, "chain": A}, {"rows": 1, "chain": b"short"}, {"rows": "1", "chain": A}, {"rows": 1}])
def test_what_is_no_head_is_refused(head: dict[str, Any]):
    with pytest.raises(WireError, match="the head of a ledger is a number of rows and 32 bytes"):
        wire.ledger_head_of(RecordDict({"ledger": ConfigRecord(head)}))


def with_heads(says: dict[int, list[Any]], told: list[tuple[int, Any]]) -> Any:
    """Nodes that send these heads, a round each; an Error instead of one is the answer."""

    def tamper(handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            told.append((context.node_id, wire.ledger_head_of(message.content)))
            reply, head = handler(message, context), says[context.node_id].pop(0)
            if isinstance(head, Error):
                return Message(head, reply_to=message)
            return Message(wire.with_ledger_head(reply.content, head), reply_to=message)

        return handle

    return tamper


def test_every_node_is_told_its_own_head_and_one_that_goes_back_is_refused_and_counted(tmp_path: Path):
    says = {1: [(2, A), (4, A), (6, A)], 2: [(2, B), (1, B), (4, B)], 3: [None, None, None]}
    told: list[tuple[int, Any]] = []
    heads = LedgerHeads(tmp_path / "heads.json")
    states: list[Any] = []
    train(CONFIG, small_dataset(), shards=PIECES, tamper=with_heads(says, told), ledger_heads=heads, on_round=lambda *args: states.append(args))
    assert [facts.refused_for for _, facts in states] == [{}, {"ledger": 1}, {}]
    assert "has 1 rows, and had 2 others before: it was put back to an older one" in states[1][1].refused[2]
    assert [head for node, head in told if node == 1] == [None, (2, A), (4, A)]
    assert [head for node, head in told if node == 2] == [None, (2, B), (2, B)]
    assert [head for node, head in told if node == 3] == [None] * 3
    assert json.loads((tmp_path / "heads.json").read_text()) == {"1": [6, A.hex()], "2": [4, B.hex()]}
    nowhere = np.repeat(np.array([0, -1, 2], dtype=np.int32), 8)
    without: list[Any] = []
    train(CONFIG, small_dataset(), shards=PIECES, state=states[0][0], owner_U=nowhere, on_round=lambda state, facts: without.append(state))
    assert torch.equal(states[1][0].weights_P, without[0].weights_P)


def test_a_node_that_says_so_itself_is_counted_the_same(tmp_path: Path):
    words = f"{LedgerBehind.__name__} on the device; its own log says more"
    says = {1: [None], 2: [Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, words)], 3: [None]}
    config = small_config({"server": {"rounds": 1, "cohort": 24}})
    _, facts = train(config, small_dataset(), shards=PIECES, tamper=with_heads(says, []), ledger_heads=LedgerHeads(tmp_path / "heads.json"))
    assert facts[0].refused_for == {"ledger": 1}


SETTINGS = """
[encoder]
width = 8
blocks = 1
heads = 1
hidden = 8
window = 10
[server]
rounds = 3
cohort = 2
"""


def head_of(folder: Path) -> tuple[int, bytes]:
    with closing(open_device(folder).ledger) as ledger:
        return ledger.head


def play(folders: list[Path], run: Path, rounds: int) -> None:
    begun = iter(range(100))
    with ExitStack() as agents:
        nodes = {}
        for number, folder in enumerate(folders):
            agents.enter_context(serving(folder))
            nodes[number + 1] = {"agent-socket": str(training_socket(folder, read_policy(folder))), "server": SERVER}
        with InProcessGrid(app, nodes) as grid:
            serve(grid, {node: np.array([node - 1]) for node in nodes}, run, should_stop=lambda: next(begun) >= rounds)


def test_a_device_whose_whole_disk_was_put_back_says_so_before_it_trains_and_is_refused_until_its_newest_ledger_is_back(tmp_path: Path):
    recipe = recipe_of_device(server={"rounds": 3, "cohort": 2.0})
    folders = [make_device(tmp_path / f"d{number}", recipe) for number in range(2)]
    for number, folder in enumerate(folders):
        write_policy(folder)
        (folder / "device.toml").write_text((folder / "device.toml").read_text().replace("user = 5", f"user = {number}"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.toml").write_text(SETTINGS)
    write_catalogue(CATALOGUE, run / "catalogue.jsonl")
    shutil.copytree(folders[1], tmp_path / "older", ignore=shutil.ignore_patterns("*.sock"))
    play(folders, run, 1)
    heads = LedgerHeads(run / "ledger_heads.json")
    newest = head_of(folders[1])
    assert heads.known(2) == newest and newest[0] > 0
    # Ledger and history both: the device itself cannot see it.
    folders[1].rename(tmp_path / "newest")
    shutil.copytree(tmp_path / "older", folders[1])
    play(folders, run, 1)
    assert head_of(folders[1])[0] == 0
    shutil.rmtree(folders[1])
    (tmp_path / "newest").rename(folders[1])
    play(folders, run, 1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["refused_for"], line["nodes_used"]) for line in lines] == [(1, {}, 2), (2, {"ledger": 1}, 1), (3, {}, 2)]
    assert "LedgerBehind" in lines[1]["refused"]["2"] and str(tmp_path) not in lines[1]["refused"]["2"]
