"""A device as a person has it, for a trial: its agent, Flower's SuperNode and SuperExec as processes that come back when they end, and what left it.

Between the ClientApp and the agent stands a tap, which notes each upload that the agent gives out; all else is what a device runs.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import grpc
import psutil
import tomli_w
from fedssl_client import device_pb2 as pb
from fedssl_client.connection import AgentError, connect
from fedssl_client.device_folder import HISTORY, MODEL, app_socket, make_device_folder, opened_ledger, training_socket
from fedssl_client.history import Event, HistoryStore
from fedssl_client.policy import Retention, read_policy
from fedssl_server.processes import Processes, flower_environment, free_ports, program

from fedssl.catalogue import Catalogue
from fedssl.device_model import write_device_model
from fedssl.parts import initial_weights
from fedssl.privacy.uploads import question_of
from fedssl.recipe import Recipe
from fedssl.weights import to_numpy
from fedssl.wire import download_from_bytes

SERVER, PAUSE = "home", 1.0
"""The server's name on devices; seconds before a process that ended is started again."""
PARTS = ("agent", "supernode", "superexec")


class Tap:
    """The door that the ClientApp sees. ``released``: question and digest of each upload that came out of the agent behind it."""

    def __init__(self, socket: Path, agent: Path):
        self.released: list[tuple[str, str]] = []
        service = pb.DESCRIPTOR.services_by_name["Training"]
        self._channel = grpc.insecure_channel(f"unix:{agent}", options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
        handlers = {}
        for name, method in service.methods_by_name.items():
            request, reply = (getattr(pb, kind.name) for kind in (method.input_type, method.output_type))
            call = self._channel.unary_unary(
                f"/{service.full_name}/{name}", request_serializer=request.SerializeToString, response_deserializer=reply.FromString
            )
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                lambda asked, context, call=call: self._pass_on(call, asked, context),
                request_deserializer=request.FromString,
                response_serializer=reply.SerializeToString,
            )
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
        self._server.add_insecure_port(f"unix:{socket}")
        self._server.start()

    def _pass_on(self, call: Any, asked: Any, context: grpc.ServicerContext) -> Any:
        asking = call.future(asked, timeout=context.time_remaining(), wait_for_ready=False)
        context.add_callback(asking.cancel)  # A ClientApp that is gone hangs up, here as there.
        try:
            reply = asking.result()
        except grpc.RpcError as error:
            context.abort(error.code(), error.details() or "")
        except grpc.FutureCancelledError:
            context.abort(grpc.StatusCode.CANCELLED, "")
        if isinstance(asked, pb.TrainRequest):
            self.released.append((question_of(download_from_bytes(asked.download)), hashlib.sha256(reply.upload).hexdigest()))
        return reply

    def close(self) -> None:
        self._server.stop(0).wait()
        self._channel.close()


@dataclass
class Findings:
    """What a device's files are held to. ``unlike``: uploads that left twice for one question and differed, or differ from what is kept."""

    events: int = 0
    events_lost: int = 0
    released: int = 0
    uncharged: int = 0
    unlike: int = 0
    charges: int = 0

    def __add__(self, other: Findings) -> Findings:
        return Findings(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


@dataclass
class TrialDevice:
    """One device in ``folder``.

    ``prefix``: before the commands of the SuperNode and its SuperExec, such as `ip netns exec NAME`; ``extra``: environment by part;
    ``superlink``: the address by which it reaches the server; ``proof``: the options that say who it is.
    """

    folder: Path
    number: int
    superlink: str
    proof: Sequence[str]
    secret: Path
    prefix: Sequence[str] = ()
    extra: dict[str, dict[str, str]] = field(default_factory=dict)
    released: list[tuple[str, str]] = field(default_factory=list)
    recorded: set[str] = field(default_factory=set)

    def make(self, recipe: Recipe, catalogue: Catalogue, rows: Sequence[int]) -> None:
        """Its folder: a policy that allows much, a model, a history of these rows, and the server joined."""
        make_device_folder(self.folder, user=self.number)
        gates = {"charging": False, "unmetered": False, "most_busy": 1.0, "least_disk_mb": 0, "least_memory_mb": 0, "rounds_a_day": 10**6}
        allow = {"servers": [SERVER], "most_epsilon": float("inf"), "most_delta": 0.01}
        policy = {"user": self.number, "consent": {"train": True}, "allow": allow, "gates": gates, "retention": {"most_events": 10**6}}
        (self.folder / "device.toml").write_text(tomli_w.dumps(policy))
        write_device_model(self.folder / MODEL, recipe, to_numpy(initial_weights(recipe)), catalogue, None, run="before", round=0)
        with closing(HistoryStore(self.folder / HISTORY)) as history:
            history.join(SERVER)
            history.add([Event(catalogue.tokens[row - 1], float(when), 1.0) for when, row in enumerate(rows)], Retention())

    def start(self) -> None:
        """Start the agent, the SuperNode and its SuperExec, and what starts them again when they end."""
        self._sockets = tempfile.TemporaryDirectory(prefix="tap-")
        self._port = free_ports(1)[0]
        tapped = Path(self._sockets.name) / "train.sock"
        self.tap = Tap(tapped, training_socket(self.folder, read_policy(self.folder)))
        logs, home = self.folder / "logs", self.folder / "flwr"
        for one in (logs, home):
            one.mkdir(exist_ok=True)
        self.processes = Processes(logs, flower_environment(home, {"OMP_NUM_THREADS": "1"}))
        isolation = ["--superexec-auth-secret-file", str(self.secret)]
        where = ["--superlink", self.superlink, "--port", str(self._port), "--node-config", f'agent-socket="{tapped}" server="{SERVER}"']
        self._commands = {
            "agent": [str(Path(sys.executable).with_name("fedssl")), "device", "run", str(self.folder)],
            "supernode": [*self.prefix, program("flower-supernode"), *where, *self.proof, "--isolation", "process", *isolation],
            "superexec": [*self.prefix, program("flower-superexec"), "--insecure", *isolation, "--runtime-api-address", f"127.0.0.1:{self._port}"],
        }
        self.starts = dict.fromkeys(PARTS, 0)
        self._end, self._held = threading.Event(), set[str]()
        self._keeper = threading.Thread(target=self._keep_up, daemon=True)
        self._keeper.start()
        self._user = threading.Thread(target=self._use, daemon=True)
        self._user.start()

    def stop_part(self, part: str) -> None:
        """Stop one part, which stays stopped until `start_part`."""
        self._held.add(part)
        self.processes.running[part].terminate()
        self.processes.running[part].wait(30)

    def start_part(self, part: str) -> None:
        """Let a part that was stopped come back, with the environment that ``extra`` has for it now."""
        self._held.discard(part)

    def running(self, part: str) -> list[psutil.Process]:
        """The process of a part, where it runs now."""
        try:
            return [psutil.Process(self.processes.running[part].pid)] if self.processes.running[part].poll() is None else []
        except (KeyError, psutil.Error):
            return []

    def clientapps(self) -> list[psutil.Process]:
        """The ClientApps that run now."""
        return _children(self.running("superexec"), "flwr-clientapp")

    def trainers(self) -> list[psutil.Process]:
        """The processes that train now."""
        return _children(self.running("agent"), "fedssl_client.device_trainer")

    def newest_charge(self) -> tuple[int, str] | None:
        """Row and question of the ledger's last row, where it is a charge: its answer is not there yet."""
        path = self.folder / "uploads.sqlite"
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.2)) as file:
                row = file.execute("SELECT number, question, kind FROM uploads ORDER BY number DESC LIMIT 1").fetchone()
        except sqlite3.Error:
            return None
        return (row[0], row[1]) if row is not None and row[2] == "charge" else None

    def end(self) -> None:
        """End all of it."""
        self._end.set()
        self._keeper.join()
        self._user.join()
        self.processes.end(10)
        self.tap.close()
        self._sockets.cleanup()
        self.released = self.tap.released

    def findings(self) -> Findings:
        """The files of a device that has ended, held to what was recorded and to what left it."""
        found = Findings(events=len(self.recorded), released=len(self.released))
        with closing(HistoryStore(self.folder / HISTORY)) as history, opened_ledger(self.folder, history) as device:
            found.events_lost = len(self.recorded - {event.item for event in history.events()})
            charged = device.ledger._charged
            found.charges = len(charged)
            first: dict[str, str] = {}
            for question, digest in self.released:
                found.uncharged += question not in charged
                kept = device.ledger.answer(question)
                unlike_kept = kept is not None and hashlib.sha256(kept).hexdigest() != digest
                found.unlike += unlike_kept or first.setdefault(question, digest) != digest
        return found

    # ---- threads ----

    def _keep_up(self) -> None:
        """What an init system does for a device's three services."""
        ended: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        while not self._end.wait(0.1):
            for part, command in self._commands.items():
                running = self.processes.running.get(part)
                if part in self._held or (running is not None and running.poll() is None):
                    continue
                if running is not None and not ended[part]:
                    ended[part] = time.monotonic()
                elif running is None or time.monotonic() - ended[part] > PAUSE:
                    self.processes.start(part, command, self.extra.get(part))
                    self.starts[part] += 1
                    ended[part] = 0.0

    def _use(self) -> None:
        """The app on the device: records something twice a second, and remembers what the agent said that it has."""
        number = 0
        while not self._end.wait(0.5):
            try:
                with connect(f"unix:{app_socket(self.folder)}") as app:
                    while not self._end.wait(0.5):
                        item = f"met {number}"  # No item of the catalogue, so what is trained on stays the same.
                        number += 1
                        app.ask("Record", {"item": item, "time": float(1000 + number)}, seconds=20)
                        self.recorded.add(item)
            except AgentError:
                continue


def _children(parents: list[psutil.Process], word: str) -> list[psutil.Process]:
    """The processes that these started whose command has the word."""
    found = []
    try:
        for child in (child for parent in parents for child in parent.children(recursive=True)):
            if any(word in part for part in child.cmdline()):
                found.append(child)
    except psutil.Error:
        pass
    return found
