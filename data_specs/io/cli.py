"""How every command begins and ends: verbs, exit statuses, errors of users and of ours, signals."""

from __future__ import annotations

import _thread
import argparse
import errno
import importlib
import os
import select
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import NoReturn, TextIO

from data_specs.io.errors import UserError
from data_specs.io.output import visible_output

BAD_INPUT = 2
EXIT_STATUSES = (
    "exit status: 0 done; 1 not whole, or a mistake of the program (its traceback is shown); 2 "
    "wrong input, options or environment (one sentence says what to do); 130 Ctrl-C, 143 SIGTERM "
    "or SIGHUP: the same command goes on"
)
STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
"""Exit status by signal, as shells have it; a closed terminal ends a command as ``kill`` does."""

AGAIN_S = 0.1
"""Until a lost signal is sent again: the callback has returned."""

STOPPED_WORDS = "interrupted; run the same command again to go on"

SYSTEM_ERRNOS = frozenset(
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


Verbs = Mapping[str, tuple[str, str]]
"""By verb: its module, with ``add_arguments(parser)`` and ``run(options)``, and what it does."""


def run_program(
    program: str,
    verbs: Verbs,
    argv: Sequence[str] | None = None,
    check: Callable[[str, argparse.Namespace], None] = lambda verb, options: None,
) -> int:
    """Run one verb of ``python -m PROGRAM``; returns its exit status (see ``EXIT_STATUSES``).

    Only the verb's own module is imported: help is quick, and scoring needs nothing of training.
    ``check`` may refuse a verb's options before it runs.
    """
    about = (f"  {verb:14} {does}" for verb, (_, does) in verbs.items())
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["verbs:", *about, "", textwrap.fill(EXIT_STATUSES, 80)]),
    )
    parser.add_argument("verb", choices=verbs, metavar="VERB", help="VERB --help says more")
    words = sys.argv[1:] if argv is None else list(argv)

    def run_verb() -> int:
        with signals_end_at_once():
            module = importlib.import_module(verbs[verb][0])
        parser = argparse.ArgumentParser(
            prog=f"python -m {program} {verb}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        options = parser.parse_args(words[1:])
        check(verb, options)
        return int(module.run(options))

    with visible_output():
        verb = parser.parse_args(words[:1]).verb
        return run_command(run_verb)


def run_command(work: Callable[[], int]) -> int:
    """Exit status of a command: its own, 2 for a user's error, 130 or 143 after a signal.

    A user's error is one sentence; any other error shows its traceback, and Python exits with 1.
    """
    came: list[int] = []
    with _handled(partial(_stop, came)), _never_lost():
        try:
            return work()
        except KeyboardInterrupt as stop:
            came.append(getattr(stop, "number", signal.SIGINT))
        except Exception as error:
            if not came:
                return _status_of(error)
            # Else a signal began it: libraries turn its exception into another.
            if isinstance(error, UserError | OSError):  # the state may not be saved
                _print_error(error)
        print(STOPPED_WORDS, file=sys.stderr)
        return STOPPED[signal.Signals(came[0])]


def end(status: int) -> NoReturn:
    """End the process; a second signal (Slurm sends two) no longer changes its exit status."""
    for number in STOPPED:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def _status_of(error: Exception) -> int:
    """Print a user's error and return its exit status; raise one of ours again."""
    if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STOPPED[signal.SIGTERM]
    if not isinstance(error, UserError) and not _is_system_error(error):
        raise error
    return _print_error(error)


def _is_system_error(error: Exception) -> bool:
    """Whether the system refused a file or a connection, or our code did so in its words."""
    if not isinstance(error, OSError):
        return False
    return not error.errno or error.errno in SYSTEM_ERRNOS or error.filename is not None


def _is_unread(stream: TextIO) -> bool:
    """Whether the pipe's reader has gone: ``| head`` has seen enough."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _print_error(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        text = f"{os.fspath(error.filename)}: {error.strerror}"
    print(f"error: {text}", file=sys.stderr)
    return BAD_INPUT


@contextmanager
def signals_wait() -> Iterator[list[int]]:
    """Let signals wait until the block is done: what it does is done whole; yields those that came.

    For what must not be cut in two: an update, a checkpoint, the start of workers.
    """
    came: list[int] = []
    try:
        with _handled(lambda number, frame: came.append(number)):
            yield came
    finally:
        if came:
            signal.raise_signal(came[0])


@contextmanager
def signals_end_at_once() -> Iterator[None]:
    """Let a signal end the process on the spot, where nothing is to be saved yet.

    For imports: they turn an exception into another, or lose it.
    """
    with _handled(_end_now):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Give SIGINT, SIGTERM and SIGHUP to ``handler``; ``nohup`` stays in force."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [n for n in STOPPED if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def _stop(came: list[int], number: int, frame: FrameType | None) -> NoReturn:
    came.append(number)
    raise Stopped(number)


@contextmanager
def _never_lost() -> Iterator[None]:
    """Send a signal again whose exception was swallowed: by a callback from C, or a finaliser."""
    before, main = sys.unraisablehook, threading.get_ident()

    def again(number: int) -> None:
        time.sleep(AGAIN_S)
        signal.pthread_kill(main, number)

    def on_loss(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, Stopped):
            # Not threading's, which waits here for its start, where the signal would be lost again.
            _thread.start_new_thread(again, (lost.exc_value.number,))
        else:
            before(lost)

    sys.unraisablehook = on_loss
    try:
        yield
    finally:
        sys.unraisablehook = before


def _end_now(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"{STOPPED_WORDS}\n".encode())
    os._exit(STOPPED[signal.Signals(number)])


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
