"""Hard clipping, as of an overloaded input."""

from __future__ import annotations

import numpy as np

from pipeline.audio import Wave
from pipeline.render.processors.interface import Params, Processor, each


def clip(wave: Wave, params: Params) -> Wave:
    """Clip a wave at the level that its loudest ``share`` of samples exceeds."""
    limit = np.float32(np.quantile(np.abs(wave), 1 - params["share"]))
    return np.clip(wave, -limit, limit)


PROCESSOR = Processor(each(clip))
