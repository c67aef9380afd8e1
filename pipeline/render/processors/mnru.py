"""Modulated noise reference unit (ITU-T P.810): noise that follows the speech, as a coarse coder's
does; the anchor of most listening tests."""

from __future__ import annotations

import numpy as np

from data_specs.io.rng import spelled_out
from pipeline.audio import Wave
from pipeline.render.processors.interface import Params, Processor, draw_pattern, each


def modulate(wave: Wave, params: Params) -> Wave:
    """Add the wave times Gaussian noise, ``q_db`` below the wave (P.810, equation 1)."""
    noise = spelled_out(params["pattern"]).standard_normal(len(wave), dtype=np.float32)
    return wave * (1 + noise * np.float32(10 ** (-params["q_db"] / 20)))


PROCESSOR = Processor(each(modulate), draw_pattern)
