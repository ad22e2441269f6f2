#!/opt/fedssl/bin/python
"""Whether what an image runs is well: `fedssl-health server`, `agent` or `node`. Exit code 0 where it is."""

from __future__ import annotations

import ssl
import sys
import tomllib
import urllib.request
from pathlib import Path

SERVER, DEVICE = Path("/var/lib/fedssl/server"), Path("/var/lib/fedssl/device")
SECONDS = 15.0


def server() -> bool:
    """Whether the SuperLink of the server's folder answers; its certificate is held to the folder's authority."""
    # Not by fedssl's own reader: this runs again and again, and is to cost little.
    settings = tomllib.loads((SERVER / "server.toml").read_text(encoding="utf-8"))
    listen, tls = settings.get("listen", {}), settings.get("tls", {})
    trusted = ssl.create_default_context(cafile=str(SERVER / tls.get("ca", "ca.crt")))
    url = f"https://{listen.get('name', '127.0.0.1')}:{listen.get('port', 8000)}/health"
    with urllib.request.urlopen(url, timeout=SECONDS, context=trusted) as answer:
        return bool(answer.status == 200)


def agent() -> bool:
    """Whether the agent of the device's folder serves its app."""
    return serves(f"unix:{DEVICE / 'app' / 'agent.sock'}")


def node() -> bool:
    """Whether the SuperNode serves, which was started with `--health-server-address 127.0.0.1:9097`."""
    return serves("127.0.0.1:9097")


def serves(address: str) -> bool:
    """What gRPC's health service at ``address`` says of itself."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    try:
        is_well = {"server": server, "agent": agent, "node": node}[sys.argv[1]]()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        is_well = False
    sys.exit(0 if is_well else 1)
