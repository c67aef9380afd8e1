"""Analysis and resynthesis by one of xiph's demo programs, a process of its own for each mode.

Each wave goes through ``-features`` and then through the program's synthesis, as PCM of 16 kHz and
16 bit in whole frames of 10 ms. Both run over pipes: there is no file to leave behind, not even by
a process that is killed. The same wave gives the same answer. Another compiler or instruction set
may round otherwise, and then every later sample differs: the executable itself counts as the
weights, which are compiled into it, and another build is another dataset.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_specs.io.files import sha256_of
from pipeline.audio import DropSample, from_pcm, to_pcm
from pipeline.render.processors.interface import Params, Waves
from train.models import weights

FRAME = 160
"""10 ms: ``LPCNET_FRAME_SIZE``."""

LIMIT_SECONDS = 50.0
"""For one run, a fifth of real time by LPCNet's figures; the worker's guard gives up at 60 s."""

TAIL_CHARACTERS = 500


@dataclass(frozen=True)
class DemoProgram:
    """An executable, its synthesis mode, and what brings it.

    ``kind`` is the processor's and the name of its folder in the weights' cache; ``variable`` is
    the environment's that may hold its path; ``delay`` is by how many samples its answer lags.
    """

    kind: str
    executable: str
    variable: str
    synthesis: str
    brings: str
    delay: Callable[[Path], int] = lambda path: 0

    @property
    def hash_variable(self) -> str:
        """The environment variable that may hold the executable's SHA-256."""
        return f"{self.variable}_SHA256"

    def path(self) -> Path:
        """The variable's, else the one on the PATH, else the one in the weights' cache.

        One that came from an address is run only where its SHA-256 was said. Raises
        ``FileNotFoundError`` or ``PermissionError`` saying what to run or to set.
        """
        given = os.environ.get(self.variable) or shutil.which(self.executable)
        path = Path(given or weights.cached(self.kind) / self.executable).absolute()
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.kind} needs {self.executable}, which is not at {path}: {self.brings}"
            )
        self._require_pinned(path, from_elsewhere=not given and weights.at_an_address())
        if not os.access(path, os.X_OK):
            raise PermissionError(f"{path} cannot be executed: run chmod +x {path}")
        return path

    def _require_pinned(self, path: Path, from_elsewhere: bool) -> None:
        """Hold a program to the hash that is said of it; one from an address must have one."""
        pinned = os.environ.get(self.hash_variable, "")
        if not pinned and not from_elsewhere:
            return
        found = sha256_of(path)
        if not pinned:
            raise PermissionError(
                f"{path} came from an address and is not run unasked: set {self.hash_variable} to "
                f"the SHA-256 of the one that you built (this one has {found}), or "
                f"{self.variable} to its path"
            )
        if found != pinned:
            raise PermissionError(
                f"{path} is not run: its SHA-256 is {found}, {self.hash_variable} says {pinned}"
            )
        if from_elsewhere:
            path.chmod(0o755)

    def process(self, waves_BT: Waves, params: Sequence[Params]) -> Waves:
        """Analyse and resynthesise each wave, one after the other; the delay is taken out."""
        path, length = self.path(), waves_BT.shape[1]
        delay = self.delay(path)
        padded_BT = np.pad(waves_BT, ((0, 0), (0, delay + -(length + delay) % FRAME)))
        answers = [self.answer(path, to_pcm(wave_T)) for wave_T in padded_BT]
        return from_pcm(np.stack(answers)[:, delay : delay + length])

    def answer(self, path: Path, pcm: NDArray[np.int16]) -> NDArray[np.int16]:
        """Both modes in turn on whole frames: as many samples as were given."""
        features = self._run(path, "-features", pcm.tobytes())
        frames = len(pcm) // FRAME
        if not features or len(features) % (4 * frames):  # float32, how many a frame is theirs
            raise self._short("-features", f"{len(features)} bytes for {frames} frames")
        answer = self._run(path, self.synthesis, features)
        if len(answer) != pcm.nbytes:
            raise self._short(self.synthesis, f"{len(answer) // 2} samples for {len(pcm)}")
        return np.frombuffer(answer, np.int16)

    def _short(self, mode: str, gave: str) -> DropSample:
        return DropSample("processor_failed", f"{self.kind}: {self.executable} {mode} gave {gave}")

    def _run(self, path: Path, mode: str, data: bytes) -> bytes:
        """What a mode writes for ``data``. Raises ``DropSample``; ``OSError`` if it was killed."""
        pipe = subprocess.PIPE
        command = [str(path), mode, "/dev/stdin", "/dev/stdout"]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as child:
            _limit(child.pid)
            try:
                answer, complaint = child.communicate(data, timeout=LIMIT_SECONDS)
            except BaseException as error:
                child.kill()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                detail = f"{self.kind}: {self.executable} {mode} took more than {LIMIT_SECONDS:g} s"
                raise DropSample("processor_timeout", detail) from None
        if child.returncode:
            raise self._failure(path, mode, child.returncode, complaint)
        return answer

    def _failure(self, path: Path, mode: str, code: int, complaint: bytes) -> Exception:
        said = complaint.decode(errors="replace").strip()[-TAIL_CHARACTERS:] or "it said nothing"
        if code == -signal.SIGKILL:  # as the kernel does where memory is short: no sample's fault
            return OSError(f"{path} {mode} was killed; is memory short?")
        what = f"{self.kind}: {self.executable} {mode}"
        if code < 0:
            name = signal.Signals(-code).name
            return DropSample("processor_crashed", f"{what}: {name}: {said}")
        return DropSample("processor_failed", f"{what}: exit status {code}: {said}")


def _limit(pid: int) -> None:
    """No core files; and one that hangs ends even where this process is gone before it."""
    seconds = int(LIMIT_SECONDS) + 10
    with suppress(ProcessLookupError):  # ended already
        resource.prlimit(pid, resource.RLIMIT_CPU, (seconds, seconds))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
