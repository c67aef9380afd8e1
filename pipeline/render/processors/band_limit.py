"""Linear-phase low-pass: the 4 kHz band limit of section IV-B."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.signal import firwin, oaconvolve

from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave
from pipeline.render.processors.interface import Params, Processor, each

TAPS = 255
"""About 150 Hz from pass band to 60 dB down at 16 kHz; odd, so that the delay is whole samples."""


@cache
def _filter(cutoff_hz: float) -> Wave:
    return np.asarray(firwin(TAPS, cutoff_hz, window=("kaiser", 5.65), fs=SAMPLE_RATE), "f4")


def low_pass(wave: Wave, params: Params) -> Wave:
    """Low-pass a wave at its ``cutoff_hz``, without delay."""
    return oaconvolve(wave, _filter(params["cutoff_hz"]), mode="same").astype(np.float32)


PROCESSOR = Processor(each(low_pass), packages=("scipy",), licence="BSD-3-Clause")
