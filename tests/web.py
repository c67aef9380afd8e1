"""A web server for a test: what it was asked for, and what it does wrong."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Misdeed = Callable[[SimpleHTTPRequestHandler], bool]
"""Answers in place of the server; whether it did."""


@dataclass
class Served:
    """A folder, its address, how often a file of each name was asked for, and what goes wrong."""

    folder: Path
    address: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    misdeed: Misdeed = lambda handler: False


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, served: Served, **options: Any) -> None:
        self.served = served
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        self.served.asked[self.path.partition("?")[0].rpartition("/")[2]] += 1
        if not self.served.misdeed(self):
            super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Serve a folder under its name while the block runs."""
    served = Served(folder)
    handler = functools.partial(_Handler, directory=str(folder.parent), served=served)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        served.address = f"http://127.0.0.1:{server.server_port}/{folder.name}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield served
        server.shutdown()


def send(handler: SimpleHTTPRequestHandler, content: bytes, length: int | None = None) -> None:
    """Answer with some content, under another length if one is given."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)
