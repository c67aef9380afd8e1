"""Where shards are: a folder on this machine, or an address that fsspec reads.

Local folders are read as they are; fsspec is imported only for an address (``s3://bucket/shards``).
A remote shard is fetched whole into a folder on the local disk, and read there: the order of
training touches only a few neighbouring shards at a time, one long read is what object stores do
best (500 headers a shard, one request each, would take seconds), and it is then held to the size
and the SHA-256 of its record once. The folder is bounded: the shards opened longest ago go first.

Addresses may carry credentials, so every message shows them through ``redacted``, and the backends'
own errors, which quote addresses, are neither repeated as they are nor chained.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

PACKAGES = {
    "http": "'fsspec[http]'",
    "https": "'fsspec[http]'",
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "memory": "fsspec",
}
"""Remote protocols that are read, and what to install for each. No other is: fsspec knows some that
run commands, unpack archives or log in elsewhere."""

WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Waits between the tries of a request: a store that throttles is back within seconds."""

SILENCE_S = 60.0
"""How long an HTTP server may send nothing. There is no limit on the whole: shards are large."""

TOGETHER = 16
"""Small files read at a time."""

LEFTOVER_S = 3600.0
"""A part of a shard that has not grown for so long belongs to a download that was killed."""

CACHE_GB = 20.0
CACHE_FOLDER_VARIABLE, CACHE_GB_VARIABLE = "SPEECH_CACHE", "SPEECH_CACHE_GB"
CACHE_REMEDY = f"set {CACHE_GB_VARIABLE} (GB), or {CACHE_FOLDER_VARIABLE} to a larger disk"

NOT_TRANSIENT = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, ImportError, TypeError, ValueError),
)
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
TRANSIENT_STATUS = (408, 425, 429)

T = TypeVar("T")


class NotFound(ValueError):
    """A folder or a file is not there; the message names it."""


# ---------------------------------------------------------------- addresses


def redacted(address: str) -> str:
    """An address as messages may show it: without user, password, query and fragment."""
    scheme, found, rest = address.partition("://")
    if not found:
        return address
    if not re.fullmatch(r"[A-Za-z][\w+.-]*", scheme):
        return "***"
    host, slash, path = rest.partition("/")
    host = re.split("[?#]", host.rpartition("@")[2])[0]
    if not re.fullmatch(r"\[[^\]]*\](:\d*)?|[^:]*(:\d*)?", host):
        return f"{scheme}://***"  # an unescaped slash in a password: what follows is part of it
    return f"{scheme}://{host}{slash}{re.split('[?#]|::', path)[0]}"


def _scrubbed(text: str, address: str) -> str:
    """A backend's message without what is secret about an address in it, and not too long."""
    text = re.sub(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+", lambda found: redacted(found[0]), text)
    authority = address.partition("://")[2].partition("/")[0]
    login, query = authority.rpartition("@")[0], address.partition("?")[2]
    values = [pair.partition("=")[2] for pair in query.split("&")]
    for secret in (query, login, login.partition(":")[2], *values):
        for spelling in {secret, unquote(secret)} - {""}:
            text = text.replace(spelling, "***")
    return text if len(text) < 300 else text[:300] + "..."


def _require_readable(address: str) -> None:
    """``ValueError`` for a protocol that is not read, and for what only another would need."""
    protocol, _, rest = address.partition("://")
    shown = redacted(address)
    if "::" in re.sub(r"\[[0-9A-Fa-f:.]*\]", "", address, count=1):  # but not in an IPv6 address
        raise ValueError(f"{shown}: chained addresses (::) are not read: give a plain one")
    if protocol not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise ValueError(f"{shown}: such addresses are not read: give a local folder, or {known}")
    if protocol not in ("http", "https") and "@" in rest.partition("/")[0]:
        raise ValueError(f"{shown}: credentials belong into the environment, not into the address")


def open_folder(address: Path | str) -> LocalFolder | RemoteFolder:
    """A folder by path or address (``http(s)://``, ``s3://``, ``gs://``, ``hf://``, ``file://``).

    ``ValueError`` naming the address: a protocol that is not read, or its package is missing.
    """
    text = str(address)
    if "://" in text and not text.startswith("file://"):
        _require_readable(text)
        _require_package(text)
        return RemoteFolder(text)
    if isinstance(address, Path) and ":/" in text and text.partition(":")[0] in PACKAGES:
        raise ValueError(f"{address}: an address, taken for a path: this reads local folders only")
    return LocalFolder(_local_path(text) if text.startswith("file://") else Path(address))


def _local_path(address: str) -> Path:
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{redacted(address)}: names another machine; spell it file:///folder")
    return Path(unquote(parts.path))


def _require_package(address: str) -> None:
    protocol = address.partition("://")[0]
    try:
        import fsspec  # type: ignore[import-untyped]

        fsspec.get_filesystem_class(protocol)
    except ImportError:
        raise ValueError(
            f"{redacted(address)}: reading {protocol}:// needs a package: "
            f"pip install {PACKAGES[protocol]}"
        ) from None


# ---------------------------------------------------------------- folders


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine."""

    path: Path

    def shown(self, name: str = "") -> str:
        """The folder, or a file in it, for messages."""
        return str(self.path / name)

    def sizes(self) -> dict[str, int | None]:
        """Name and bytes of every file; ``NotFound`` without the folder."""
        if not self.path.is_dir():
            raise NotFound(f"{self.path}: no such folder of shards")
        with os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read(self, names: Sequence[str], limit: int) -> list[bytes]:
        """Small files whole; ``NotFound`` or ``ValueError`` naming one that is over the limit."""
        return [_no_longer(self._head(name, limit), limit, self.shown(name)) for name in names]

    def _head(self, name: str, limit: int) -> bytes:
        try:
            with (self.path / name).open("rb") as file:
                return file.read(limit + 1)
        except FileNotFoundError:
            raise NotFound(f"{self.shown(name)} is missing") from None


@dataclass(frozen=True)
class RemoteFolder:
    """A folder that fsspec reads. Transient errors are tried again (``WAITS_S``)."""

    address: str = field(repr=False)

    def shown(self, name: str = "") -> str:
        """The folder, or a file in it, for messages: without credentials."""
        return redacted(self._at(name) if name else self.address)

    def sizes(self) -> dict[str, int | None]:
        """Name and bytes (none where the listing does not tell) of every file.

        An HTTP server must give an index page with links, as ``python -m http.server`` does.
        """
        entries = self._tried("", lambda system: system.ls(self._at(""), detail=True))
        files = [entry for entry in entries if entry["type"] == "file"]
        return {self._name(entry["name"]): entry.get("size") for entry in files}

    def read(self, names: Sequence[str], limit: int) -> list[bytes]:
        """Small files whole; ``NotFound`` or ``ValueError`` naming one that is over the limit."""

        def head(name: str) -> bytes:
            at = self._at(name)
            return self._tried(name, lambda system: bytes(system.cat_file(at, 0, limit + 1)))

        with ThreadPoolExecutor(TOGETHER) as pool:
            found = pool.map(head, names)
            return [
                _no_longer(data, limit, self.shown(name))
                for name, data in zip(names, found, strict=True)
            ]

    def fetch(self, file: RemoteFile, to: Path) -> None:
        """Write a file to a path. ``OSError`` naming it if it is not what its record says."""

        def once(system: Any) -> None:
            system.get_file(self._at(file.name), str(to), callback=_stop_after(file.size))
            _require_content(to, file)

        self._tried(file.name, once)

    def _at(self, name: str) -> str:
        """The address of a file; a query (a signature) stays behind it."""
        base, mark, query = self.address.partition("?")
        return f"{base.rstrip('/')}/{name}{mark}{query}"

    def _name(self, address: str) -> str:
        link = address.removeprefix(self._at("").rstrip("/"))  # fsspec puts it behind our query
        return re.split("[?#]", link)[0].rpartition("/")[2]

    def _tried(self, name: str, work: Callable[[Any], T]) -> T:
        """What ``work`` makes of a file system, at the first try that does not fail."""
        waits = list(WAITS_S)
        while True:
            try:
                return work(_filesystem(self.address.partition("://")[0]))
            except Exception as error:  # every backend has kinds of its own
                if not waits or not _is_transient(error):
                    tries = len(WAITS_S) - len(waits) + 1
                    raise self._failure(name, error, tries) from None
            time.sleep(waits.pop(0))

    def _failure(self, name: str, error: Exception, tries: int) -> Exception:
        shown = self.shown(name)
        if isinstance(error, FileNotFoundError):
            return NotFound(f"{shown}: not found" if name else f"{shown}: no such folder of shards")
        told = _scrubbed(str(error), self.address)
        return OSError(
            f"{shown}: cannot be read, tried {tries} times: {type(error).__name__}: {told}; check "
            "the address, the credentials in the environment and the network"
        )


SYSTEMS: dict[tuple[int, str], Any] = {}
"""fsspec's file systems by process and protocol. They are never let go: what closes their
connections would run at some garbage collection, in a forked worker or under a lock, and hang."""


def _filesystem(protocol: str) -> Any:
    """This process' own: connections cannot be shared with the process that it was forked from."""
    import fsspec

    key = (os.getpid(), protocol)
    if key not in SYSTEMS:
        options = _http_options() if protocol in ("http", "https") else {}
        system = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
        SYSTEMS.setdefault(key, system)
    return SYSTEMS[key]


def _http_options() -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    return {
        "client_kwargs": {"timeout": timeout, "trust_env": True},
        "headers": {"Accept-Encoding": "identity"},  # sizes are then those of the files
    }


def _is_transient(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if status is None:
        status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in TRANSIENT_STATUS
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        return False
    return not isinstance(error, NOT_TRANSIENT)


def _no_longer(data: bytes, limit: int, where: str) -> bytes:
    if len(data) > limit:
        raise ValueError(f"{where}: longer than {limit} bytes: not a file of a dataset")
    return data


def _stop_after(size: int) -> Any:
    """A callback that ends a download which brings more than it should."""
    from fsspec.callbacks import Callback  # type: ignore[import-untyped]

    def check(_: int | None, received: int, **kwargs: object) -> None:
        if received > size:
            raise ValueError(f"sends more than the {size} bytes that its record says")

    return Callback(hooks={"size": check})


def _require_content(path: Path, file: RemoteFile) -> None:
    """``OSError`` if a download is not the file of the record: cut short, or changed on its way."""
    size = path.stat().st_size
    if size != file.size:
        raise OSError(f"{size} bytes came, its record says {file.size}")
    with path.open("rb") as content:
        if file.sha256 and hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
            raise OSError("its content differs from its record's hash")


# ---------------------------------------------------------------- remote files on the local disk


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
class ShardCache:
    """Remote shards on the local disk, ``limit_bytes`` at most, for any number of processes.

    A shard is fetched under another name and renamed when its size and hash are right: what a kill
    leaves never looks whole. Processes that want the same shard wait for the one that fetches it.
    Beside the limit, every process may hold the part that it is fetching.
    """

    folder: Path
    limit_bytes: int

    def open(self, file: RemoteFile) -> Descriptor:
        """The file's content, fetched if it is not there. ``OSError`` or ``ValueError`` naming it.

        It stays readable when the file is removed to make room for others.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(file.local.name):
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
        part = file.local.with_suffix(".part")
        self._make_room(file.size, file.where)
        try:
            file.folder.fetch(file, part)
            found = Descriptor(part)
            os.fsync(found.number)
            part.replace(file.local)
        finally:
            part.unlink(missing_ok=True)
        self._make_room(0, file.where)
        return found

    def _make_room(self, size: int, where: str) -> None:
        if size > self.limit_bytes:
            raise ValueError(
                f"{where}: {size / 1e9:.2f} GB do not fit the cache {self.folder}, which may hold "
                f"{self.limit_bytes / 1e9:.2f}: {CACHE_REMEDY}"
            )
        with self._locked("cache"):
            files = sorted(self._files())
            total = sum(used for _, used, _ in files) + size
            for modified, used, path in files:
                leftover = path.suffix == ".part" and time.time() - modified > LEFTOVER_S
                if leftover or (path.suffix == ".tar" and total > self.limit_bytes):
                    path.unlink(missing_ok=True)
                    total -= used

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(seconds of the last use, bytes, path) of whole shards and of parts."""
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".part"):
                with suppress(FileNotFoundError):  # renamed or removed meanwhile
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """The lock goes with the process, however that ends; its empty file stays."""
        with (self.folder / f"{name}.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def default_cache() -> ShardCache:
    """``SPEECH_CACHE`` or the user's cache folder, ``SPEECH_CACHE_GB`` large (default 20)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get(CACHE_FOLDER_VARIABLE) or Path(base) / "distill-mos-factory" / "shards"
    text = os.environ.get(CACHE_GB_VARIABLE) or str(CACHE_GB)
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise ValueError(f"{CACHE_GB_VARIABLE}={text!r}: not a number of GB") from None
    return ShardCache(Path(folder), limit)


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
    cache: ShardCache

    @property
    def where(self) -> str:
        """Its address for messages."""
        return self.folder.shown(self.name)

    @property
    def local(self) -> Path:
        """Its path once it was fetched, until room is made for others."""
        named = f"{self.folder.address}\n{self.name}\n{self.size}"
        identity = self.sha256 or hashlib.sha256(named.encode()).hexdigest()
        return self.cache.folder / f"{Path(self.name).stem}-{identity}.tar"

    def open(self) -> Descriptor:
        """Its content, fetched if need be."""
        return self.cache.open(self)


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
