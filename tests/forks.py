"""Work in a child process that may end in any way."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def forked(
    work: Callable[[], int], said: Path, limit_s: float | None = None
) -> tuple[int | None, float]:
    """Exit status of work in a process group of its own (below 0: a signal's number; None: it was
    killed in time), and its peak in bytes; what it says is in a file."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setsid()
            _redirect(said)
            status = work()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 2 if end.code else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    handle = os.pidfd_open(pid)
    ended = bool(select.select([handle], [], [], limit_s)[0])
    os.close(handle)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, code, usage = os.wait4(pid, 0)
    with suppress(ProcessLookupError):  # nothing is left of its group
        os.killpg(pid, signal.SIGKILL)
    return (os.waitstatus_to_exitcode(code) if ended else None), usage.ru_maxrss * 1024.0


def _redirect(said: Path) -> None:
    words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (words, 1), (words, 2)):
        os.dup2(source, target)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
