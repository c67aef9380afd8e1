"""Modulated noise reference unit (ITU-T P.810): noise that follows the speech, as a coarse coder's
does; the anchor of most listening tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_specs.io.rng import Uniform, spelled_out
from data_specs.processors import Mnru
from pipeline.audio import Wave
from pipeline.render.processors.interface import Columns, Params, Processor, Waves, draw_fields


def draw(spec: Mnru, uniform: Uniform, prefix: str) -> Columns:
    """Draw Q, and the number that the noise is spelled out from."""
    pattern = np.floor(uniform(f"{prefix}.pattern") * 2**32)
    return draw_fields(spec, uniform, prefix) | {"pattern": pattern}


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Add each wave times Gaussian noise, ``q_db`` below the wave (P.810, equation 1)."""
    return np.stack([_modulate(wave, p) for wave, p in zip(waves_BT, params, strict=True)])


def _modulate(wave: Wave, params: Params) -> Wave:
    noise = spelled_out(params["pattern"]).standard_normal(len(wave), dtype=np.float32)
    return wave * (1 + noise * np.float32(10 ** (-params["q_db"] / 20)))


PROCESSOR = Processor(process, draw)
