"""Spectral noise gate: the batched torch gate of the ``noisereduce`` package."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from data_specs.io.rng import spelled_out
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave
from pipeline.render.processors.interface import Params, Processor, each

FLOOR = 1e-7
"""-140 dBFS, under a 16-bit step: the non-stationary gate divides by the local mean magnitude, and
digital silence (the zeros after a short clip) would give NaN."""


@cache
def _gate(stationary: bool) -> Any:
    from noisereduce.torchgate import TorchGate

    return TorchGate(sr=SAMPLE_RATE, nonstationary=not stationary)


@cache
def _floor(count: int) -> Wave:
    return (spelled_out(0).standard_normal(count) * FLOOR).astype("f4")


def gated(wave_T: Wave, params: Params) -> Wave:
    """Gate a wave; ``reduction`` is how much of the gated part is taken away (0 to 1).

    One at a time: in a group of ten each takes one core 1.4 times as long, all out of its caches.
    """
    import torch

    gate = _gate(bool(params["stationary"]))
    gate.prop_decrease = params["reduction"]
    length = len(wave_T)
    # The inverse STFT returns whole hops only: pad to the next one and cut. The gate refuses less
    # than two windows.
    whole = max(length + gate.hop_length, 2 * gate.win_length)
    padded_T = np.pad(wave_T, (0, whole + -whole % gate.hop_length - length))
    padded_T = padded_T + _floor(len(padded_T))
    return gate(torch.from_numpy(padded_T)[None])[0].numpy()[:length]


PROCESSOR = Processor(each(gated), packages=("noisereduce", "torch"), licence="MIT")
