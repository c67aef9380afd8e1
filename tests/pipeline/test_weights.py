"""Weights: what is fetched is whole, what is not whole is not found, and nothing is fetched twice.

The server is a local one, with tables made for it; tests of the real table need no network, but the
one marked ``net``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

from data_specs import weight
from data_specs.strict import HERE, SpecError, load
from data_specs.weight import Archive, Build, HuggingFace, Plain, WeightTable, Wheel, all_weights
from pipeline.__main__ import main
from pipeline.corpora import weights
from pipeline.render.processors import deepfilternet3
from tests.conftest import ROOT
from tests.drills.drill_cluster import wait_for
from tests.pipeline.conftest import Says
from train.models.weights import find

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


ABOUT = {"about": "x", "homepage": "https://example.org", "licence": "CC0-1.0"}


class Site:
    """A server's files, how it behaves, and what was asked of it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.files: dict[str, bytes] = {}
        self.links: dict[str, tuple[str, str]] = {}  # path -> (target, tag): as the hub does it
        self.ranges = True
        self.cut_after: int | None = None  # bytes in all, then every connection is closed
        self.stall = threading.Event()  # set: after half of a large file nothing more comes
        self.asked: list[tuple[str, str | None]] = []
        self.sent = 0
        self.url = ""

    def use(self, entries: dict[str, dict[str, Any]]) -> WeightTable:
        """Put a table in the real one's place."""
        table = WeightTable.model_validate({"weights": {n: ABOUT | e for n, e in entries.items()}})
        self.patch.setattr(weight, "all_weights", lambda: table.weights)
        return table

    def offer(self, data: bytes, **known: object) -> None:
        """An entry "net" of one file "net.bin"; its hash is published unless ``known`` differs."""
        self.files["/net.bin"] = data
        known = known or {"size": len(data), "sha256": sha256(data)}
        self.use({"net": {"files": [{"name": "net.bin", "url": f"{self.url}/net.bin", **known}]}})


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        site, wanted = self.site, self.headers.get("Range")
        if self.command == "GET":
            site.asked.append((self.path, wanted))
        if self.path in site.links:
            target, tag = site.links[self.path]
            size = str(len(site.files[target]))
            found = {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": size}
            elsewhere = site.url.replace("127.0.0.1", "localhost")  # the hub's client stops there
            self.answer(302, {"Location": elsewhere + target, **found})
        elif self.path not in site.files:
            self.answer(404, {})
        elif wanted and site.ranges:
            data = site.files[self.path]
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            while site.stall.is_set() and first >= len(data) // 2:
                time.sleep(0.01)
            span = f"bytes {first}-{last}/{len(data)}"
            self.answer(206, {"Content-Range": span}, data[first : last + 1])
        else:
            self.answer(200, {}, site.files[self.path])

    do_HEAD = do_GET

    def answer(self, code: int, headers: dict[str, str], data: bytes = b"") -> None:
        site = self.site
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            part = data if site.cut_after is None else data[: max(0, site.cut_after - site.sent)]
            site.sent += len(part)  # before the client has it all, and a test asks
            self.wfile.write(part)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(monkeypatch)
    handler = type("Bound", (Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield site
    site.stall.clear()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("data_specs.io.retry.WAITS_S", ())
    monkeypatch.setattr(weights, "PIECE_BYTES", 10_000)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and p.name != weights.LOCK_FILE
    )


# --- whole ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [8, 16, 64])
def test_what_is_fetched_is_found_and_recorded(
    digits: int, site: Site, cache: Path, says: Says
) -> None:
    data = noise(30_000)
    site.offer(data, **{"sha256" if digits == 64 else "sha256_prefix": sha256(data)[:digits]})
    assert main(["weights", "net"]) == 0
    assert find("net") == cache / "net"
    assert (cache / "net" / "net.bin").read_bytes() == data
    assert names(cache / "net") == ["SHA256SUMS", "net.bin"]
    run = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    done = subprocess.run(run, cwd=cache / "net", capture_output=True, text=True)
    assert done.returncode == 0 and "net.bin: OK" in done.stdout, done.stderr
    asked = len(site.asked)
    assert "CC0-1.0" in says(0, "weights", "net") and len(site.asked) == asked


def test_only_what_the_processors_read_is_fetched_unasked(site: Site, cache: Path) -> None:
    site.files = {"/a": b"a", "/b": b"b"}
    entries: dict[str, dict[str, Any]] = {
        n: {"files": [{"name": n, "url": f"{site.url}/{n}"}]} for n in ("a", "b")
    }
    site.use({"a": {**entries["a"], "by_default": True}, "b": entries["b"]})
    assert main(["weights"]) == 0
    assert names(cache) == ["a/SHA256SUMS", "a/a"]


# --- not whole ------------------------------------------------------------------------------------


def test_what_is_not_here_is_an_error_that_names_the_command_and_no_network(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("find went to the network")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    for name, entry in all_weights().items():
        if isinstance(entry, Wheel):
            continue
        other = f", or {entry.or_run}" if entry.or_run else ""
        run = entry.command if isinstance(entry, Build) else f"make weights NAMES={name}{other}$"
        with pytest.raises(FileNotFoundError, match=f"no weights '{name}' in {cache}.*run {run}"):
            find(name)
    with pytest.raises(FileNotFoundError, match=r"unknown weights.*did you mean 'lpcnet'"):
        find("lpcnets")
    assert not cache.exists()


def test_without_network_the_error_names_the_address(site: Site, cache: Path, says: Says) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and never listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/net.bin"
        site.use({"net": {"files": [{"name": "net.bin", "url": url}]}})
        assert says(1, "weights", "net").startswith(f"error: net: {url}: cannot be read")
    assert names(cache) == []


def test_a_cut_connection_is_gone_on_from_where_it_was(site: Site, cache: Path) -> None:
    data = noise(200_000)
    site.offer(data)
    site.cut_after = 155_000
    assert main(["weights", "net"]) == 1
    assert names(cache / "net") == ["net.bin.part"]
    with pytest.raises(FileNotFoundError, match=r"incomplete \(net.bin missing\).*NAMES=net"):
        find("net")
    site.cut_after, site.sent = None, 0
    assert main(["weights", "net"]) == 0
    assert site.sent == 50_000
    assert (find("net") / "net.bin").read_bytes() == data
    assert names(cache / "net") == ["SHA256SUMS", "net.bin"]


def test_without_a_hash_a_half_is_not_gone_on_with_nor_without_ranges_is_it_wrong(
    site: Site,
) -> None:
    site.offer(noise(50_000, 1), size=50_000)
    site.cut_after = 25_000
    assert main(["weights", "net"]) == 1
    site.cut_after, site.ranges = None, False
    site.files["/net.bin"] = noise(50_000, 2)
    assert main(["weights", "net"]) == 0
    assert (find("net") / "net.bin").read_bytes() == noise(50_000, 2)


@pytest.mark.parametrize("there", ["all of it", "more than it", "of another file"])
def test_what_an_earlier_fetch_left_is_held_to_the_hash(
    there: str, site: Site, cache: Path
) -> None:
    data = noise(30_000)
    site.offer(data)
    left = {"all of it": data, "more than it": noise(40_000), "of another file": noise(9_000, 3)}
    (cache / "net").mkdir(parents=True)
    (cache / "net" / "net.bin.part").write_bytes(left[there])
    assert main(["weights", "net"]) == (1 if there == "of another file" else 0)
    assert site.sent == {"all of it": 0, "more than it": 30_000}.get(there, 21_000)
    assert main(["weights", "net"]) == 0
    assert (find("net") / "net.bin").read_bytes() == data


def test_more_bytes_than_weights_have_are_not_fetched(
    site: Site, monkeypatch: pytest.MonkeyPatch, says: Says
) -> None:
    site.offer(noise(30_000), size=None)
    monkeypatch.setattr(weights, "MOST_BYTES", 20_000)
    assert "30000 bytes are too many" in says(1, "weights", "net") and site.sent == 0


@pytest.mark.parametrize("wrong", ["sha256", "sha256_prefix", "size"])
def test_a_wrong_file_is_deleted_and_told_with_both_values(
    wrong: str, site: Site, cache: Path, says: Says
) -> None:
    data = noise(30_000)
    other = sha256(b"other")
    known: dict[str, object] = {"sha256": other}
    said = (other, sha256(data))
    if wrong == "sha256_prefix":
        known, said = {wrong: other[:16]}, (other[:16], sha256(data))
    elif wrong != "sha256":
        known, said = {"size": 30_001}, ("30001", "30000")
    site.offer(data, **known)
    error = says(1, "weights", "net")
    assert f"{site.url}/net.bin has" in error and all(text in error for text in said)
    assert names(cache / "net") == []
    with pytest.raises(FileNotFoundError, match="make weights NAMES=net"):
        find("net")


def test_one_entry_that_fails_does_not_keep_the_others_back(site: Site, says: Says) -> None:
    site.files["/b"] = b"b"
    site.use({n: {"files": [{"name": n, "url": f"{site.url}/{n}"}]} for n in ("a", "b")})
    assert "error: a: " in says(1, "weights", "a", "b")
    find("b")


CHILD = """
import sys, yaml
from data_specs import weight
from pipeline.__main__ import main
from pipeline.corpora import weights
from pipeline.render.processors import deepfilternet3
weights.PIECE_BYTES = 1 << 20
table = weight.WeightTable.model_validate(yaml.safe_load(open(sys.argv[1]))).weights
weight.all_weights = lambda: table
sys.exit(main(["weights"] + sys.argv[2:]))
"""


@contextmanager
def child(folder: Path, table: WeightTable, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that fetches; it does not outlive the block."""
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(table.model_dump(mode="json")))
    run = [sys.executable, "-c", CHILD, str(path), *argv]
    process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_fetch_leaves_nothing_that_is_found_and_is_gone_on(
    site: Site, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, half = noise(100_000, 1), noise(4 << 20, 2)
    site.files = {"/config.json": whole, "/net.bin": half}
    files = [
        {"name": name[1:], "url": site.url + name, "sha256": sha256(data)}
        for name, data in site.files.items()
    ]
    table = site.use({"net": {"files": files}})
    site.stall.set()
    part = cache / "net" / "net.bin.part"
    monkeypatch.setattr(weights, "PIECE_BYTES", 1 << 20)
    with child(tmp_path, table, "net") as process:
        wait_for(lambda: part.is_file() and part.stat().st_size == 2 << 20, 60, "no half", process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match=r"incomplete \(net.bin missing\).*NAMES=net"):
        find("net")
    site.stall.clear()
    site.asked.clear()
    assert main(["weights", "net"]) == 0
    ranges = [f"bytes={first << 20}-{(first + 1 << 20) - 1}" for first in (2, 3)]
    assert site.asked == [("/net.bin", one) for one in ranges]
    assert (find("net") / "net.bin").read_bytes() == half


def test_two_at_once_fetch_once(site: Site, tmp_path: Path) -> None:
    data = noise(1 << 21)
    site.files["/net.bin"] = data
    table = site.use({"net": {"files": [{"name": "net.bin", "url": f"{site.url}/net.bin"}]}})
    site.stall.set()
    second = threading.Thread(target=main, args=[["weights", "net"]], daemon=True)
    with child(tmp_path, table, "net") as first:
        wait_for(lambda: site.asked, 60, "nothing is asked", first)
        second.start()
        time.sleep(0.2)
        assert len(site.asked) <= 2 and second.is_alive()
    site.stall.clear()  # the first is dead and its lock gone with it: the second takes over
    second.join(timeout=60)
    assert (find("net") / "net.bin").read_bytes() == data


# --- hashes that nobody publishes -----------------------------------------------------------------


def test_an_unpublished_hash_is_told_recorded_and_holds_from_then_on(
    site: Site, cache: Path, says: Says
) -> None:
    data = noise(10_000, 1)
    site.offer(data, size=None)
    said = says(0, "weights", "net")
    assert f"no SHA-256 of {site.url}/net.bin is published" in said and sha256(data) in said
    assert weights.read_sums(cache / "net") == {"net.bin": weights.Sum(10_000, sha256(data))}
    (cache / "net" / "net.bin").unlink()
    with pytest.raises(FileNotFoundError, match="make weights NAMES=net"):
        find("net")
    site.files["/net.bin"] = noise(10_000, 2)
    assert f"was fetched before with {sha256(data)}" in says(1, "weights", "net")
    site.files["/net.bin"] = data
    assert main(["weights", "net"]) == 0
    assert (find("net") / "net.bin").read_bytes() == data


def test_a_changed_size_is_not_found_and_changed_bytes_do_not_pass_the_check(
    site: Site, cache: Path, says: Says
) -> None:
    data = noise(10_000)
    site.offer(data, size=None)
    assert main(["weights", "net"]) == 0 and main(["weights", "--check"]) == 0
    path = cache / "net" / "net.bin"
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert find("net") == cache / "net"
    said = says(1, "weights", "--check", "net")
    assert str(path) in said and sha256(data) in said and "make weights NAMES=net" in said
    path.write_bytes(data[:-1])
    with pytest.raises(FileNotFoundError, match=r"9999 bytes, expected 10000.*NAMES=net"):
        find("net")
    assert main(["weights", "--check"]) == 1


def test_a_newer_table_does_not_take_an_older_fetch(site: Site) -> None:
    site.offer(b"old")
    assert main(["weights", "net"]) == 0
    site.offer(b"new")
    with pytest.raises(FileNotFoundError, match="not the version of the table"):
        find("net")


def test_files_by_hand_are_used_and_recorded_without_network(site: Site, cache: Path) -> None:
    data = noise(1000)
    site.offer(data)
    (cache / "net").mkdir(parents=True)
    (cache / "net" / "net.bin").write_bytes(data)
    assert find("net") == cache / "net"
    assert weights.state_of("net", weights.entry_of("net")).word == "by hand"
    assert main(["weights", "net"]) == 0 and site.asked == []
    assert weights.state_of("net", weights.entry_of("net")).word == "whole"


def test_a_file_by_hand_that_is_another_is_told_and_left_alone(
    site: Site, cache: Path, says: Says
) -> None:
    site.offer(noise(1000))
    path = cache / "net" / "net.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"my own training")
    assert f"{path} has 15 bytes, expected 1000: move it away" in says(1, "weights", "net")
    assert main(["weights", "--check", "net"]) == 1
    assert path.read_bytes() == b"my own training"
    path.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"net\.bin is empty"):
        find("net")


# --- huggingface.co -------------------------------------------------------------------------------


def hub(site: Site, tag: str) -> bytes:
    """A repository as the hub serves it: files lie elsewhere, with a tag of the large one."""
    base, data = f"/some/model/resolve/{COMMIT}", noise(200_000)
    site.files = {"/cdn/1": b"{}", "/cdn/2": data}
    site.links = {
        f"{base}/config.json": ("/cdn/1", "0123456789" * 4),
        f"{base}/model.safetensors": ("/cdn/2", tag),
    }
    template = f"{site.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    site.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    files = [{"name": "config.json"}, {"name": "model.safetensors"}]
    where = {"kind": "huggingface", "repository": "some/model", "revision": COMMIT}
    site.use({"net": {**where, "files": files}})
    return data


def test_the_hub_s_files_are_held_to_the_hub_s_hashes_and_gone_on(
    site: Site, cache: Path, says: Says
) -> None:
    data = hub(site, sha256(noise(200_000)))
    site.cut_after = 150_002
    assert "model.safetensors is published" not in says(1, "weights", "net")
    assert names(cache / "net") == ["config.json", "model.safetensors.part"]
    site.cut_after, site.sent = None, 0
    assert "model.safetensors is published" not in says(0, "weights", "net")
    assert site.sent == 50_000
    assert (find("net") / "model.safetensors").read_bytes() == data


def test_a_file_that_is_not_the_hub_s_is_refused(site: Site, cache: Path, says: Says) -> None:
    hub(site, sha256(b"other"))
    assert f"expected {sha256(b'other')}" in says(1, "weights", "net")
    assert names(cache / "net") == ["config.json"]
    with pytest.raises(FileNotFoundError, match="make weights NAMES=net"):
        find("net")


def test_hf_hub_offline_is_respected(
    site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch, says: Says
) -> None:
    hub(site, sha256(noise(200_000)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = says(1, "weights", "net")
    assert "HF_HUB_OFFLINE is set" in said and str(cache / "net") in said and site.asked == []


# --- archives -------------------------------------------------------------------------------------


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def archive_entry(site: Site, data: bytes, *files: str, flat: bool = False) -> None:
    site.files["/net.zip"] = data
    archive = {"name": "net.zip", "url": f"{site.url}/net.zip", "sha256": sha256(data)}
    entry = {"kind": "zip", "archive": archive, "flat": flat, "files": [{"name": f} for f in files]}
    site.use({"net": entry})


@pytest.mark.parametrize("flat", [False, True])
def test_an_archive_is_unpacked_and_only_what_is_listed(
    flat: bool, site: Site, cache: Path
) -> None:
    data = zipped(**{"top/config.ini": b"1", "top/deep/net.ckpt": noise(5000), "top/more": b"2"})
    files = ["config.ini", "net.ckpt"] if flat else ["top/config.ini", "top/deep/net.ckpt"]
    archive_entry(site, data, *files, flat=flat)
    assert main(["weights", "net"]) == 0
    assert names(find("net")) == ["SHA256SUMS", *files]
    assert (cache / "net" / files[1]).read_bytes() == noise(5000)
    (cache / "net" / files[1]).unlink()
    assert main(["weights", "net"]) == 0 and len(site.asked) == 2
    find("net")


@pytest.mark.parametrize("evil", ["../evil", "a/../../evil", "/evil", "..\\evil"])
@pytest.mark.parametrize("flat", [False, True])
def test_an_archive_that_leads_outside_is_refused(
    evil: str, flat: bool, site: Site, tmp_path: Path, says: Says
) -> None:
    before = names(tmp_path)
    data = zipped(**{"config.ini": b"1", evil: b"evil"})
    archive_entry(site, data, "config.ini", flat=flat)
    assert "leads out of its folder" in says(1, "weights", "net")
    assert names(tmp_path) == before and not Path("/evil").exists()
    with pytest.raises(FileNotFoundError):
        find("net")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no zip at all", "not a zip file"),
        (zipped(**{"model.pth": b"1"}), "0 files 'config.ini'; it holds model.pth"),
        (zipped(**{"a/config.ini": b"1", "b/config.ini": b"2"}), "has 2 files 'config.ini'"),
        (zipped(**{"config.ini": noise(9000)}).replace(noise(9000)[:99], bytes(99)), "Bad CRC-32"),
    ],
)
def test_a_bad_archive_is_told(data: bytes, said: str, site: Site, cache: Path, says: Says) -> None:
    archive_entry(site, data, "config.ini", flat=True)
    assert said in says(1, "weights", "net")
    assert not {"net/config.ini", "net/net.zip"} & set(names(cache))
    with pytest.raises(FileNotFoundError):
        find("net")


# --- the table ------------------------------------------------------------------------------------


def test_list_shows_state_size_licence_and_address(site: Site, cache: Path, says: Says) -> None:
    site.offer(noise(2_500_000), size=None)
    before = says(0, "weights", "--list")
    assert main(["weights", "net"]) == 0
    head, columns, row = says(0, "weights", "--list", "net").splitlines()
    assert str(cache) in head
    assert columns.split() == ["name", "state", "size", "licence", "address"]
    assert row.split() == ["net", "whole", "2.5", "MB", "CC0-1.0", f"{site.url}/net.bin"]
    assert "missing" in before and "not known" in before


def test_every_entry_has_an_official_address_and_a_licence() -> None:
    table = load(WeightTable, HERE / "weights.yaml").weights
    hosts = ("github.com", "huggingface.co", "dl.fbaipublicfiles.com")
    for name, entry in table.items():
        assert entry.licence and entry.address.startswith("https://"), name
        assert entry.address.split("/")[2] in hosts and entry.homepage.split("/")[2] in hosts, name
        for file in entry.files:
            url = getattr(file, "url", None)
            assert url is None or url.startswith("https://"), name
    assert {name for name, entry in table.items() if entry.by_default} == {
        *("deepfilternet3", "demucs-dns48", "demucs-dns64"),
        *("hifigan-speecht5", "hifigan-coqui", "encodec-24khz"),
    }


WHEELS = [name for name, entry in all_weights().items() if isinstance(entry, Wheel)]


@pytest.mark.parametrize("name", WHEELS)
def test_the_files_of_the_packages_are_those_of_the_table(name: str) -> None:
    entry = all_weights()[name]
    assert isinstance(entry, Wheel)
    if importlib.util.find_spec(entry.module) is None:
        pytest.skip(f"pip install {entry.package}")
    assert importlib.metadata.version(entry.package) == entry.version
    folder = find(name)
    for file in entry.files:
        assert weights.measure(folder / file.name) == weights.Sum(file.size or 0, file.sha256 or "")
    assert main(["weights", "--check", name]) == 0 and main(["weights", name]) == 0


def test_a_package_that_is_not_installed_or_another_is_told(site: Site, says: Says) -> None:
    wheel = {"kind": "wheel", "package": "no-such", "version": "1.2"}
    file = {"name": "__init__.py", "size": 1, "sha256": sha256(b"")}
    absent = {**wheel, "module": "no_such_module", "files": [file]}
    site.use({"absent": absent, "other": {**wheel, "module": "yaml", "files": [file]}})
    for name, said in (("absent", "no weights 'absent'"), ("other", "bytes, expected 1")):
        with pytest.raises(FileNotFoundError, match=f"{said}.*pip install .* no-such==1.2"):
            find(name)
        assert "no-such==1.2" in says(1, "weights", name)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ({"name": "../net.bin"}, "not a path inside"),
        ({"name": "/net.bin"}, "not a path inside"),
        ({"name": "a/./b"}, "is written 'a/b'"),
        ({"name": "x", "url": "file:///etc/passwd"}, r"files\[0\].url"),
        ({"name": "x", "sha256": "0" * 64, "sha256_prefix": "0" * 16}, "not both"),
        ({"name": "x", "sha256": "0" * 63}, r"files\[0\].sha256"),
        ({"name": "x", "bytes": 3}, "unknown key 'bytes'"),
    ],
)
def test_a_wrong_table_is_told_by_path(file: dict[str, object], said: str, tmp_path: Path) -> None:
    entry = {**ABOUT, "files": [{"url": "https://example.org/x", **file}]}
    path = tmp_path / "weights.yaml"
    path.write_text(yaml.safe_dump({"weights": {"net": entry}}))
    with pytest.raises(SpecError, match=said) as error:
        load(WeightTable, path)
    assert "weights.net" in str(error.value)


# --- who reads them -------------------------------------------------------------------------------


def test_deepfilternet3_is_found_in_the_cache_after_the_variable(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(deepfilternet3.FOLDER_VARIABLE, raising=False)
    for folder in (cache / "deepfilternet3" / "DeepFilterNet3", tmp_path / "mine"):
        for name in ("config.ini", "checkpoints/model_120.ckpt.best"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"1")
    assert deepfilternet3.weights_folder() == cache / "deepfilternet3" / "DeepFilterNet3"
    monkeypatch.setenv(deepfilternet3.FOLDER_VARIABLE, str(tmp_path / "mine"))
    assert deepfilternet3.weights_folder() == tmp_path / "mine"


REAL_CACHE = os.environ.get(weights.FOLDER_VARIABLE)


@pytest.mark.parametrize("name", [n for n, e in all_weights().items() if not isinstance(e, Wheel)])
def test_real_weights_are_what_the_table_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not REAL_CACHE or not (Path(REAL_CACHE) / name).is_dir():
        pytest.skip(f"no real weights {name!r}: set {weights.FOLDER_VARIABLE}, make weights")
    monkeypatch.setenv(weights.FOLDER_VARIABLE, REAL_CACHE)
    assert main(["weights", "--check", name]) == 0


def addresses() -> list[tuple[str, int | None]]:
    """Every address and the size that the table has for it."""
    found: list[tuple[str, int | None]] = []
    for entry in all_weights().values():
        if isinstance(entry, Plain):
            found += [(file.url, file.size) for file in entry.files]
        elif isinstance(entry, Archive):
            found.append((entry.archive.url, entry.archive.size))
        elif isinstance(entry, HuggingFace):
            found += [
                (f"{entry.address}/resolve/{entry.revision}/{file.name}", file.size)
                for file in entry.files
            ]
    return found


@pytest.mark.net
@pytest.mark.parametrize(("url", "size"), addresses())
def test_every_official_address_answers(url: str, size: int | None) -> None:
    request = urllib.request.Request(
        url, method="HEAD", headers={"User-Agent": "distill-mos-factory"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200
        assert size is None or int(response.headers["Content-Length"]) == size
