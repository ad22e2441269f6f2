"""Asking an agent, over its sockets: what the command, the ClientApp and an app in Python use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
from grpc import StatusCode

from fedssl.errors import FedSSLError
from fedssl_client import device_pb2 as pb

__all__ = ["AgentError", "Connection", "StatusCode", "connect"]


class AgentError(FedSSLError):
    """The agent refused, or is not there. ``code``: gRPC's."""

    def __init__(self, words: str, code: StatusCode):
        super().__init__(words)
        self.code = code


class Connection:
    """One channel to an agent. ``ask("Recommend", {"k": 5})`` sends the request of that name and returns its reply. Raises AgentError."""

    def __init__(self, channel: grpc.Channel, service: str, metadata: tuple[tuple[str, str], ...] = ()):
        self._metadata, self._calls = metadata, {}
        described = pb.DESCRIPTOR.services_by_name[service]
        for name, method in described.methods_by_name.items():
            request, reply = (getattr(pb, kind.name) for kind in (method.input_type, method.output_type))
            call = channel.unary_unary(f"/{described.full_name}/{name}", request_serializer=request.SerializeToString, response_deserializer=reply.FromString)
            self._calls[name] = (request, call)

    def ask(self, method: str, fields: Mapping[str, Any] | None = None, *, seconds: float = 30.0) -> Any:
        """The reply to ``method``. Raises AgentError, also after ``seconds``."""
        request, call = self._calls[method]
        try:
            return call(request(**(fields or {})), timeout=seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            raise AgentError(error.details() or str(error.code()), error.code()) from None


@contextmanager
def connect(address: str, service: str = "Device", *, token: str | None = None) -> Iterator[Connection]:
    """A connection to ``unix:PATH`` or ``127.0.0.1:PORT``, closed when the block ends."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield Connection(channel, service, (("authorization", f"Bearer {token}"),) if token is not None else ())
