"""Processors in a process of their own, so that one that hangs or crashes takes only its sample.

Native code cannot be interrupted from within: a decoder in an endless loop or a network that
overruns its memory ends only with its process. The worker therefore keeps one child that holds the
processors, sends it a batch at a time, and replaces it where it does not answer in time.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_specs.io.cli import signals_for_us_alone
from pipeline.audio import DropSample
from pipeline.degrade import runtime
from pipeline.degrade.interface import Params, Waves
from pipeline.degrade.runtime import Runtime

TIME_LIMIT_S = 60.0
"""Per sample and processor: the slowest takes about 3 s on one core for 7.68 s of audio."""

LOAD_SECONDS = 300.0
"""Allowed on top where a processor runs first and may have to load its weights from afar."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""So that numbers do not depend on a machine's cores; said before torch and numpy are there."""

CHILD = "import sys, pipeline.guard; sys.exit(pipeline.guard.main(sys.argv[1:]))"


class GuardError(Exception):
    """The processors' process failed in a way that is no sample's own; the attempt fails."""


class Guard:
    """``run`` is ``degrade.run`` in a child process with a time limit.

    Raises ``DropSample`` ("processor_timeout", "processor_crashed" and what ``degrade.run`` drops
    for), ``OSError`` as the processor raised it, ``GuardError`` for all else: out of memory, a
    child that was killed from outside, a broken contract.
    """

    def __init__(
        self,
        at: Runtime | None = None,
        limit_s: float = TIME_LIMIT_S,
        target: str = "pipeline.degrade:run",
    ) -> None:
        self.at, self.limit_s, self.target = at or Runtime(), limit_s, target
        self._start()

    def run(self, kind: str, waves_BT: Waves, params: Sequence[Params]) -> Waves:
        """Run one processor over a group, as ``degrade.run`` does."""
        seconds = self.limit_s * len(waves_BT)
        answer = self._ask((kind, waves_BT, params), kind, seconds)
        self._loaded.add(kind)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ask(self, request: object, kind: str, seconds: float) -> Any:
        allowed = seconds + (0 if kind in self._loaded else LOAD_SECONDS)
        try:
            self._connection.send(request)
            if self._connection.poll(allowed):
                return self._connection.recv()
        except (EOFError, ConnectionError):
            raise self._died(kind) from None
        self._restart()
        raise DropSample("processor_timeout", f"{kind}: no answer within {allowed:g} s")

    def _died(self, kind: str) -> Exception:
        code = self._process.wait()
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
        """End the child."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self.close()


def _environment() -> dict[str, str]:
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **ONE_THREAD}


# --- the child ------------------------------------------------------------------------------------

Work = Callable[[str, Waves, Sequence[Params]], Waves]


def main(argv: Sequence[str]) -> int:
    """Answer requests until the parent closes its end."""
    handle, target, device, precision = argv
    _end_with_parent()
    warnings.filterwarnings("ignore", category=UserWarning)  # of libraries, about their own code
    runtime.use(Runtime(device, precision))
    module, _, name = target.partition(":")
    work: Work = getattr(importlib.import_module(module), name)
    connection = Connection(int(handle))
    while True:
        try:
            request = connection.recv()
        except (EOFError, ConnectionError):
            return 0
        connection.send(_answer(work, *request))


def _answer(work: Work, kind: str, waves_BT: Waves, params: Sequence[Params]) -> object:
    try:
        return work(kind, waves_BT, params)
    except DropSample as drop:
        return drop
    except OSError as error:
        return OSError(f"{kind}: {error}")
    except Exception as error:  # of any type, some of which cannot be pickled
        return GuardError(f"{kind}: {type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """No orphans: the kernel ends us with the parent, even while native code runs."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
