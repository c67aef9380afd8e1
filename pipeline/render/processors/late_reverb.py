"""Late reverberation alone: Polack's model of a room's tail, noise that decays exponentially."""

from __future__ import annotations

import numpy as np
from scipy.signal import oaconvolve

from data_specs.io.rng import spelled_out
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave
from pipeline.render.processors.interface import Params, Processor, draw_pattern, each

EARLY_SAMPLES = SAMPLE_RATE // 20
"""50 ms: the border between early and late of clarity C50 (ISO 3382-1)."""


def response(params: Params) -> Wave:
    """The direct sound and a tail 60 dB long: of energy 1 together, ``c50_db`` apart."""
    samples = int(params["rt60_s"] * SAMPLE_RATE)
    noise = spelled_out(params["pattern"]).standard_normal(samples)
    tail = noise * 10 ** (-3 * np.arange(samples) / samples)
    tail *= np.sqrt(10 ** (-params["c50_db"] / 10) / np.sum(tail**2))
    whole = np.concatenate([[1.0], np.zeros(EARLY_SAMPLES - 1), tail])
    return (whole / np.linalg.norm(whole)).astype(np.float32)


def reverberate(wave: Wave, params: Params) -> Wave:
    """Let a wave ring on, direct sound in place."""
    return oaconvolve(wave, response(params))[: len(wave)].astype(np.float32)


PROCESSOR = Processor(each(reverberate), draw_pattern, packages=("scipy",), licence="BSD-3-Clause")
