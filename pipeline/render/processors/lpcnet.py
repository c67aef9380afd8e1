"""LPCNet: features and resynthesis by xiph's ``lpcnet_demo`` (github.com/xiph/LPCNet, BSD).

The network samples with a generator of fixed seed. The program of that name in the Opus sources
synthesises with FARGAN instead.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from pipeline.audio import to_pcm
from pipeline.render.processors.demo_program import FRAME, DemoProgram
from pipeline.render.processors.interface import Processor

CENTRING = 80
"""Features come from 20 ms around the start of a frame: half a frame late (``TRAINING_OFFSET``)."""

PROBE_FRAMES = 32


@cache
def _delay(path: Path) -> int:
    """By how many samples the answer lags: 400 (25 ms) for the network of 2021, xiph/LPCNet#101.

    Half a frame, and one frame for each that the network looks ahead (``FEATURES_DELAY``). The look
    ahead comes with the network that a build has downloaded, and shows: so many frames at the
    beginning are exactly zero, whatever follows (``lpcnet_synthesize`` clears them).
    """
    probe = 0.3 * np.sin(0.3 * np.arange(PROBE_FRAMES * FRAME, dtype=np.float32))
    sounds = PROGRAM.answer(path, to_pcm(probe)).reshape(-1, FRAME).any(axis=1)
    if not sounds.any():
        raise OSError(f"{path} answers with silence: run make lpcnet to build it again")
    return int(np.argmax(sounds)) * FRAME + CENTRING


PROGRAM = DemoProgram(
    kind="lpcnet",
    executable="lpcnet_demo",
    variable="LPCNET_DEMO",
    synthesis="-synthesis",
    brings="run make lpcnet LPCNET_REF=COMMIT, or set LPCNET_DEMO to the path of one built from "
    "github.com/xiph/LPCNet",
    delay=_delay,
)

PROCESSOR = Processor(
    PROGRAM.process, licence="BSD-3-Clause", weights=lambda spec: [PROGRAM.path()]
)
