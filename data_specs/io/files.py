"""Local files that are whole or not there, their hashes, and folders with one writer at a time."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from data_specs.io.errors import UserError

FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The machine's own: the kernel gives it this number (PROC_PID_INIT_INO)."""

LOCK_FILE = ".lock"
"""In an output folder while a command writes there, which holds it (flock); says which one."""

_OPEN: set[IO[bytes]] = set()
"""Lock files of this process. A child that it forks lets go of them: a worker that outlives a
killed command would else hold its lock."""

HELD = (errno.EWOULDBLOCK, errno.EAGAIN)
"""What flock answers where another process holds the lock; anything else: no locks here."""

DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that is full or cannot be written."""

SCRATCH_VARIABLE = "SPEECH_SCRATCH"
"""Local folder for what is on its way to or from an address (default: the system's)."""

UNSYNCABLE = (
    *(errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY),
    *(errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR),
)
"""What file systems answer that cannot sync a file or a folder, or open a folder."""

TEMPORARY = re.compile(r"^(\..+)\.(\d+)\.[0-9a-f]{8}\.tmp$")
"""Name and host, and process, of a temporary file."""

ABANDONED_S = 86_400.0
"""A temporary file of another machine that is so old is nobody's."""

AT_WORKING_FOLDER, EXCHANGE = -100, 2
"""Of Linux: AT_FDCWD and RENAME_EXCHANGE."""


def here() -> str:
    """Where a process number means one process: this machine, or one container on it.

    Containers on a machine's own network share its name and count their processes each from one.
    """
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return socket.gethostname()
    number = "" if space == FIRST_PID_NAMESPACE else "+" + space[5:-1]
    return socket.gethostname() + number


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other process, machine or thread takes."""
    return path.with_name(f".{path.name}.{here()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name, whose file is synced and renamed to ``path`` where the block ends well.

    Errors of the system name ``path``.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            _sync(file.fileno(), path)
        temporary.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Write ``path`` whole or not at all: temporary name, sync, rename, sync of the folder."""
    with _replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """As ``whole_file``, for libraries that take a path: ``write`` fills the temporary file."""
    with _replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # some libraries write 0600


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files, in subfolders too, that no process goes on with.

    Those of processes that ended on this machine, and of other machines what is older than a day.
    """
    for path in folder.rglob(".*.tmp"):
        if is_leftover(path):
            path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether no process goes on with a temporary file."""
    named = TEMPORARY.search(path.name)
    if named is None:
        return False
    if named[1].endswith(f".{here()}") and _start_of(int(named[2])) is None:
        return True
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_S
    except FileNotFoundError:  # renamed or removed meanwhile
        return False


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def replace_folder(made: Path, folder: Path) -> None:
    """Put ``made`` in the place of ``folder``, beside it, in one step; what was there is removed.

    Whenever it is interrupted there is the old folder or the new one under the name. Where the
    file system cannot exchange two names, the old one is away for a moment, as ``made`` + ".old".
    """
    for path in made.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                _sync(file.fileno(), path)
    sync_folder(made)
    old = made
    try:
        if folder.exists():
            _exchange(made, folder)
        else:
            made.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        old = made.with_name(made.name + ".old")
        folder.rename(old)
        made.rename(folder)
    sync_folder(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> None:
    """Let two names on one file system change places, at once (``renameat2``)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(other))
    names = (AT_WORKING_FOLDER, os.fsencode(one), AT_WORKING_FOLDER, os.fsencode(other))
    if rename(*names, EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def sync_folder(folder: Path) -> None:
    """Make names in a folder last; where the file system cannot, they last as long as it likes."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
        return _warn_unsynced(folder, error)
    try:
        _sync(handle, folder)
    finally:
        os.close(handle)


def _sync(handle: int, path: Path) -> None:
    """Have an open file or folder on the disk, as far as its file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise OSError(error.errno, error.strerror, str(path)) from error
        _warn_unsynced(path if path.is_dir() else path.parent, error)


def _warn_unsynced(folder: Path, error: OSError) -> None:
    _warn_once(
        f"{folder}: its file system cannot sync ({error.strerror}): a power failure may cost what "
        "was just written there"
    )


@cache
def _warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


@contextmanager
def scratch_file() -> Iterator[IO[bytes]]:
    """A file without a name for what is on its way; errors of the system name its folder."""
    folder = os.environ.get(SCRATCH_VARIABLE) or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        if error.errno in DISK_ERRNOS and error.filename is None:
            raise OSError(error.errno, error.strerror, folder) from error
        raise


def path_of(file: IO[bytes]) -> Path:
    """A name for an open file that has none: nothing is left of it where the process is killed."""
    return Path(f"/proc/self/fd/{file.fileno()}")


def sha256_of(path: Path) -> str:
    """Hash of a file (hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def only_writer(folder: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Hold an output folder, or the part of it that ``name`` stands for, while a command writes.

    ``UserError`` naming host and process where another command holds it. On a file system without
    locks the other's record in the file decides, as far as its process can be seen from here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / name, lambda file: lock(file, folder, _holder(file))) as file:
        _write_holder(file)
        yield


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let processes through a block one after the other, by the lock file ``path``."""
    with _held(path, lambda file: lock(file, path.parent, wait=True)):
        yield


@contextmanager
def _held(path: Path, take: Callable[[IO[bytes]], bool]) -> Iterator[IO[bytes]]:
    """A lock file that is there only while it is held, so that none is left among the data."""
    while True:
        with open(path, "a+b") as file:
            locks = take(file)
            if locks and not _is_at(file, path):  # its last holder removed it meanwhile
                continue
            _OPEN.add(file)
            try:
                yield file
            finally:
                _OPEN.discard(file)
                with suppress(OSError):
                    if _is_at(file, path):
                        path.unlink()
                if locks:
                    fcntl.flock(file, fcntl.LOCK_UN)
            return


def _let_go() -> None:
    for file in _OPEN:
        file.close()
    _OPEN.clear()


os.register_at_fork(after_in_child=_let_go)


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def lock(
    file: IO[bytes], path: Path, holder: dict[str, Any] | None = None, wait: bool = False
) -> bool:
    """Lock an open file that stands for ``path``; whether its file system has locks.

    Where another process holds it, ``wait`` for that, or ``UserError``; so too where ``holder``
    (its record, if any) is alive. Without locks a warning says so, once.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD or _is_alive(holder or {}):
            raise UserError(
                f"{path}: another command writes to it ({_shown(holder or {})}): wait for it or "
                "stop it, or give another --out"
            ) from error
        last = f"; the last record there is of {_shown(holder)}" if holder else ""
        _warn_once(
            f"{path}: its file system has no locks ({error.strerror}): make sure that no other "
            f"command writes to it{last}"
        )
        return False
    return True


def _write_holder(file: IO[bytes]) -> None:
    with suppress(OSError):  # a full disk: the lock holds without its record
        file.truncate(0)
        holder = {"host": here(), "pid": os.getpid(), "start": _start_of(os.getpid())}
        file.write(json.dumps({**holder, "since": time.strftime("%F %T")}).encode())
        file.flush()


def _holder(file: IO[bytes]) -> dict[str, Any]:
    file.seek(0)
    try:
        found = json.loads(file.read(4096) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether a record's process still runs, where that can be seen: on this machine."""
    if holder.get("host") != here() or holder.get("pid") == os.getpid():
        return False
    start = _start_of(holder.get("pid", 0))
    return start is not None and start == holder.get("start")


def _start_of(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: numbers of processes come again."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, IndexError):
        return None


def _shown(holder: dict[str, Any]) -> str:
    if not holder:
        return "it left no record of itself"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
