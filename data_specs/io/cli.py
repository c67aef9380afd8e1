"""How every command ends: exit statuses, errors of users and of ours, signals."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TextIO

from data_specs.io.errors import UserError

BAD_INPUT = 2
EXIT_STATUSES = (
    "exit status: 0 done; 1 not whole, or a mistake of the program (its traceback is shown); 2 "
    "wrong input, options or environment (one sentence says what to do); 130 Ctrl-C, 143 SIGTERM "
    "or SIGHUP: the same command goes on"
)
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
    with _signals():
        try:
            return work()
        except UserError as error:
            return _say(error)
        except BrokenPipeError:
            if not _is_unread(sys.stdout):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return STOPPED[signal.SIGTERM]
        except OSError as error:
            if error.errno not in OF_THE_MACHINE and error.errno and error.filename is None:
                raise
            return _say(error)
        except KeyboardInterrupt as stop:
            print(STOPPED_WORDS, file=sys.stderr)
            return STOPPED[signal.Signals(getattr(stop, "number", signal.SIGINT))]


def _is_unread(stream: TextIO) -> bool:
    """Whether the pipe's reader has gone: ``| head`` has seen enough."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


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
