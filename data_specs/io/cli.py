"""How every command ends: exit statuses, errors of users and of ours, signals."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


_LAST: dict[int, signal.Signals] = {}
"""The signal that came: a library that is interrupted may raise a plain KeyboardInterrupt."""


class Stopped(KeyboardInterrupt):
    """A signal ended the command: Ctrl-C, SIGTERM or SIGHUP."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = signal.Signals(number)


def run_command(work: Callable[[], int]) -> int:
    """Exit status of a command: its own, 2 for a user's error, 130 or 143 after a signal.

    A user's error is one sentence; any other error shows its traceback, and Python exits with 1.
    """
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
            _ignore_signals()
            print(STOPPED_WORDS, file=sys.stderr)
            return STOPPED[getattr(stop, "number", None) or _LAST.get(0, signal.SIGINT)]


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
    """End the command, once: service managers send SIGTERM and SIGHUP together, and to all."""
    _ignore_signals(signal.SIGTERM, signal.SIGHUP)
    _LAST[0] = signal.Signals(number)
    raise Stopped(number)


def _ignore_signals(*numbers: signal.Signals) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in numbers or STOPPED:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_for_us_alone() -> Iterator[None]:
    """Keep signals to the whole process group from processes that are started meanwhile.

    They inherit the mask, through ``exec`` too, and end when this process ends them; a signal that
    comes here meanwhile is handled afterwards. A library's own handlers are taken out again.
    """
    handlers = {number: signal.getsignal(number) for number in STOPPED}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPED)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # one that was not installed from Python
                    signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def cancelled_early(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Of a pool's work, do no more than what is begun where the block ends by an error."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
