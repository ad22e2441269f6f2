"""The agent's doors: gRPC on two Unix sockets, and on 127.0.0.1 for who shows a token. Health and reflection on each."""

from __future__ import annotations

import fcntl
import hmac
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # Children are started anew and never share a channel.

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedssl.disk import writing
from fedssl.errors import ConfigError, DataError, DiskError, FedSSLError, LedgerBehind
from fedssl.log_lines import logged, note
from fedssl_client import device_pb2 as pb
from fedssl_client.agent import LOG, Agent, NoModel, as_json
from fedssl_client.device_folder import app_socket, check_private, read_token, training_socket
from fedssl_client.policy import OutsidePolicy
from fedssl_client.training import NotNow, TrainingFailed

LONGEST_SOCKET_PATH = 107
"""Bytes of a Unix socket's path that Linux takes."""
_CODES: list[tuple[type[FedSSLError], grpc.StatusCode]] = [
    (OutsidePolicy, grpc.StatusCode.PERMISSION_DENIED),
    (NotNow, grpc.StatusCode.FAILED_PRECONDITION),
    (NoModel, grpc.StatusCode.FAILED_PRECONDITION),
    (TrainingFailed, grpc.StatusCode.ABORTED),
    (LedgerBehind, grpc.StatusCode.DATA_LOSS),
    (DataError, grpc.StatusCode.INVALID_ARGUMENT),
    (DiskError, grpc.StatusCode.RESOURCE_EXHAUSTED),
]
Answer = Callable[[Any, grpc.ServicerContext], Any]


def device_answers(agent: Agent) -> dict[str, Answer]:
    """What the app on the device may ask."""

    def record(asked: pb.RecordRequest, context: grpc.ServicerContext) -> pb.RecordReply:
        agent.record(asked.item, asked.time if asked.HasField("time") else None, asked.value if asked.HasField("value") else None)
        return pb.RecordReply()

    def recommend(asked: pb.RecommendRequest, context: grpc.ServicerContext) -> pb.RecommendReply:
        found = agent.recommend(k=asked.k, include_seen=asked.include_seen)
        return pb.RecommendReply(items=[pb.Recommendation(item=one.item, title=one.title, score=one.score) for one in found])

    def forget(asked: pb.ForgetRequest, context: grpc.ServicerContext) -> pb.ForgetReply:
        what = asked.WhichOneof("what")
        if what is None or (what == "all" and not asked.all):
            raise DataError("forget what? wanted an item, or all = true")
        return pb.ForgetReply(events=agent.forget(None if what == "all" else asked.item))

    def join(asked: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinReply:
        agent.join(asked.server)
        return pb.JoinReply()

    return {
        "Record": record,
        "Recommend": recommend,
        "Status": lambda asked, context: pb.StatusReply(**agent.status()),
        "Forget": forget,
        "Export": lambda asked, context: pb.ExportReply(json=as_json(agent.export())),
        "Join": join,
        "Leave": lambda asked, context: pb.LeaveReply(had_joined=agent.leave(asked.server)),
    }


def training_answers(agent: Agent) -> dict[str, Answer]:
    """What the ClientApp may ask, and beside health and reflection nothing else: it can reach neither the history nor the recommendations."""

    def train(asked: pb.TrainRequest, context: grpc.ServicerContext) -> pb.TrainReply:
        known = (asked.known_rows, asked.known_chain) if asked.known_rows else None
        upload = agent.train(asked.download, asked.server, seconds=asked.seconds, is_wanted=context.is_active, known=known)
        rows, chain = agent.ledger_head()
        return pb.TrainReply(upload=upload, ledger_rows=rows, ledger_chain=chain)

    return {"Hello": lambda asked, context: pb.HelloReply(users=agent.users()), "Train": train}


def _handler(service: str, answers: dict[str, Answer], is_private: bool) -> grpc.GenericRpcHandler:
    described = pb.DESCRIPTOR.services_by_name[service]
    methods = {}
    for name, answer in answers.items():
        method = described.methods_by_name[name]
        request, reply = (getattr(pb, kind.name) for kind in (method.input_type, method.output_type))
        methods[name] = grpc.unary_unary_rpc_method_handler(
            _guarded(answer, is_private), request_deserializer=request.FromString, response_serializer=reply.SerializeToString
        )
    return grpc.method_handlers_generic_handler(described.full_name, methods)


def _guarded(answer: Answer, is_private: bool) -> Answer:
    """Errors as gRPC's codes. ``is_private``: whoever asks is the person's own app and may read all words."""

    def guarded(asked: Any, context: grpc.ServicerContext) -> Any:
        try:
            return answer(asked, context)
        except FedSSLError as error:
            code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.FAILED_PRECONDITION)
            may_leave = is_private or isinstance(error, OutsidePolicy | NotNow | TrainingFailed)
            context.abort(code, str(error) if may_leave else f"{type(error).__name__} on the device; its own log says more")

    return guarded


class _Token(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuse every call, health and reflection too, that does not show the token."""

    def __init__(self, token: str):
        self._wanted = f"Bearer {token}".encode()
        self._refusal = grpc.unary_unary_rpc_method_handler(
            lambda asked, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "show the token that stands in the device's folder")
        )

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        shown = next((value for name, value in details.invocation_metadata if name == "authorization"), "")
        if not hmac.compare_digest(shown.encode(), self._wanted):
            return self._refusal
        return continuation(details)


def _server(services: dict[str, dict[str, Answer]], address: str, *, is_private: bool, most_bytes: int, token: str | None = None) -> grpc.Server:
    server = grpc.server(
        ThreadPoolExecutor(4, thread_name_prefix="grpc"),
        interceptors=[] if token is None else [_Token(token)],
        options=[("grpc.max_receive_message_length", most_bytes), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    names = [pb.DESCRIPTOR.services_by_name[service].full_name for service in services]
    for service, answers in services.items():
        server.add_generic_rpc_handlers((_handler(service, answers, is_private),))
    states = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    for name in ("", *names):
        states.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"{address}: cannot listen there ({error})") from None
    server.start()
    return server


def _socket_address(path: Path) -> str:
    """The address of a Unix socket in a folder that is its owner's alone where we make it; a socket that a killed agent left is removed."""
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise ConfigError(f"{path}: a Unix socket's path has at most {LONGEST_SOCKET_PATH} bytes; put the device's folder where its path is shorter")
    with writing(path):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.unlink(missing_ok=True)
    return f"unix:{path}"


@contextmanager
def serving(folder: Path, agent: Agent | None = None) -> Iterator[Agent]:
    """The doors of the device in ``folder``, open while the block runs.

    Raises ConfigError where the folder lets others in, another agent runs on it, or there is no listening.
    """
    check_private(folder)
    with ExitStack() as stack:
        lock = stack.enter_context((folder / "agent.lock").open("a"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{folder}: an agent runs on it already; stop it first") from None
        agent = agent or Agent(folder)
        stack.callback(agent.close)
        policy = agent.policy
        # A megabyte for what stands around a download.
        for_training = policy.allow.most_bytes + (1 << 20)
        device, training = {"Device": device_answers(agent)}, {"Training": training_answers(agent)}
        servers = [
            _server(device, _socket_address(app_socket(folder)), is_private=True, most_bytes=1 << 22),
            _server(training, _socket_address(training_socket(folder, policy)), is_private=False, most_bytes=for_training),
        ]
        if policy.agent.training_socket:
            # For another user than ours: whom the folder lets in, whose rights are the operator's.
            training_socket(folder, policy).chmod(0o666)
        if policy.agent.port:
            token = read_token(folder)
            servers.append(_server(device, f"127.0.0.1:{policy.agent.port}", is_private=True, most_bytes=1 << 22, token=token))
        try:
            yield agent
        finally:
            for stopped in [server.stop(1.0) for server in servers]:
                stopped.wait()


def run_agent(folder: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    os.umask(0o077)
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    with logged(LOG, sys.stderr), serving(folder) as agent:
        print(f"agent of {folder} on {app_socket(folder)}", flush=True)
        note(LOG, "agent begins", may_train=agent.policy.consent.train)
        end.wait()
        note(LOG, "agent ends")
