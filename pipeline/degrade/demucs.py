"""Demucs, a denoiser in the waveform domain: dns48 and dns64 of the ``denoiser`` package.

The causal network of Defossez et al. 2020 (arXiv:2006.12847), built as the package's
``pretrained.py`` builds it and run as its offline ``enhance`` does: every clip is divided by its
own standard deviation, padded on the right only, raised to 64 kHz inside, and comes back in place
and at its length. Code and weights are CC BY-NC 4.0, so the package is not among the project's own
dependencies. Only its ``denoiser.demucs`` is imported, which needs nothing but torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.sample import SAMPLE_RATE
from pipeline import weights
from pipeline.degrade import runtime
from pipeline.degrade.interface import Params, Processor, Waves

INSTALL = "pip install --no-deps denoiser==0.1.5"
"""Without its dependencies: hydra below 1.0 and sounddevice are for training and live use."""

FILES = {48: "dns48-11decc9d8e3f0998.th", 64: "dns64-a7761ff99a7d5bb6.th"}
"""By width; the names under https://dl.fbaipublicfiles.com/adiyoss/denoiser/."""

FIRST_LAYER = "encoder.0.0.weight"
"""As many rows as the network is wide."""

BATCH = 4
"""More is no faster on one core, and costs memory: dns64 takes 0.2 GB for each clip of 7.68 s."""


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Denoise each wave with the network of its own width, those of one width together."""
    out_BT = np.empty_like(waves_BT)
    for hidden, rows in _batches(np.array([int(p["hidden"]) for p in params])):
        out_BT[rows] = _denoise(waves_BT[rows], hidden)
    return out_BT


def _batches(hidden_B: NDArray[np.int_]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    for hidden in np.unique(hidden_B):
        rows = np.flatnonzero(hidden_B == hidden)
        for start in range(0, len(rows), BATCH):
            yield int(hidden), rows[start : start + BATCH]


def _denoise(waves_BT: Waves, hidden: int) -> Waves:
    import torch

    with runtime.inference() as device:
        network = _network(weights_path(hidden), hidden, device)
        out_B1T = network(torch.from_numpy(waves_BT).to(device))
        return out_B1T[:, 0].float().cpu().numpy()


def weights_path(hidden: int) -> Path:
    """The official file of the network of that width.

    Raises ``FileNotFoundError`` saying what to run; nothing is downloaded.
    """
    return weights.find(f"demucs-dns{hidden}") / FILES[hidden]


@cache
def _network(path: Path, hidden: int, device: Any) -> Any:
    import torch

    try:
        from denoiser.demucs import Demucs
    except ImportError as error:
        raise ImportError(f"Demucs needs the denoiser package: {INSTALL}") from error
    # Building the network draws weights that are then replaced: not from the caller's generator.
    with torch.random.fork_rng(devices=[]):
        network = Demucs(hidden=hidden, sample_rate=SAMPLE_RATE)
    _load_weights(network, path, hidden)
    return network.eval().to(device)


def _load_weights(network: Any, path: Path, hidden: int) -> None:
    """Load a plain state dict. Raises ``OSError`` where it is damaged or another network's."""
    import torch

    damaged = (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if len(state[FIRST_LAYER]) == hidden:
            network.load_state_dict(state)
    except damaged as error:
        raise OSError(f"{path} is damaged, or of another network: {error!r}") from error
    if (width := len(state[FIRST_LAYER])) != hidden:
        raise OSError(f"{path} is of a network {width} channels wide, not {hidden}")


PROCESSOR = Processor(
    process,
    packages=("denoiser", "torch"),
    licence="CC-BY-NC-4.0",
    weights=lambda: [weights_path(hidden) for hidden in FILES],
)
