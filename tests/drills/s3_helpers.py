"""An S3 server on loopback, and before it a proxy that does wrong when it is told to."""

from __future__ import annotations

import http.client
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from tests.servers import serving

BUCKET = "bucket"
ACCESS_KEY, SECRET_KEY = "AKIAEXAMPLEEXAMPLE", "hushHushHush/hushHushHush+hush"
SILENCE_S = 4.0
HOP_BY_HOP = {"connection", "transfer-encoding", "expect", "content-length", "keep-alive"}
ERROR = b"<Error><Code>InternalError</Code><Message>We are sorry.</Message></Error>"


@dataclass
class Proxy:
    """``asked`` counts requests by (method, path), ``wronged`` what a test counts of its misdeeds;
    ``misdeed`` answers in the server's place where it returns true."""

    port: int
    upstream: int
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    wronged: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    misdeed: Callable[[Any, bytes], bool] = lambda handler, body: False

    def count(self, method: str, ending: str) -> int:
        return sum(
            n for (m, path), n in self.asked.items() if m == method and path.endswith(ending)
        )


class Handler(BaseHTTPRequestHandler):
    """Passes requests on. ``half`` answers only half of what the server says, and hangs up."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def pass_on(self) -> None:
        path, length = self.path.partition("?")[0], int(self.headers.get("Content-Length") or 0)
        self.proxy.asked[self.command, path] += 1
        self.proxy.copies += "x-amz-copy-source" in self.headers
        if self.proxy.misdeed is cut_upload and self.command == "PUT" and length > 1000:
            self.rfile.read(length // 2)  # and the connection ends
            self.proxy.misdeed = lambda handler, body: False
            self.hang_up()
            return
        body = self.rfile.read(length) if length else self._chunks()
        if not self.proxy.misdeed(self, body):
            self.answer(*self.ask(body))

    def _chunks(self) -> bytes:
        found = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline().split(b";")[0], 16)
            found += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return found

    def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
        connection.request(self.command, self.path, body or None, headers)
        response = connection.getresponse()
        data = response.read()
        kept = {k: v for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP}
        length = response.headers.get("Content-Length") if self.command == "HEAD" else len(data)
        connection.close()
        return response.status, kept | {"Content-Length": str(length or 0)}, data

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

    def log_message(self, *args: Any) -> None:
        pass


def cut_upload(handler: Handler, body: bytes) -> bool:
    """Once: hang up when half of an upload has come. (The proxy knows it by its name.)"""
    return False


def fail(handler: Handler, body: bytes) -> bool:
    handler.answer(500, {"Content-Length": str(len(ERROR))}, ERROR)
    return True


def stall(handler: Handler, body: bytes) -> bool:
    """Say nothing for longer than the client waits."""
    time.sleep(SILENCE_S + 1)
    handler.hang_up()
    return True


def cut_read(handler: Handler, body: bytes) -> bool:
    """Promise a whole answer, send half of it, and hang up."""
    status, headers, data = handler.ask(body)
    handler.answer(status, headers, data[: len(data) // 2])
    handler.hang_up()
    return True


def slow_read(handler: Handler, body: bytes) -> bool:
    """Send an answer in pieces with pauses, none of them too long."""
    status, headers, data = handler.ask(body)
    handler.answer(status, headers, b"")
    step = max(1, len(data) // 4)
    for start in range(0, len(data), step):
        handler.wfile.write(data[start : start + step])
        handler.wfile.flush()
        time.sleep(0.05)
    return True


def once_each(
    do: Callable[[Any, bytes], bool], method: str, ending: str = ""
) -> Callable[[Any, bytes], bool]:
    """Do wrong the first time that a path is asked for by this method."""
    done: set[str] = set()

    def misdeed(handler: Handler, body: bytes) -> bool:
        path = handler.path.partition("?")[0]
        if handler.command != method or handler.path in done or not path.endswith(ending):
            return False
        done.add(handler.path)
        return do(handler, body)

    return misdeed


@contextmanager
def proxied(upstream: int) -> Iterator[Proxy]:
    proxy = Proxy(0, upstream)
    handler = type("Bound", (Handler,), {"proxy": proxy})
    with serving(handler) as host:
        proxy.port = int(host.partition(":")[2])
        yield proxy


@contextmanager
def moto_server() -> Iterator[int]:
    """The port of an S3 server on loopback."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")
    server_module = pytest.importorskip("moto.server", reason="install 'moto[server]'")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


def point_at(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let s3 be at this port, by the environment's usual names."""
    from data_specs.io import storage

    values = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for key in [key for key in storage.SYSTEMS if key[1] == "s3"]:
        del storage.SYSTEMS[key]


def make_bucket(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status in (200, 409)
    connection.close()
