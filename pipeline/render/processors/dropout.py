"""Lost packets that nothing conceals."""

from __future__ import annotations

import numpy as np

from data_specs.io.rng import spelled_out
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave
from pipeline.render.processors.interface import Params, Processor, draw_pattern, each


def lose(wave: Wave, params: Params) -> Wave:
    """Silence a ``share`` of a wave's packets: one at least, but not all of a short clip."""
    packet = int(SAMPLE_RATE * params["packet_ms"] / 1000)
    count = -(-len(wave) // packet)
    order = spelled_out(params["pattern"]).permutation(count)
    lost = np.zeros(count, dtype=bool)
    lost[order[: min(max(1, round(params["share"] * count)), count - 1)]] = True
    return np.where(np.repeat(lost, packet)[: len(wave)], np.float32(0), wave)


PROCESSOR = Processor(each(lose), draw_pattern)
