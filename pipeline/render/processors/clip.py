"""Hard clipping, as of an overloaded input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.render.processors.interface import Params, Processor, Waves


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Clip each wave at the level that its loudest ``share`` of samples exceeds."""
    limits = [
        np.quantile(np.abs(wave), 1 - p["share"]) for wave, p in zip(waves_BT, params, strict=True)
    ]
    limits_B1 = np.asarray(limits, dtype=np.float32)[:, None]
    return np.clip(waves_BT, -limits_B1, limits_B1)


PROCESSOR = Processor(process)
