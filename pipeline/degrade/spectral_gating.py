"""Spectral noise gate: the batched torch gate of the ``noisereduce`` package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from data_specs.sample import SAMPLE_RATE
from pipeline.degrade.interface import Params, Processor, Waves
from pipeline.rng import spelled_out

FLOOR = 1e-7
"""-140 dBFS, under a 16-bit step: the non-stationary gate divides by the local mean magnitude, and
digital silence (the zeros after a short clip) would give NaN."""


@cache
def _gate(stationary: bool) -> Any:
    from noisereduce.torchgate import TorchGate

    return TorchGate(sr=SAMPLE_RATE, nonstationary=not stationary)


@cache
def _floor(count: int) -> Waves:
    return (spelled_out(0).standard_normal(count) * FLOOR).astype("f4")


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Gate each wave; ``reduction`` is how much of the gated part is taken away (0 to 1)."""
    out = np.empty_like(waves_BT)
    for stationary in (False, True):
        rows = [i for i, p in enumerate(params) if bool(p["stationary"]) == stationary]
        if rows:
            reduction = np.array([params[i]["reduction"] for i in rows], dtype="f4")
            out[rows] = _run(waves_BT[rows], reduction, stationary)
    return out


def _run(waves_BT: Waves, reduction_B: Waves, stationary: bool) -> Waves:
    import torch

    gate = _gate(stationary)
    gate.prop_decrease = torch.from_numpy(reduction_B)[:, None, None]
    length = waves_BT.shape[1]
    # The inverse STFT returns whole hops only: pad to the next one and cut.
    padded = np.pad(waves_BT, ((0, 0), (0, -length % gate.hop_length + gate.hop_length)))
    padded = padded + _floor(padded.shape[1])
    return gate(torch.from_numpy(padded)).numpy()[:, :length]


PROCESSOR = Processor(process, packages=("noisereduce", "torch"), licence="MIT")
