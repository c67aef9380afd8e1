"""Audio files for scoring: read and resampled as the published ``distillmos`` command does it.

The pipeline has its own reader (``pipeline/audio.py``, soxr). Here the resampler must be the
published one, because scores are compared with the published network's to 1e-4.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torchaudio
from numpy.typing import NDArray

from data_specs.sample import SAMPLE_RATE

Wave = NDArray[np.float32]

LARGEST_KERNEL = 20_000_000
"""Taps above which torchaudio's resampler (whose table grows with both rates) gives way to soxr."""


def read_mono(path: Path | str) -> tuple[Wave, int]:
    """First channel of a file as float32 (T,), and its sample rate in Hz.

    ``ValueError`` naming the file: not readable as audio, no samples, or values not finite.
    """
    try:
        wave_TC, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as audio: {error}") from error
    wave_T: Wave = np.ascontiguousarray(wave_TC[:, 0])
    check_wave(wave_T, str(path))
    return wave_T, int(rate)


def check_wave(wave_T: Wave, where: str) -> None:
    """``ValueError`` naming ``where`` if a wave has no samples or values that are not finite."""
    if wave_T.ndim != 1:
        raise ValueError(f"{where}: shape {wave_T.shape}; need one channel, shape (T,)")
    if not len(wave_T):
        raise ValueError(f"{where}: has no samples")
    if not np.isfinite(wave_T).all():
        raise ValueError(f"{where}: holds samples that are not finite (NaN or infinite)")


def to_16k(wave_T: Wave, rate: int) -> Wave:
    """Resample (T,) from ``rate`` Hz to 16 kHz with torchaudio's defaults, as distillmos does.

    ``ValueError`` for a rate that is not positive.
    """
    if rate <= 0:
        raise ValueError(f"sample rate {rate} Hz: must be positive")
    if rate == SAMPLE_RATE:
        return wave_T
    divisor = math.gcd(rate, SAMPLE_RATE)
    if (rate // divisor) * (SAMPLE_RATE // divisor) > LARGEST_KERNEL:
        return np.asarray(soxr.resample(wave_T, rate, SAMPLE_RATE, quality="VHQ"), np.float32)
    with torch.inference_mode():
        resampled_T: Wave = _resampler(rate)(torch.from_numpy(wave_T)).numpy()
    return resampled_T


@lru_cache(maxsize=16)
def _resampler(rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE)
