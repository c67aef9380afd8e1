"""Folders wherever they are: on this machine, or at an address that fsspec reads and writes.

Local folders are used as they are; fsspec is imported only for an address (``s3://bucket/shards``).
A file is there whole or not at all: on a disk by a temporary name, sync and rename; on a store by
one upload, which shows no part of an object, held afterwards to its size and checksum.

There is one layer of retries (``retry.py``). Messages name the address without credentials; the
backends' own errors, which quote addresses, are neither repeated as they are nor chained.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote, unquote

from data_specs.io import retry
from data_specs.io.addresses import (
    PACKAGES,
    PathOrUrl,
    is_address,
    local_path,
    redacted,
    require_package,
    require_readable,
    scrubbed,
)
from data_specs.io.checksums import require_stored, sums_of
from data_specs.io.errors import UserError
from data_specs.io.files import (
    DISK_ERRNOS,
    path_of,
    scratch_file,
    sync_folder,
    temporary_name,
    whole_file,
)
from data_specs.io.http import SILENCE_S, http_options
from data_specs.io.names import ENCODED
from data_specs.io.retry import CONFLICTS, is_transient, jitter, patiently, status_of

WRITE_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Of an upload: a shard took minutes to make, and is not given up for a store's bad minute."""

HTTP = ("http", "https")

OWN_RETRIES = ("gs", "hf")
"""Protocols whose packages try again by themselves, six and five times: here one wait is enough."""

MOST_DEPTH = 16
"""Of folders below an address on a web server, whose pages may list each other in a circle."""

CONCURRENT_READS = 32
"""Small files read at a time."""

PART_BYTES = 64 << 20
"""Of an upload to s3 in parts, which is one of twice as much or more."""

LEFTOVER_S = 3600.0
"""A part of a file that has not grown for so long belongs to a transfer that was killed."""

T = TypeVar("T")


class NotFound(UserError):
    """A folder or a file is not there; the message names it."""


def open_folder(address: PathOrUrl) -> LocalFolder | RemoteFolder:
    """A folder by path or address (``http(s)://``, ``s3://``, ``gs://``, ``hf://``, ``file://``).

    ``ValueError`` naming the address: a protocol that is not read, or its package is missing.
    """
    text = str(address)
    if is_address(text):
        require_readable(text)
        require_package(text)
        return RemoteFolder(text)
    if isinstance(address, Path) and ":/" in text and text.partition(":")[0] in PACKAGES:
        raise UserError(f"{address}: an address, taken for a path: this reads local folders only")
    return LocalFolder(local_path(text) if text.startswith("file://") else Path(address))


# ---------------------------------------------------------------- on this machine


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine."""

    path: Path

    def shown(self, name: str = "") -> str:
        """The folder, or a file in it, for messages."""
        return str(self.path / name)

    def below(self, name: str) -> LocalFolder:
        """A folder in it."""
        return LocalFolder(self.path / name)

    def sizes(self) -> dict[str, int | None]:
        """Name and bytes of every file; ``NotFound`` without the folder."""
        if not self.path.is_dir():
            raise NotFound(f"{self.path}: no such folder of shards")
        found: dict[str, int | None] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a temporary name, renamed meanwhile
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    @contextmanager
    def there(self, name: str) -> Iterator[Path]:
        """The path of a file; ``NotFound`` naming it where the block finds none."""
        try:
            yield self.path / name
        except FileNotFoundError:
            raise NotFound(f"{self.shown(name)} is missing") from None

    def size(self, name: str) -> int:
        """Bytes of a file; ``NotFound`` naming it where it is not there."""
        with self.there(name) as path:
            return path.stat().st_size

    def read(self, names: Sequence[str], limit: int) -> list[bytes]:
        """Small files whole; ``NotFound`` or ``ValueError`` naming one that is over the limit."""
        return [patiently(partial(self._head, name, limit)) for name in names]

    def _head(self, name: str, limit: int) -> bytes:
        with self.there(name) as path, path.open("rb") as file:
            return _no_longer(file.read(limit + 1), limit, self.shown(name))

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file for reading; ``NotFound`` naming it where it is not there."""
        with self.there(name) as path:
            file = patiently(lambda: path.open("rb"))
        with file:
            yield file

    def make(self) -> None:
        """Make the folder, if it is not there."""
        self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Write a file whole or not at all."""
        path = self.path / name
        _make_below(self.path, path.parent)
        with whole_file(path) as file:
            yield file

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)


def _make_below(top: Path, folder: Path) -> None:
    """Make a folder in ``top``, not ``top`` itself: whoever removed that wants no half of it."""
    for part in (*reversed(folder.parents), folder):
        if part != top and part.is_relative_to(top):
            part.mkdir(exist_ok=True)


# ---------------------------------------------------------------- at an address


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at an address. Transient errors are tried again (``WAITS_S``)."""

    address: str = field(repr=False)

    @property
    def protocol(self) -> str:
        """What stands before ``://``."""
        return self.address.partition("://")[0]

    def shown(self, name: str = "") -> str:
        """The folder, or a file in it, for messages: without credentials."""
        return redacted(self._at(name) if name else self.address)

    def below(self, name: str) -> RemoteFolder:
        """A folder in it; a query (a signature) goes with it."""
        return RemoteFolder(self._at(name))

    def sizes(self) -> dict[str, int | None]:
        """Name and bytes (none where the listing does not tell) of every file: one listing.

        An HTTP server must give an index page with links, as ``python -m http.server`` does.
        """
        entries = self._tried("", lambda system: system.ls(self._at(""), detail=True))
        files = [entry for entry in entries if entry["type"] == "file"]
        return {self._name(entry["name"]): entry.get("size") for entry in files}

    def tree(self) -> dict[str, tuple[int | None, str]]:
        """Path of every file below the folder, with its bytes and whatever the store says that
        changes with its content: one recursive listing.

        The paths are the store's word: ``names.inside`` refuses those that lead out of the folder,
        the ones with an encoded slash too, which stays encoded here.
        """
        depth = {"maxdepth": MOST_DEPTH} if self.over_http else {}  # a store has no folders
        found = self._tried("", lambda system: system.find(self._at(""), detail=True, **depth))
        top = re.sub(r"^[a-z0-9]+://", "", self._at("").partition("?")[0]).strip("/")
        listed = {}
        for name, entry in found.items():
            path = re.sub(r"^[a-z0-9]+://", "", name.partition("?")[0]).strip("/")
            if entry.get("type") == "file" and path.startswith(f"{top}/"):
                below = path.removeprefix(f"{top}/")
                encoded = not self.over_http or ENCODED.search(below)
                listed[below if encoded else unquote(below)] = (entry.get("size"), _tag(entry))
        return listed

    def read(self, names: Sequence[str], limit: int) -> list[bytes]:
        """Small files whole; ``NotFound`` or ``ValueError`` naming one that is over the limit."""

        def head(name: str) -> bytes:
            return _no_longer(self.part(name, 0, limit + 1), limit, self.shown(name))

        with ThreadPoolExecutor(CONCURRENT_READS) as pool:
            return list(pool.map(head, names))

    def size(self, name: str) -> int:
        """Bytes of a file; ``NotFound`` naming it where it is not there."""
        return self.about(name)[0]

    def part(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file."""
        at = self._at(name)
        return self._tried(name, lambda system: bytes(system.cat_file(at, start=start, end=end)))

    def about(self, name: str) -> tuple[int, str]:
        """Bytes of a file, and whatever the store says that changes with its content."""
        entry = self._tried(name, lambda system: system.info(self._at(name)))
        if entry.get("size") is None:
            raise OSError(f"{self.shown(name)}: the server does not tell its size")
        return int(entry["size"]), _tag(entry)

    def fetch(self, name: str, to: Path, check: Callable[[Path], None], most: int) -> None:
        """Write a file to a path. ``OSError`` naming it where ``check`` raises one for it, or where
        more than ``most`` bytes come."""

        def once(system: Any) -> None:
            system.get_file(self._at(name), str(to), callback=_stop_after(most))
            check(to)

        self._tried(name, once)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A local copy for reading, gone when it is closed, or with the process."""
        size, _ = self.about(name)
        with scratch_file() as file:
            self.fetch(name, path_of(file), lambda copy: require_size(copy, size), size)
            yield file

    def make(self) -> None:
        """Say at once that an address cannot be written. A store has no folders to make."""
        if self.over_http:
            raise UserError(
                f"{self.shown()}: http is only read: give a local folder, s3://, gs:// or hf://"
            )

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Write a file whole or not at all: first here, then by one upload, then compared."""
        self.make()
        with scratch_file() as file:
            yield file
            file.flush()
            self._upload(path_of(file), name)

    def _upload(self, path: Path, name: str) -> None:
        at = self._at(name)
        size, sums = sums_of(path, PART_BYTES)
        options = {"chunksize": PART_BYTES} if self.protocol == "s3" else {}

        def once(system: Any) -> None:
            system.put_file(str(path), at, **options)
            require_stored(system, at, size, sums)

        self._tried(name, once, "written")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(NotFound):
            self._tried(name, lambda system: system.rm_file(self._at(name)), "removed")

    def copy_from(self, other: RemoteFolder, name: str) -> None:
        """Have the store copy a file of another of its folders."""
        size, _ = other.about(name)
        source, target = other._at(name), self._at(name)

        def once(system: Any) -> None:
            system.cp_file(source, target)
            system.invalidate_cache()
            if (stored := system.info(target)["size"]) != size:
                raise OSError(f"{stored} of {size} bytes were copied")

        self._tried(name, once, "written")

    def remove_leftovers(self) -> int:
        """End uploads in parts that nobody goes on with: unseen, but stored and billed. How many.

        Only s3 has them; without the permission to list them, none are ended.
        """
        if self.protocol != "s3":
            return 0
        bucket, _, prefix = self._at("").removeprefix("s3://").partition("/")
        system = _filesystem("s3")
        try:
            uploads = system.list_multipart_uploads(bucket)
            before = datetime.now(UTC) - timedelta(seconds=LEFTOVER_S)
            old = [u for u in uploads if u["Key"].startswith(prefix) and u["Initiated"] < before]
            for upload in old:
                system.abort_mpu(bucket, upload["Key"], upload["UploadId"])
        except Exception:  # of any backend
            return 0
        return len(old)

    @property
    def over_http(self) -> bool:
        return self.protocol in HTTP

    def _at(self, name: str) -> str:
        """The address of a file; a query (a signature) stays behind it."""
        base, mark, query = self.address.partition("?")
        return f"{base.rstrip('/')}/{quote(name) if self.over_http else name}{mark}{query}"

    def _name(self, address: str) -> str:
        link = address.removeprefix(self._at("").rstrip("/"))  # fsspec puts it behind our query
        return re.split("[?#]", link)[0].rpartition("/")[2]

    def _tried(self, name: str, work: Callable[[Any], T], done: str = "read") -> T:
        """What ``work`` makes of a file system, at the first try that does not fail."""
        all_waits = retry.WAITS_S if done == "read" else WRITE_WAITS_S
        tries = 1
        while True:
            try:
                return work(_filesystem(self.protocol))
            except Exception as raised:  # every backend has kinds of its own
                error = _reason(raised) if self.over_http else raised
                tried_there = self.protocol in OWN_RETRIES and status_of(error)[0] not in CONFLICTS
                waits = all_waits[:1] if tried_there else all_waits
                if tries > len(waits) or not is_transient(error):
                    raise self._failure(name, error, tries, done) from None
            time.sleep(waits[tries - 1] * jitter())
            tries += 1

    def _failure(self, name: str, error: Exception, tries: int, done: str) -> Exception:
        shown = self.shown(name)
        if isinstance(error, FileNotFoundError) and done == "written":
            return NotFound(f"{shown}: cannot be written: there is no such bucket or repository")
        if isinstance(error, FileNotFoundError) or (
            done == "removed" and status_of(error)[0] == 404
        ):
            return NotFound(f"{shown}: not found" if name else f"{shown}: no such folder of shards")
        told = scrubbed(str(error), self.address)
        message = (
            f"{shown}: cannot be {done}, tried {tries} times: {type(error).__name__}: {told}; "
            "check the address, the credentials in the environment and the network"
        )
        full = isinstance(error, OSError) and error.errno in DISK_ERRNOS
        return OSError(error.errno, message) if full else OSError(message)  # type: ignore[attr-defined]


def _reason(error: Exception) -> Exception:
    """What hides behind fsspec's "not found" over HTTP, where that is not what the server says."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    is_missing = isinstance(cause, FileNotFoundError) or status_of(cause)[0] == 404
    return error if is_missing else cause


def _tag(entry: dict[str, Any]) -> str:
    """What a store's word for a file has that changes with its content."""
    names = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "mtime", "created")
    tags = (entry.get(name) for name in names)
    return str(next(filter(None, tags), ""))


def copy(name: str, source: LocalFolder | RemoteFolder, to: LocalFolder | RemoteFolder) -> None:
    """Copy a file from folder to folder: by a hard link, by the store itself, or through here."""
    match source, to:
        case LocalFolder(), LocalFolder() if _linked(name, source, to):
            return
        case RemoteFolder(), RemoteFolder() if source.protocol == to.protocol and not to.over_http:
            to.copy_from(source, name)
            return
    with source.open(name) as file, to.writing(name) as new:
        shutil.copyfileobj(file, new, 1 << 20)


def _linked(name: str, source: LocalFolder, to: LocalFolder) -> bool:
    """Whether a hard link could be made. Files are only ever replaced, never written into."""
    path = to.path / name
    temporary = temporary_name(path)
    _make_below(to.path, path.parent)
    temporary.unlink(missing_ok=True)
    try:
        with source.there(name) as file:
            os.link(file, temporary)
    except OSError:  # another disk, or a file system without links
        return False
    os.replace(temporary, path)
    temporary.unlink(missing_ok=True)  # rename does nothing where both are one file already
    sync_folder(path.parent)
    return True


def require_size(path: Path, size: int) -> None:
    """``OSError`` if a download is not as long as the store says."""
    if (came := path.stat().st_size) != size:
        raise OSError(f"{came} bytes came, the store says {size}")


def _no_longer(data: bytes, limit: int, where: str) -> bytes:
    if len(data) > limit:
        raise UserError(f"{where}: longer than {limit} bytes: not a file of a dataset")
    return data


def _stop_after(size: int) -> Any:
    """A callback that ends a download which brings more than it should."""
    from fsspec.callbacks import Callback  # type: ignore[import-untyped]

    def check(_: int | None, received: int, **kwargs: object) -> None:
        if received > size:
            raise UserError(f"sends more than the {size} bytes that its record says")

    return Callback(hooks={"size": check})


# ---------------------------------------------------------------- file systems and their errors

SYSTEMS: dict[tuple[int, str], Any] = {}
"""fsspec's file systems by process and protocol. They are never let go: what closes their
connections would run at some garbage collection, in a forked worker or under a lock, and hang."""


def _filesystem(protocol: str) -> Any:
    """This process' own: connections cannot be shared with the process that it was forked from.

    No listing is kept: other processes write there too.
    """
    import fsspec  # type: ignore[import-untyped]

    key = (os.getpid(), protocol)
    if key not in SYSTEMS:
        options = _options(protocol)
        system = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
        if protocol == "s3":
            system.retries = 1  # s3fs' own layer; ours is above it
        SYSTEMS.setdefault(key, system)
    SYSTEMS[key].invalidate_cache()
    return SYSTEMS[key]


def _options(protocol: str) -> dict[str, Any]:
    if protocol in HTTP:
        return http_options()
    if protocol == "s3":
        once = {"total_max_attempts": 1, "mode": "standard"}
        limits = {"connect_timeout": SILENCE_S, "read_timeout": SILENCE_S}
        config = {"retries": once, "max_pool_connections": CONCURRENT_READS, **limits}
        return {"use_listings_cache": False, "config_kwargs": config}
    return {}
