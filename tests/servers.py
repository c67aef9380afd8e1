"""Web servers on loopback, and a search for what was secret about their addresses."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
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


def answering(
    answer: Callable[[BaseHTTPRequestHandler], None],
) -> type[BaseHTTPRequestHandler]:
    """A handler that answers GET and HEAD as a function says."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_GET

    return Handler


def secrets_in(folder: Path, secrets: Collection[str] = SECRETS) -> list[str]:
    """Files, and names of files, that hold a secret."""
    found = []
    for path in folder.rglob("*"):
        data = str(path.relative_to(folder)).encode() + (
            path.read_bytes() if path.is_file() else b""
        )
        found += [f"{path}: {secret}" for secret in secrets if secret.encode() in data]
    return found
