"""Web servers on loopback: what they were asked for, what they do wrong, and a search for what was
secret about their addresses."""

from __future__ import annotations

import base64
import functools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from ssl import SSLContext
from typing import Any


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


class Guarded(Quiet):
    """Serves a folder to who knows the password or has the signature."""

    def send_head(self) -> Any:
        wanted = "Basic " + base64.b64encode(b"me1:PASSWORD1").decode()
        if self.headers.get("Authorization") != wanted and "sig=SIGNATURE1" not in self.path:
            self.send_error(403, "no such TOKEN1")
            return None
        return super().send_head()


SECRETS = ("PASSWORD1", "SIGNATURE1", "me1:", "me1@", "TOKEN1")
"""What only an address of ``Guarded`` has."""


@contextmanager
def serving(
    handler: Callable[..., BaseHTTPRequestHandler], context: SSLContext | None = None
) -> Iterator[str]:
    """Host and port of a server, with TLS where a context is given."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        site.daemon_threads = True
        if context:
            site.socket = context.wrap_socket(site.socket, server_side=True)
        thread = threading.Thread(target=site.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"127.0.0.1:{site.server_port}"
        finally:
            site.shutdown()
            thread.join()


def answering(answer: Callable[[Any], None]) -> type[BaseHTTPRequestHandler]:
    """A handler that answers GET and HEAD as a function says."""
    return type("Answering", (Quiet,), {"do_GET": answer, "do_HEAD": answer})


def send(
    asked: BaseHTTPRequestHandler,
    data: bytes,
    kind: str = "text/plain",
    length: int | None = None,
) -> None:
    """Answer with all of some data, under another length if one is given; kind "": not said."""
    asked.send_response(200)
    if kind:
        asked.send_header("Content-Type", kind)
    asked.send_header("Content-Length", str(len(data) if length is None else length))
    asked.end_headers()
    if asked.command == "GET":
        asked.wfile.write(data)


Misdeed = Callable[[SimpleHTTPRequestHandler], bool]
"""Answers in place of the server; whether it did."""


@dataclass
class Served:
    """A folder, its address, how often a file of each name was asked for, and what goes wrong."""

    folder: Path
    address: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    misdeed: Misdeed = lambda handler: False


class _Counting(Quiet):
    def __init__(self, *args: Any, served: Served, **options: Any) -> None:
        self.served = served
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        self.served.asked[self.path.partition("?")[0].rpartition("/")[2]] += 1
        if not self.served.misdeed(self):
            super().do_GET()


@contextmanager
def serving_folder(folder: Path) -> Iterator[Served]:
    """Serve a folder under its name while the block runs."""
    served = Served(folder)
    handler = functools.partial(_Counting, directory=str(folder.parent), served=served)
    with serving(handler) as host:
        served.address = f"http://{host}/{folder.name}"
        yield served


def secrets_in(folder: Path, secrets: Collection[str] = SECRETS) -> list[str]:
    """Files, and names of files, that hold a secret."""
    found = []
    for path in folder.rglob("*"):
        data = str(path.relative_to(folder)).encode() + (
            path.read_bytes() if path.is_file() else b""
        )
        found += [f"{path}: {secret}" for secret in secrets if secret.encode() in data]
    return found
