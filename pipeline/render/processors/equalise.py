"""A smooth random equaliser: the colour of a microphone, a telephone, a loudspeaker."""

from __future__ import annotations

import numpy as np

from data_specs.io.rng import Uniform
from data_specs.processors import Equalise
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave
from pipeline.draw import sample
from pipeline.render.processors.interface import Columns, Params, Processor, each

POINTS_HZ = (100, 300, 800, 1_800, 3_500, 7_000)
TAPS = 1_024
"""64 ms: long enough for the steepest slope between two points."""


def draw(spec: Equalise, uniform: Uniform, prefix: str) -> Columns:
    """Draw one gain for each control point, in dB."""
    return {f"gain_{f}_hz_db": sample(spec.gain_db, uniform(f"{prefix}.{f}")) for f in POINTS_HZ}


def equalise(wave: Wave, params: Params) -> Wave:
    """Apply a wave's curve with zero phase."""
    size = 1 << (len(wave) + TAPS - 1).bit_length()
    frequencies_hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    gains_db = [params[f"gain_{f}_hz_db"] for f in POINTS_HZ]
    curve_db = np.interp(np.log(np.maximum(frequencies_hz, 1.0)), np.log(POINTS_HZ), gains_db)
    spectrum = np.fft.rfft(wave, size) * 10 ** (curve_db / 20)
    return np.fft.irfft(spectrum, size)[: len(wave)].astype(np.float32)


PROCESSOR = Processor(each(equalise), draw)
