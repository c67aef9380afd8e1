"""Remote files on the local disk: a bounded cache, and reading ahead into it.

A remote shard, or a clip of a corpus, is fetched whole and held once to the size and SHA-256 of its
record: one long read is what object stores do best, and the order of training touches only a few
neighbouring shards at a time. Of the cache's files those opened longest ago go first.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue

from data_specs.io.errors import UserError
from data_specs.io.files import is_leftover, one_at_a_time, sha256_of, temporary_name
from data_specs.io.storage import LEFTOVER_S, RemoteFolder

CACHE_GB = 20.0
CACHE_FOLDER_VARIABLE, CACHE_GB_VARIABLE = "SPEECH_CACHE", "SPEECH_CACHE_GB"
CACHE_REMEDY = f"set {CACHE_GB_VARIABLE} (GB), or {CACHE_FOLDER_VARIABLE} to a larger disk"

PART = ".tmp"
"""Ending of files on their way here."""

EVICTIONS = 256
"""A cache of small files is gone through after every 1/256 of its limit that a process fetched."""


class Descriptor:
    """An open file for ``os.pread``; closed with the object."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # os may be gone at exit
        if hasattr(self, "number"):
            close(self.number)

    @property
    def removed(self) -> bool:
        """Whether the file has no name any more: it takes disk space until it is closed."""
        return os.fstat(self.number).st_nlink == 0


@dataclass(frozen=True)
class FileCache:
    """Remote files on the local disk, ``limit_bytes`` at most, for any number of processes.

    A file is fetched under another name and renamed when its size and hash are right: what a kill
    leaves never looks whole. Processes that want the same file wait for the one that fetches it.
    Beside the limit, every process may hold the part that it is fetching.

    With ``small`` files the folder is not gone through for each of them, but after every 1/256 of
    the limit, and then down to three quarters of it: the limit holds for up to 64 processes.
    """

    folder: Path
    limit_bytes: int
    small: bool = False

    def open(self, file: RemoteFile) -> Descriptor:
        """The file's content, fetched if it is not there. ``OSError`` or ``ValueError`` naming it.

        It stays readable when the file is removed to make room for others.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with one_at_a_time(self.folder / f"{file.local.name}.lock"):
            return self._kept(file) or self._fetched(file)

    def _kept(self, file: RemoteFile) -> Descriptor | None:
        try:
            found = Descriptor(file.local)
        except FileNotFoundError:
            return None
        if os.fstat(found.number).st_size != file.size:
            return None
        with suppress(FileNotFoundError):  # removed just now, but open
            os.utime(file.local)
        return found

    def _fetched(self, file: RemoteFile) -> Descriptor:
        part = temporary_name(file.local)
        for other in self.folder.glob(f".{glob.escape(file.local.name)}.*.tmp"):
            if is_leftover(other):
                other.unlink(missing_ok=True)
        self._evict(file.size, file.where)
        try:
            file.folder.fetch(file.name, part, file.check, file.size)
            found = Descriptor(part)
            os.fsync(found.number)
            part.replace(file.local)
        finally:
            part.unlink(missing_ok=True)
        self._evict(0, file.where)
        return found

    def _evict(self, size: int, where: str) -> None:
        if size > self.limit_bytes:
            raise UserError(
                f"{where}: {size / 1e9:.2f} GB do not fit the cache {self.folder}, which may hold "
                f"{self.limit_bytes / 1e9:.2f}: {CACHE_REMEDY}"
            )
        if self.small and not _is_due(self, size):
            return
        with one_at_a_time(self.folder / "cache.lock"):
            files = sorted(self._files())
            total = sum(used for _, used, _ in files) + size
            crowded = self.small and total > self.limit_bytes
            target = self.limit_bytes * 3 // 4 if crowded else self.limit_bytes
            for modified, used, path in files:
                leftover = path.suffix == PART and time.time() - modified > LEFTOVER_S
                if leftover or (path.suffix != PART and total > target):
                    path.unlink(missing_ok=True)
                    total -= used

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(seconds of the last use, bytes, path) of whole files and of parts."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.is_file() and not entry.name.endswith(".lock"):
                    with suppress(FileNotFoundError):  # renamed or removed meanwhile
                        status = entry.stat()
                        yield status.st_mtime, status.st_size, Path(entry.path)


_FETCHED: dict[FileCache, int] = {}
"""Bytes that this process fetched into a cache of small files since it last went through it."""


def _is_due(cache: FileCache, size: int) -> bool:
    fetched = _FETCHED.get(cache, cache.limit_bytes) + size  # at once when a process begins
    due = fetched >= cache.limit_bytes // EVICTIONS
    _FETCHED[cache] = 0 if due else fetched
    return due


def default_cache() -> FileCache:
    """``SPEECH_CACHE`` or the user's cache folder, ``SPEECH_CACHE_GB`` large (default 20)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get(CACHE_FOLDER_VARIABLE) or Path(base) / "distill-mos-factory" / "shards"
    text = os.environ.get(CACHE_GB_VARIABLE) or str(CACHE_GB)
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise UserError(f"{CACHE_GB_VARIABLE}={text!r}: not a number of GB") from None
    return FileCache(Path(folder), limit)


@dataclass(frozen=True)
class RemoteFile:
    """A file in a remote folder, its size in bytes, and where it is kept on this machine.

    Kept under its content's hash: the same shard behind another address is not fetched again, and
    one that was made anew is. Without a hash in its record, under its address and size.
    """

    folder: RemoteFolder
    name: str
    size: int
    sha256: str | None
    cache: FileCache
    tag: str = ""
    """Where there is no hash: what the store says that changes with the content."""

    @property
    def where(self) -> str:
        """Its address for messages."""
        return self.folder.shown(self.name)

    def __str__(self) -> str:
        return self.where

    @property
    def local(self) -> Path:
        """Its path once it was fetched, until room is made for others."""
        named = f"{self.folder.address}\n{self.name}\n{self.size}{self.tag}"
        identity = self.sha256 or hashlib.sha256(named.encode()).hexdigest()
        name = Path(self.name)
        readable = re.sub(r"[^\w-]", "_", name.stem, flags=re.ASCII)[:40]
        return self.cache.folder / f"{readable}-{identity}{name.suffix[:8]}"

    def check(self, copy: Path) -> None:
        """``OSError`` if a download is not this file: cut short, or changed on its way."""
        size = copy.stat().st_size
        if size != self.size:
            by = "its record" if self.sha256 or not self.tag else "the store"
            raise OSError(f"{size} bytes came, {by} says {self.size}")
        if self.sha256 and sha256_of(copy) != self.sha256:
            raise OSError("its content differs from its record's hash")

    def open(self) -> Descriptor:
        """Its content, fetched if need be."""
        return self.cache.open(self)


@lru_cache(maxsize=100_000)
def remote_clip(address: str, path: str) -> RemoteFile:
    """A file below a folder of a corpus; the store is asked once in a process what it is."""
    folder = RemoteFolder(address)
    size, tag = folder.about(path)
    shards = default_cache()
    cache = replace(shards, folder=shards.folder / "clips", small=True)
    return RemoteFile(folder, path, size, None, cache, tag)


class ReadAhead:
    """Fetches files in a thread, one after the other, before they are needed.

    The thread ends when there is nothing to fetch, and belongs to a process: a forked one starts
    its own.
    """

    def __init__(self) -> None:
        self._process = 0

    def ask(self, file: RemoteFile) -> None:
        """Fetch a file soon, unless it is there or was asked for."""
        if self._process != os.getpid():
            self._process, self._thread = os.getpid(), threading.Thread()
            self._asked: set[Path] = set()
            self._queue: SimpleQueue[RemoteFile] = SimpleQueue()
        if file.local not in self._asked and not file.local.exists():
            self._asked.add(file.local)
            self._queue.put(file)
        if not self._queue.empty() and not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        with suppress(Empty):
            while True:
                file = self._queue.get_nowait()
                with suppress(OSError, ValueError):  # who needs the file meets the error and tells
                    file.open()
                self._asked.discard(file.local)
