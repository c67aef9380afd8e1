"""Processors in a process of their own, so that one that hangs or crashes takes only its sample.

Native code cannot be interrupted from within. A worker keeps one child that holds the processors,
sends it a batch at a time, and replaces it where it does not answer in time: ``limit_s`` for a
sample alone, for a group twice that or twice what so many samples took last time, and never more
than all its samples alone. A group that hangs is tried sample by sample. Starting does not count: a
child first loads a processor on half a second of a tone, for which it has ``LOAD_SECONDS``; one
that once took longer has ``limit_s``.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from data_specs.io.cli import signals_for_us_alone
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import DropSample
from pipeline.render.processors import runtime
from pipeline.render.processors.interface import Params, Run, Waves
from pipeline.render.processors.runtime import Runtime

TIME_LIMIT_S = 60.0
"""Per sample and processor: the slowest takes about 3 s on one core for 7.68 s of audio."""

LOAD_SECONDS = 300.0
"""For a child to import its libraries and load a processor's weights, perhaps from afar."""

END_SECONDS = 10.0
"""For a child that is killed to be gone: one that waits for a dead file system never is."""

PROBE = (0.1 * np.sin(0.3 * np.arange(SAMPLE_RATE // 2)))[None].astype(np.float32)
"""(1, T): what a processor is loaded on."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""So that numbers do not depend on a machine's cores; said before torch and numpy are there."""

CHILD = "import sys, pipeline.render.guard; sys.exit(pipeline.render.guard.main(sys.argv[1:]))"


class GuardError(Exception):
    """The processors' process failed in a way that is no sample's own; the attempt fails."""


class Guard(AbstractContextManager["Guard"]):
    """``run`` is ``processors.run`` in a child process with a time limit.

    Raises ``DropSample`` ("processor_timeout", "processor_crashed" and what ``processors.run``
    drops for), ``OSError`` as the processor raised it, ``GuardError`` for all else: out of memory,
    a child that was killed from outside, a broken contract.
    """

    def __init__(
        self,
        at: Runtime | None = None,
        limit_s: float = TIME_LIMIT_S,
        target: str = "pipeline.render.processors:run",
    ) -> None:
        self.at, self.limit_s, self.target = at or Runtime(), limit_s, target
        self._late: set[str] = set()
        self._pace: dict[str, float] = {}
        self._start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, kind: str, waves_BT: Waves, params: Sequence[Params]) -> Waves:
        """Run one processor over a group, as ``processors.run`` does."""
        self._load(kind, params[:1])
        count, began = len(waves_BT), time.monotonic()
        answer = self._ask((kind, waves_BT, params), kind, self._seconds(kind, count))
        self._pace[kind] = (time.monotonic() - began) / max(count, 1)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _seconds(self, kind: str, count: int) -> float:
        usual = 2 * max(self.limit_s, count * self._pace.get(kind, 0.0))
        return min(usual, max(count, 1) * self.limit_s)

    def _load(self, kind: str, params: Sequence[Params]) -> None:
        """Have a new child load a processor; that it fails on the probe is for the sample to say.

        Raises ``DropSample`` and ``GuardError`` as ``run`` does where it hangs or crashes.
        """
        if kind in self._loaded:
            return
        seconds = self.limit_s if kind in self._late else LOAD_SECONDS
        try:
            self._ask((kind, PROBE, params), kind, seconds, "did not start within")
        except DropSample as drop:
            if drop.reason == "processor_timeout":
                self._late.add(kind)
            raise
        self._loaded.add(kind)

    def _ask(
        self, request: object, kind: str, seconds: float, late: str = "no answer within"
    ) -> Any:
        """The child's answer. Both ways end with the time, whatever the child does or leaves."""
        line, expired = socket.socket(fileno=os.dup(self._connection.fileno())), threading.Event()
        timer = threading.Timer(seconds, _hang_up, [line, expired])
        timer.daemon = True
        timer.start()
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError):  # the latter in the middle of an answer; a processor's is one
            if not expired.is_set():
                raise self._died(kind) from None
        finally:
            timer.cancel()
            timer.join()
            line.close()
        if not expired.is_set():
            return answer
        self._restart()
        raise DropSample("processor_timeout", f"{kind}: {late} {seconds:g} s")

    def _died(self, kind: str) -> Exception:
        code = self._ended()
        self._restart()
        if code == -signal.SIGKILL:  # as the kernel does where memory is short
            return GuardError(f"{kind}: the processors' process was killed; is memory short?")
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return DropSample("processor_crashed", f"{kind}: its process ended with {name}")

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        handle = theirs.fileno()
        command = [sys.executable, "-c", CHILD, str(handle), self.target]
        # Not multiprocessing's own spawn: it would import the parent's main module, which is Ray's.
        with signals_for_us_alone():
            self._process = subprocess.Popen(
                [*command, self.at.device, self.at.precision], pass_fds=[handle], env=_environment()
            )
        theirs.close()  # so that its end, and ours, is seen by the other
        self._connection: Connection = ours
        self._loaded: set[str] = set()

    def _restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._connection.close()
        self._ended(0)

    def _ended(self, seconds: float = END_SECONDS) -> int:
        """The child's exit status; it is killed where it does not end by itself in time."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        return -signal.SIGTERM  # ours: not the kernel's where memory is short

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self.close()


def _hang_up(line: socket.socket, expired: threading.Event) -> None:
    """Wake whoever waits on a connection, whatever the process at its other end does."""
    expired.set()
    with suppress(OSError):  # its other end is gone
        line.shutdown(socket.SHUT_RDWR)


def _environment() -> dict[str, str]:
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **ONE_THREAD}


# --- the child ------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Answer requests until the parent closes its end."""
    handle, target, device, precision = argv
    _end_with_parent()
    warnings.filterwarnings("ignore", category=UserWarning)  # of libraries, about their own code
    runtime.use(Runtime(device, precision))
    module, _, name = target.partition(":")
    work: Run = getattr(importlib.import_module(module), name)
    connection = Connection(int(handle))
    while True:
        try:
            request = connection.recv()
        except (EOFError, ConnectionError):
            return 0
        connection.send(_answer(work, *request))


def _answer(work: Run, kind: str, waves_BT: Waves, params: Sequence[Params]) -> object:
    try:
        return work(kind, waves_BT, params)
    except DropSample as drop:
        return drop
    except OSError as error:
        return OSError(f"{kind}: {error}")
    except ImportError as error:
        return GuardError(f"{kind}: {error}")
    except Exception as error:  # of any type, some of which cannot be pickled
        return GuardError(f"{kind}: {type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """No orphans: the kernel ends us with the parent, even while native code runs."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
