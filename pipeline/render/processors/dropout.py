"""Lost packets that nothing conceals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_specs.io.rng import Uniform, spelled_out
from data_specs.processors import Dropout
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave
from pipeline.render.processors.interface import Columns, Params, Processor, Waves, draw_fields


def draw(spec: Dropout, uniform: Uniform, prefix: str) -> Columns:
    """Draw share, packet length, and the number that says which packets are lost."""
    pattern = np.floor(uniform(f"{prefix}.pattern") * 2**32)
    return draw_fields(spec, uniform, prefix) | {"pattern": pattern}


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Silence a ``share`` of each wave's packets."""
    return np.stack([_lose(wave, p) for wave, p in zip(waves_BT, params, strict=True)])


def _lose(wave: Wave, params: Params) -> Wave:
    packet = int(SAMPLE_RATE * params["packet_ms"] / 1000)
    count = -(-len(wave) // packet)
    order = spelled_out(params["pattern"]).permutation(count)
    lost = np.zeros(count, dtype=bool)
    # One at least, but never the whole of a clip that is shorter than a packet.
    lost[order[: min(max(1, round(params["share"] * count)), count - 1)]] = True
    return np.where(np.repeat(lost, packet)[: len(wave)], np.float32(0), wave)


PROCESSOR = Processor(process, draw)
