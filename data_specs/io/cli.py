"""How every command ends: exit statuses, errors of users and of ours, signals."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from data_specs.io.errors import UserError

BAD_INPUT = 2
STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
"""Exit status by signal, as shells have it; a closed terminal ends a command as ``kill`` does."""

STOPPED_WORDS = "interrupted; run the same command again to go on"

OF_THE_MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOENT", "EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EIO", "ESTALE", "ENOTDIR"),
        *("EISDIR", "EEXIST", "ENAMETOOLONG", "EMFILE", "ENFILE", "ELOOP", "EFBIG", "EXDEV"),
        *("ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH", "ENODEV"),
        *("ENXIO", "ENOTCONN", "EADDRINUSE", "EADDRNOTAVAIL", "ENOTEMPTY", "ETXTBSY", "EBUSY"),
    )
)
"""Errors of the system that are the machine's or the user's, not ours."""


class Stopped(KeyboardInterrupt):
    """A signal ended the command: Ctrl-C, SIGTERM or SIGHUP."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


def run_command(work: Callable[[], int]) -> int:
    """Exit status of a command: its own, 2 for a user's error, 130 or 143 after a signal.

    A user's error is one sentence; any other error shows its traceback, and Python exits with 1.
    """
    for stream in (sys.stdout, sys.stderr):  # ASCII, and names that are not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with _signals():
        try:
            return work()
        except UserError as error:
            return _say(error)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return STOPPED[signal.SIGTERM]
        except OSError as error:
            if error.errno is not None and error.errno not in OF_THE_MACHINE:
                raise
            return _say(error)
        except KeyboardInterrupt as stop:
            print(STOPPED_WORDS, file=sys.stderr)
            return STOPPED[signal.Signals(getattr(stop, "number", signal.SIGINT))]


def _say(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        text = f"{os.fspath(error.filename)}: {error.strerror}"
    print(f"error: {text}", file=sys.stderr)
    return BAD_INPUT


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does; ``nohup`` stays in force."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [n for n in STOPPED if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)
