"""Local files that are whole or not there, their hashes, and folders with one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data_specs.io.errors import UserError

FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The machine's own: the kernel gives it this number (PROC_PID_INIT_INO)."""

LOCK_FILE = ".lock"
"""In an output folder: held (flock) by the command that writes there; says which one."""

_OPEN: set[IO[bytes]] = set()
"""Lock files of this process. A child that it forks lets go of them: a worker that outlives a
killed command would else hold its lock."""

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""What flock answers where another process holds the lock; anything else: no locks here."""

UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF)
"""What file systems answer that cannot sync a folder."""


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
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Write ``path`` whole or not at all: temporary name, sync, rename, sync of the folder.

    Errors of the system name ``path``.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it and rename it to ``path``.

    For libraries that take a path; else ``whole_file``.
    """
    temporary = temporary_name(path)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # some libraries write 0600
        temporary.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files, in subfolders too, of processes that ended on this machine."""
    for path in folder.rglob(f".*.{here()}.*.tmp"):
        pid = path.name.split(".")[-3]
        if pid.isdigit() and _start_of(int(pid)) is None:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def _umask() -> int:
    """The process' umask; there is no call that reads it without setting it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022


def sync_folder(folder: Path) -> None:
    """Make names in a folder last; where the file system cannot, they last as long as it likes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hash of a file (hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold an output folder for as long as a command writes to it.

    ``UserError`` naming host and process where another command holds it. On a file system without
    locks the other's record in the file decides, as far as its process can be seen from here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "a+b") as file:
        locks = _lock(file, folder)
        _OPEN.add(file)
        try:
            _write_holder(file)
            yield
        finally:
            _OPEN.discard(file)
            with suppress(OSError):
                file.truncate(0)
            if locks:
                fcntl.flock(file, fcntl.LOCK_UN)


def _let_go() -> None:
    for file in _OPEN:
        file.close()
    _OPEN.clear()


os.register_at_fork(after_in_child=_let_go)


def _lock(file: IO[bytes], folder: Path) -> bool:
    """Whether the file system has locks. ``UserError`` where another process holds this one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(file)
        if error.errno in HELD or _is_alive(holder):
            raise UserError(
                f"{folder}: another command writes to it ({_shown(holder)}): wait for it or stop "
                "it, or give another --out"
            ) from error
        print(
            f"warning: {folder}: its file system has no locks ({error.strerror}): make sure that "
            "no other command writes to it",
            file=sys.stderr,
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
