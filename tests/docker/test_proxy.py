"""The reverse proxy, Debian's nginx with the settings of the image: what gets through to the SuperLink, and that nothing else does."""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fedssl_server.processes import free_ports, listens
from fedssl_server.trial_keys import make_certificates
from flwr.supercore.protobuf import translation

SETTINGS = Path(__file__).parents[2] / "docker" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
ASKED = sorted({path for name, table in vars(translation).items() if isinstance(table, dict) for key in table if isinstance(key, tuple) for path in key[1:2]})
FLEET = [path for path in ASKED if path.startswith("/v1/fleet/")]
BEHIND = [path for path in ASKED if not path.startswith("/v1/fleet/")]
SPELLINGS = [
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol%2flist-runs",
    "/v1/fleet%2f..%2fcontrol/list-runs",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "/v1/fleet//../control/list-runs",
    "/v1/fleet/..;/control/list-runs",
    "/v1/fleet/\\..\\control\\list-runs",
    "//v1/control/list-runs",
    "/%76%31/control/list-runs",
    "/v1/%63ontrol/list-runs",
    "/V1/Control/list-runs",
    "/v1/control/list-runs?/v1/fleet/",
    "/v1/control/list-runs#/v1/fleet/pull-messages",
    "https://superlink/v1/control/list-runs",
    "/health/../v1/control/list-runs",
    "/health/",
    "/",
    "/docs",
    "/openapi.json",
]


@contextmanager
def superlink(folder: Path, port: int) -> Iterator[list[str]]:
    """What stands behind: it answers everything, and notes what it was asked."""
    seen: list[str] = []

    class Behind(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            seen.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *words: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with ThreadingHTTPServer(("127.0.0.1", port), Behind) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield seen
        server.shutdown()


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, list[str]]]:
    """The folder with the authority's certificate, the proxy's port, and what came through it."""
    if NGINX is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    folder = tmp_path_factory.mktemp("proxy")
    make_certificates(folder, ["localhost", "127.0.0.1"])
    outside, inside = free_ports(2)
    text = SETTINGS.read_text(encoding="utf-8").replace("/tmp/", f"{folder}/").replace("/etc/fedssl/", f"{folder}/")
    text = text.replace("server superlink:8000;", f"server 127.0.0.1:{inside};").replace("listen 8443 ssl;", f"listen 127.0.0.1:{outside} ssl;")
    # Started as root its workers would be somebody else, to whom the folder is closed.
    (folder / "nginx.conf").write_text(("user root root;\n" if os.geteuid() == 0 else "") + text, encoding="utf-8")
    with superlink(folder, inside) as seen, (folder / "log").open("wb") as log:
        process = subprocess.Popen([NGINX, "-e", "stderr", "-c", str(folder / "nginx.conf"), "-g", "daemon off;"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 10
            while not listens("127.0.0.1", outside):
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            yield folder, outside, seen
        finally:
            process.terminate()
            process.wait(10)


def ask(proxied: tuple[Path, int, list[str]], method: str, path: str, *, sent: int = 0, said: int | None = None) -> tuple[int, list[str]]:
    """The answer's status to a request of ``sent`` bytes that says ``said``, and what came through for it."""
    folder, port, seen = proxied
    before = len(seen)
    connection = http.client.HTTPSConnection("localhost", port, timeout=30, context=ssl.create_default_context(cafile=str(folder / "ca.crt")))
    with closing(connection):
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("Content-Length", str(sent if said is None else said))
        connection.endheaders(bytes(sent))
        return connection.getresponse().status, seen[before:]


def test_the_fleet_api_and_health_get_through(proxied: tuple[Path, int, list[str]]):
    assert len(FLEET) >= 12
    for path in FLEET:
        assert ask(proxied, "POST", path, sent=1000) == (200, [f"POST {path}"])
    assert ask(proxied, "GET", "/health") == (200, ["GET /health"])


def test_a_piece_of_arrays_gets_through_and_a_flood_does_not(proxied: tuple[Path, int, list[str]]):
    assert ask(proxied, "POST", "/v1/fleet/push-object", sent=6_000_000)[0] == 200
    assert ask(proxied, "POST", "/v1/fleet/push-object", said=100_000_000) == (413, [])


def test_no_call_of_another_api_gets_through(proxied: tuple[Path, int, list[str]]):
    assert sum(path.startswith("/v1/control/") for path in BEHIND) > 10 and sum(path.startswith("/v1/runtime/") for path in BEHIND) > 10
    for path in BEHIND:
        assert ask(proxied, "POST", path) == (404, []), path


@pytest.mark.parametrize("path", SPELLINGS)
def test_no_other_spelling_of_a_path_gets_through(proxied: tuple[Path, int, list[str]], path: str):
    status, seen = ask(proxied, "POST", path)
    assert status in (400, 403, 404, 405) and seen == []


def test_a_node_sends_and_does_not_fetch(proxied: tuple[Path, int, list[str]]):
    for method in ("GET", "PUT", "DELETE"):
        assert ask(proxied, method, "/v1/fleet/pull-messages") == (403, [])
