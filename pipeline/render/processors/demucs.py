"""Demucs, a denoiser in the waveform domain: dns48 and dns64 of the ``denoiser`` package.

The causal network of Defossez et al. 2020 (arXiv:2006.12847), built as the package's
``pretrained.py`` builds it: every clip is divided by its own standard deviation, padded on the
right only, raised to 64 kHz inside, and comes back in place and at its length. Its layers run as
``timewise`` has them: 7.68 s through dns48 take one core 0.57 s in fp32 and 0.33 s in bf16, where
the package's own call takes 1.2 s. Code and weights are CC BY-NC 4.0, so the package is not among
the project's own dependencies. What is imported of it needs nothing but torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data_specs.distributions import values
from data_specs.io.hardware import keep_freed_memory
from data_specs.processors import Demucs as Spec
from data_specs.sample import SAMPLE_RATE
from pipeline.render.processors import runtime
from pipeline.render.processors.interface import Params, Processor, Waves
from pipeline.render.processors.networks import (
    batches,
    building,
    groups,
    load_weights,
    read_checkpoint,
)
from pipeline.render.processors.timewise import Layer, conv, lstm, taps, transposed
from train.models import weights

INSTALL = "pip install --no-deps denoiser==0.1.5"
"""Without its dependencies: hydra below 1.0 and sounddevice are for training and live use."""

FILES = {48: "dns48-11decc9d8e3f0998.th", 64: "dns64-a7761ff99a7d5bb6.th"}
"""By width; the names under https://dl.fbaipublicfiles.com/adiyoss/denoiser/."""

BATCH = 4
"""On one core four clips take 14 % (dns48) and 27 % (dns64) less time each than one alone, in bf16:
the LSTM reads its weights once a step for all."""

RESAMPLE, DEPTH, KERNEL, STRIDE = 4, 5, 8, 4
"""The package's defaults, which both networks have."""

SINC_FRAME = 64
"""Samples that the resampling kernel's matrices take at once; at least its 56 zeros on a side."""


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Denoise each wave with the network of its own width, those of one width together."""
    out_BT = np.empty_like(waves_BT)
    for hidden, rows in groups([p["hidden"] for p in params]):
        for part in batches(len(rows), BATCH, BATCH):
            out_BT[rows[part]] = _denoise(waves_BT[rows[part]], hidden)
    return out_BT


def _denoise(waves_BT: Waves, hidden: int) -> Waves:
    import torch

    precision = runtime.current().precision
    with runtime.inference() as device:
        network = _network(weights_path(hidden), hidden, device, precision)
        return network.run(torch.from_numpy(waves_BT).to(device)).cpu().numpy()


@dataclass(frozen=True)
class Network:
    """The package's layers. ``encoder`` and ``decoder`` from the outside in and back out: a strided
    layer and the one that gates it, a gate and the layer that spreads it."""

    encoder: list[tuple[Layer, Layer]]
    memory: Layer
    decoder: list[tuple[Layer, Layer]]
    between_up: Layer
    between_down: Layer
    floor: float
    dtype: Any

    def run(self, waves_BT: Any) -> Any:
        """Denoise a batch at 16 kHz."""
        from torch.nn import functional

        length = waves_BT.shape[1]
        level_B1 = waves_BT.std(dim=1, keepdim=True)
        padded_BT = functional.pad(waves_BT / (self.floor + level_B1), (0, _whole(length) - length))
        fast_BT = self._upsample(self._upsample(padded_BT))
        out_BT = self._layers(fast_BT[:, :, None].to(self.dtype))[:, :, 0].float()
        return level_B1 * self._downsample(self._downsample(out_BT))[:, :length]

    def _layers(self, x_BTC: Any) -> Any:
        from torch.nn import functional

        skips = []
        for strided, gate in self.encoder:
            x_BTC = _gated(gate(functional.relu_(strided(x_BTC))))
            skips.append(x_BTC)
        x_BTC = self.memory(x_BTC)
        for gate, spread in self.decoder:
            skip_BTC = skips.pop()
            x_BTC = spread(_gated(gate(x_BTC + skip_BTC[:, : x_BTC.shape[1]])))
            x_BTC = functional.relu_(x_BTC) if skips else x_BTC
        return x_BTC

    def _upsample(self, x_BT: Any) -> Any:
        """Twice the rate: between every two samples what the package's sinc kernel gives."""
        import torch

        between_BT = _framewise(self.between_up, x_BT)
        return torch.stack([x_BT, between_BT], dim=2).flatten(1)

    def _downsample(self, x_BT: Any) -> Any:
        return 0.5 * (x_BT[:, ::2] + _framewise(self.between_down, x_BT[:, 1::2]))


def _gated(x_BTC: Any) -> Any:
    """``glu`` over channels. Torch's own takes three times as long where these are few."""
    value_BTC, gate_BTC = x_BTC.chunk(2, dim=2)
    return gate_BTC.contiguous().sigmoid_().mul_(value_BTC)


def _whole(length: int) -> int:
    """The package's ``valid_length``: the next length that every layer takes without a rest."""
    length *= RESAMPLE
    for _ in range(DEPTH):
        length = max(math.ceil((length - KERNEL) / STRIDE) + 1, 1)
    for _ in range(DEPTH):
        length = (length - 1) * STRIDE + KERNEL
    return math.ceil(length / RESAMPLE)


def _framewise(layer: Layer, x_BT: Any) -> Any:
    from torch.nn import functional

    batch, length = x_BT.shape
    frames_BNF = functional.pad(x_BT, (0, -length % SINC_FRAME)).reshape(batch, -1, SINC_FRAME)
    return layer(frames_BNF).reshape(batch, -1)[:, :length]


def _sinc(kernel_K: Any, first: int) -> Layer:
    """A long kernel over single samples, as matrices over frames of them and their neighbours.

    Output n is made of inputs ``n - first`` and on. The package's call, one channel in and out,
    takes half as long as all the layers together. In fp32 whatever the precision: it is cheap.
    """
    import torch

    size = SINC_FRAME
    weight_OX = torch.zeros(size, 3 * size, device=kernel_K.device)
    for i in range(size):
        weight_OX[i, size + i - first :][: len(kernel_K)] = kernel_K
    weight_OIK = weight_OX.reshape(size, 3, size).transpose(1, 2)
    return taps(weight_OIK, None, torch.float32, padding=1)


def weights_path(hidden: int) -> Path:
    """The official file of that width; ``FileNotFoundError`` saying what to run without it."""
    return weights.find(f"demucs-dns{hidden}") / FILES[hidden]


def _weights(spec: Spec) -> list[Path]:
    widths = [int(hidden) for hidden in values(spec.hidden)]
    weights.find_all(f"demucs-dns{hidden}" for hidden in widths)
    return [weights_path(hidden) for hidden in widths]


@cache
def _network(path: Path, hidden: int, device: Any, precision: str) -> Network:
    from train.models.precision import DTYPES

    with building(f"Demucs needs the denoiser package: {INSTALL}"):
        from denoiser.demucs import Demucs
        from denoiser.resample import kernel_upsample2

        whole = Demucs(hidden=hidden, sample_rate=SAMPLE_RATE)
    load_weights(whole, read_checkpoint(path), path)
    keep_freed_memory()
    whole.to(device)
    kernel_K, dtype = kernel_upsample2().flatten().to(device), DTYPES[precision]
    return Network(
        [(conv(layer[0], dtype), conv(layer[2], dtype)) for layer in whole.encoder],
        lstm(whole.lstm.lstm, dtype),
        [(conv(layer[0], dtype), transposed(layer[2], dtype)) for layer in whole.decoder],
        _sinc(kernel_K, len(kernel_K) // 2 - 1),
        _sinc(kernel_K, len(kernel_K) // 2),
        whole.floor,
        dtype,
    )


PROCESSOR = Processor(
    process,
    packages=("denoiser", "torch"),
    licence="CC-BY-NC-4.0",
    weights=_weights,
)
