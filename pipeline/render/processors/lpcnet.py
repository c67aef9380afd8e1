"""LPCNet: features and resynthesis by xiph's ``lpcnet_demo`` (github.com/xiph/LPCNet, BSD).

Each wave goes through ``lpcnet_demo -features`` and then ``lpcnet_demo -synthesis``, as PCM of
16 kHz and 16 bit in whole frames of 10 ms. Both run over pipes: there is no file to leave behind,
not even by a process that is killed. The network samples with a generator of fixed seed, so the
same wave gives the same answer. Another compiler or instruction set may round otherwise, and then
every later sample differs: the executable itself counts as the weights, and another build is
another dataset. The program of that name in the Opus sources synthesises with FARGAN instead.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_specs.io.files import sha256_of
from pipeline.audio import DropSample, Wave, from_pcm, to_pcm
from pipeline.render.processors.interface import Params, Processor, Waves
from train.models import weights

EXECUTABLE = "lpcnet_demo"
PATH_VARIABLE, HASH_VARIABLE = "LPCNET_DEMO", "LPCNET_DEMO_SHA256"

FRAME = 160
"""10 ms: ``LPCNET_FRAME_SIZE``."""

CENTRING = 80
"""Features come from 20 ms around the start of a frame: half a frame late (``TRAINING_OFFSET``)."""

PROBE_FRAMES = 32
LIMIT_SECONDS = 50.0
"""For one run, a fifth of real time by upstream's figures; the worker's guard gives up at 60 s."""

TAIL_CHARACTERS = 500


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Analyse and resynthesise each wave, one after the other; the delay is taken out."""
    path = executable()
    delay = _delay(path)
    return np.stack([_resynthesise(path, wave_T, delay) for wave_T in waves_BT])


def executable() -> Path:
    """``$LPCNET_DEMO``, else ``lpcnet_demo`` on the PATH, else the one in the weights' cache.

    One that came from an address is run only where its SHA-256 was said. Raises
    ``FileNotFoundError`` or ``PermissionError`` saying what to run or to set.
    """
    given = os.environ.get(PATH_VARIABLE) or shutil.which(EXECUTABLE)
    path = Path(given or weights.cached("lpcnet") / EXECUTABLE).absolute()
    if not path.is_file():
        raise FileNotFoundError(
            f"LPCNet needs {EXECUTABLE}, which is not at {path}: run make lpcnet "
            "LPCNET_REF=COMMIT, or set "
            f"{PATH_VARIABLE} to the path of one built from github.com/xiph/LPCNet"
        )
    _require_pinned(path, from_elsewhere=not given and weights.at_an_address())
    if not os.access(path, os.X_OK):
        raise PermissionError(f"{path} cannot be executed: run chmod +x {path}")
    return path


def _require_pinned(path: Path, from_elsewhere: bool) -> None:
    """Hold a program to the hash that is said of it; one from an address must have one."""
    pinned = os.environ.get(HASH_VARIABLE, "")
    if not pinned and not from_elsewhere:
        return
    found = sha256_of(path)
    if not pinned:
        raise PermissionError(
            f"{path} came from an address and is not run unasked: set {HASH_VARIABLE} to the "
            f"SHA-256 of the one that you built (this one has {found}), or {PATH_VARIABLE} to its "
            "path"
        )
    if found != pinned:
        raise PermissionError(
            f"{path} is not run: its SHA-256 is {found}, {HASH_VARIABLE} says {pinned}"
        )
    if from_elsewhere:
        path.chmod(0o755)


@cache
def _delay(path: Path) -> int:
    """By how many samples the answer lags: 400 (25 ms) for the network of 2021, xiph/LPCNet#101.

    Half a frame, and one frame for each that the network looks ahead (``FEATURES_DELAY``). The look
    ahead comes with the network that a build has downloaded, and shows: so many frames at the
    beginning are exactly zero, whatever follows (``lpcnet_synthesize`` clears them).
    """
    probe = 0.3 * np.sin(0.3 * np.arange(PROBE_FRAMES * FRAME, dtype=np.float32))
    sounds = _answer(path, to_pcm(probe)).reshape(-1, FRAME).any(axis=1)
    if not sounds.any():
        raise OSError(f"{path} answers with silence: run make lpcnet to build it again")
    return int(np.argmax(sounds)) * FRAME + CENTRING


def _resynthesise(path: Path, wave_T: Wave, delay: int) -> Wave:
    length = len(wave_T)
    padded = np.pad(wave_T, (0, delay + -(length + delay) % FRAME))
    return from_pcm(_answer(path, to_pcm(padded))[delay : delay + length])


def _answer(path: Path, pcm: NDArray[np.int16]) -> NDArray[np.int16]:
    """Both modes in turn on whole frames: as many samples as were given."""
    features = _run(path, "-features", pcm.tobytes())
    frames = len(pcm) // FRAME
    if not features or len(features) % (4 * frames):  # float32, how many a frame varies by version
        raise _short("-features", f"{len(features)} bytes for {frames} frames")
    answer = _run(path, "-synthesis", features)
    if len(answer) != pcm.nbytes:
        raise _short("-synthesis", f"{len(answer) // 2} samples for {len(pcm)}")
    return np.frombuffer(answer, np.int16)


def _short(mode: str, gave: str) -> DropSample:
    return DropSample("processor_failed", f"lpcnet: {EXECUTABLE} {mode} gave {gave}")


def _run(path: Path, mode: str, data: bytes) -> bytes:
    """What one mode writes for ``data``. Raises ``DropSample``, or ``OSError`` if it was killed."""
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
            detail = f"lpcnet: {EXECUTABLE} {mode} took more than {LIMIT_SECONDS:g} s"
            raise DropSample("processor_timeout", detail) from None
    if child.returncode:
        raise _failure(path, mode, child.returncode, complaint)
    return answer


def _limit(pid: int) -> None:
    """No core files; and one that hangs ends even where this process is gone before it."""
    seconds = int(LIMIT_SECONDS) + 10
    with suppress(ProcessLookupError):  # ended already
        resource.prlimit(pid, resource.RLIMIT_CPU, (seconds, seconds))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def _failure(path: Path, mode: str, code: int, complaint: bytes) -> Exception:
    said = complaint.decode(errors="replace").strip()[-TAIL_CHARACTERS:] or "it said nothing"
    if code == -signal.SIGKILL:  # as the kernel does where memory is short: not the sample's fault
        return OSError(f"{path} {mode} was killed; is memory short?")
    if code < 0:
        name = signal.Signals(-code).name
        return DropSample("processor_crashed", f"lpcnet: {EXECUTABLE} {mode}: {name}: {said}")
    detail = f"lpcnet: {EXECUTABLE} {mode}: exit status {code}: {said}"
    return DropSample("processor_failed", detail)


PROCESSOR = Processor(process, licence="BSD-3-Clause", weights=lambda: [executable()])
