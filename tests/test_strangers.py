"""What comes from elsewhere writes and reads only where it belongs, runs nothing and is bounded."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from pydantic import TypeAdapter, ValidationError

from data_specs.io import names
from data_specs.io.errors import UserError
from data_specs.io.names import below, cell, inside, markdown, plain, visible
from data_specs.io.storage import RemoteFolder
from data_specs.strict import Name
from pipeline import weights
from pipeline.__main__ import main
from pipeline.degrade import lpcnet
from tests.conftest import ROOT
from train.models import weights as places

OUTSIDE = [
    *("../x", "a/../../x", "..", "/etc/passwd", "..%2f..%2fx", "%2e%2e/x", "%252e%252e%252fx"),
    *("..\\x", "a\\..\\..\\x", "C:/x", "c:x", "a\0b", "", "a//b", "./a", "a/", "a/.", "x" * 300),
    "/".join(["d" * 200] * 8),
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a path inside"):
        below(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b.wav", "a b/ü.wav", "...", "..a/b", "100%.wav", "ab:c"])
def test_any_other_name_is_the_path_that_it_says(name: str, tmp_path: Path) -> None:
    assert below(tmp_path, name) == tmp_path / name


def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_not(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for one in (folder / "in", other):
        one.mkdir(parents=True)
    (folder / "out").symlink_to(other)
    (folder / "file").symlink_to("/etc/hostname")
    (folder / "stays").symlink_to("in")
    for name in ("out/x", "out", "file"):
        with pytest.raises(UserError, match="link leads out"):
            below(folder, name)
    assert below(folder, "stays/x") == folder / "stays" / "x"


# --- weights at an address ------------------------------------------------------------------------


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a web server that answers as a function says."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_GET

    site = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.daemon_threads = True
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{site.server_port}"
    finally:
        site.shutdown()
        site.server_close()
        thread.join()


def give(asked: BaseHTTPRequestHandler, data: bytes, kind: str = "text/plain") -> None:
    """Send a whole file, whatever range was asked for."""
    asked.send_response(200)
    asked.send_header("Content-Type", kind)
    asked.send_header("Content-Length", str(len(data)))
    asked.end_headers()
    if asked.command == "GET":
        asked.wfile.write(data)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, so that a copy of an address' cache is made below ``tmp_path``."""
    places._copy_here.cache_clear()
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in (lpcnet.PATH_VARIABLE, lpcnet.HASH_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return folder


LINKS = ["../../evil", "..%2f..%2fevil", "%2e%2e%2f%2e%2e%2fevil", "..%5cevil", "a/../../../evil"]


@pytest.mark.parametrize("link", LINKS)
def test_an_index_page_that_leads_outside_writes_nothing(
    link: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(asked: BaseHTTPRequestHandler) -> None:
        if asked.path.endswith(("/deepfilternet3", "/deepfilternet3/")):
            give(asked, f'<a href="{link}">x</a>'.encode(), "text/html")
        else:
            give(asked, b"evil")

    with server(answer) as address:
        monkeypatch.setenv("SPEECH_WEIGHTS", f"{address}/cache")
        assert main(["weights", "--list", "deepfilternet3"]) == 2
    assert "not a path inside" in capsys.readouterr().err
    assert not [path for path in home.parent.rglob("*") if path.is_file()]


def test_keys_of_a_store_that_lead_outside_write_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_WEIGHTS", "memory://strangers")
    for key in ("../../evil", "..\\evil", "a/../../../evil"):
        places._copy_here.cache_clear()
        monkeypatch.setattr(RemoteFolder, "tree", lambda _, key=key: {key: 4})
        with pytest.raises(UserError, match="lists what is no file"):
            places.cached("net")
    assert not [path for path in home.parent.rglob("*") if path.is_file()]


def test_a_link_in_the_cache_is_not_written_through(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_WEIGHTS", "memory://strangers-link")
    fsspec.filesystem("memory").pipe_file("/strangers-link/net/sub/x", b"evil")
    victim, folder = home.parent / "victim", places.cache_folder() / "net"
    victim.mkdir()
    folder.mkdir(parents=True)
    (folder / "sub").symlink_to(victim)
    with pytest.raises(UserError, match="link leads out"):
        places.cached("net")
    assert not list(victim.iterdir())


PROGRAM = b"#!/bin/sh\ntouch $HOME/ran\n"


def test_a_program_from_an_address_is_run_only_with_its_hash(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_WEIGHTS", "memory://strangers-program")
    monkeypatch.setenv("PATH", "/nowhere")
    fsspec.filesystem("memory").pipe_file("/strangers-program/lpcnet/lpcnet_demo", PROGRAM)
    with pytest.raises(PermissionError, match=lpcnet.HASH_VARIABLE):
        lpcnet.executable()
    path = places.cached("lpcnet") / "lpcnet_demo"
    assert path.stat().st_mode & 0o111 == 0
    monkeypatch.setenv(lpcnet.HASH_VARIABLE, "0" * 64)
    with pytest.raises(PermissionError, match="is not run"):
        lpcnet.executable()
    assert path.stat().st_mode & 0o111 == 0
    monkeypatch.setenv(lpcnet.HASH_VARIABLE, hashlib.sha256(PROGRAM).hexdigest())
    assert lpcnet.executable() == path and os.access(path, os.X_OK)


def test_hashes_beside_the_files_at_an_address_are_no_trust(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_WEIGHTS", "memory://strangers-sums")
    store, other = fsspec.filesystem("memory"), b"another network"
    name = places.entry_of("demucs-dns64").files[0].name
    sums = f"# {len(other)} bytes: {name}\n{hashlib.sha256(other).hexdigest()}  {name}\n"
    store.pipe_file(f"/strangers-sums/demucs-dns64/{name}", other)
    store.pipe_file("/strangers-sums/demucs-dns64/SHA256SUMS", sums.encode())
    with pytest.raises(UserError, match="SHA-256 is not the table's"):
        places.find("demucs-dns64")
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_no_redirection_from_https_to_http(monkeypatch: pytest.MonkeyPatch) -> None:
    redirects = weights._Redirects()
    asked = urllib.request.Request("https://example.org/x")
    with pytest.raises(OSError, match="from https to http"):
        redirects.redirect_request(asked, None, 302, "", {}, "http://example.org/x")
    assert redirects.redirect_request(asked, None, 302, "", {}, "https://example.org/y")


def test_no_redirection_from_https_to_http_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a certificate made for it: the redirection itself is followed by aiohttp."""
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key", "-out", "certificate"]
    try:
        subprocess.run(["openssl", *made], cwd=tmp_path, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")

    class Away(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"{plain_http}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

    asked: list[str] = []

    def answer(one: BaseHTTPRequestHandler) -> None:
        asked.append(one.path)
        give(one, b"evil")

    with server(answer) as plain_http:
        site = ThreadingHTTPServer(("127.0.0.1", 0), Away)
        site.socket = context.wrap_socket(site.socket, server_side=True)
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            code = (
                "import sys\nfrom data_specs.io.storage import RemoteFolder\n"
                "try:\n    print(RemoteFolder(sys.argv[1]).read(['x'], 9))\n"
                "except OSError as error:\n    print(error)\n"
            )
            run = subprocess.run(
                [sys.executable, "-c", code, f"https://127.0.0.1:{site.server_port}"],
                env={**os.environ, "SSL_CERT_FILE": str(tmp_path / "certificate")},
                capture_output=True,
                text=True,
                timeout=60,
                cwd=ROOT,
            )
        finally:
            site.shutdown()
            site.server_close()
            thread.join()
    assert "redirects from https to http" in run.stdout and not asked, run.stdout + run.stderr


# --- servers that send more than was asked for ----------------------------------------------------


def limited(code: str, *arguments: str, memory_mb: int = 600) -> subprocess.CompletedProcess[str]:
    """Run Python with a limit on what it may take of memory beyond its imports."""
    whole = (
        "import resource, sys\nimport numpy, soundfile, aiohttp, fsspec\n"
        "import data_specs.io.storage, pipeline.shards, pipeline.audio, train.tars\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"most = used + ({memory_mb} << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n" + code
    )
    return subprocess.run(
        [sys.executable, "-c", whole, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def without_end(asked: BaseHTTPRequestHandler) -> None:
    """200 and zeros for ever, whatever range was asked for; an index page that never ends."""
    asked.send_response(200)
    asked.send_header("Content-Type", "text/html")
    asked.send_header("Content-Length", str(10**10))
    asked.end_headers()
    try:
        while asked.command == "GET":
            asked.wfile.write(bytes(1 << 20))
    except OSError:
        return


READ = """
from data_specs.io.storage import RemoteFolder
folder = RemoteFolder(sys.argv[1])
try:
    folder.read(["x"], 1 << 16)
except ValueError as error:
    assert "longer than 65536" in str(error), error
assert folder.part("x", 10, 30) == bytes(20)
try:
    folder.sizes()
except OSError as error:
    assert "longer than" in str(error), error
print("bounded")
"""


def test_a_server_that_ignores_ranges_is_not_read_to_its_end() -> None:
    with server(without_end) as address:
        run = limited(READ, address)
    assert run.stdout == "bounded\n", run.stdout + run.stderr
