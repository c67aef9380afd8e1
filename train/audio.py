"""Audio for scoring: read and resampled as the published ``distillmos`` command does it.

The pipeline resamples otherwise (``pipeline/audio.py``, soxr). The published student needs the
published resampler, for scores are compared with its own to 1e-4; students trained on shards need
one as sharp as the pipeline's: what folds over at 8 kHz they never heard (.7 MOS on clean speech at
48 kHz). A long file is read and resampled block by block: the samples are those of the whole file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
import torchaudio
from numpy.typing import NDArray
from torch import Tensor

from data_specs.io.audio import BadAudio, Recording, open_audio
from data_specs.io.errors import UserError
from data_specs.io.waves import Resampler
from data_specs.sample import SAMPLE_RATE

Wave = NDArray[np.float32]

FILTERS: dict[Resampler, tuple[int, float]] = {"soft": (6, 0.99), "sharp": (64, 0.9475937)}
"""Lobes to a side of torchaudio's sinc, and its edge as a share of half the lower rate: defaults of
torchaudio, and a long one that is over before that half."""

Samples = NDArray[Any] | Tensor

FULL_SCALE = {np.dtype(np.int16): 2.0**15, np.dtype(np.int32): 2.0**31}
"""What whole numbers are divided by."""

LARGEST_KERNEL = 20_000_000
"""Taps above which torchaudio's resampler (whose table grows with both rates) gives way to soxr."""

LONG_SECONDS = 180.0
"""Longer files are read in blocks."""

BLOCK_SECONDS = 30
"""Audio a block."""

MANY_CHANNELS = 8
"""A file of more channels counts as longer: all of them are read."""


@dataclass(frozen=True)
class Clip:
    """One channel of a recording on its way to a scorer: ``samples`` at 16 kHz, in blocks."""

    samples: int
    seconds: float
    blocks: Callable[[], Iterator[Wave]]
    """A fresh iterator over the samples at 16 kHz; ``ValueError`` where they cannot be had."""


def clip_of(wave: Samples, rate: float, where: str = "wave", resampler: Resampler = "soft") -> Clip:
    """Samples (T,) in memory as a clip; ``ValueError`` as ``as_wave`` and ``check_wave`` raise.

    Or for a rate that is not a positive whole number of Hz.
    """
    wave_T = as_wave(wave, where)
    if not math.isfinite(rate) or int(rate) != rate or rate <= 0:
        raise UserError(f"{where}: sample rate {rate} Hz: must be positive and whole")
    check_wave(wave_T, where)
    resampled_T = to_16k(wave_T, int(rate), resampler)
    return Clip(len(resampled_T), len(wave_T) / rate, lambda: iter((resampled_T,)))


def channels_of(path: Path) -> int:
    """Channels of an audio file; ``ValueError`` naming a file that cannot be read."""
    with _opened(path) as recording:
        return recording.header.channels


def open_clip(path: Path, channel: int = 0, resampler: Resampler = "soft") -> Clip:
    """One channel of a file; a file of more than ``LONG_SECONDS`` is read in blocks.

    ``ValueError`` naming the file as ``read_mono`` raises it, here or while the blocks are read.
    """
    with _opened(path) as recording:
        frames, rate = recording.header.frames, recording.header.sample_rate_hz
        wide = max(1.0, recording.header.channels / MANY_CHANNELS)
        if frames * wide <= LONG_SECONDS * rate:
            wave_TC = recording.whole()
            wave_T = np.ascontiguousarray(wave_TC[:, channel])
            return clip_of(wave_T, rate, str(path), resampler)
    return Clip(
        math.ceil(SAMPLE_RATE * frames / rate),
        frames / rate,
        lambda: _resampled(_blocks(path, channel, frames), rate, frames, resampler),
    )


def read_mono(path: Path | str) -> tuple[Wave, int]:
    """First channel of a file as float32 (T,), and its sample rate in Hz.

    ``ValueError`` naming the file: not readable as audio, no samples, or values not finite.
    """
    with _opened(path) as recording:
        wave_TC, rate = recording.whole(), recording.header.sample_rate_hz
    wave_T: Wave = np.ascontiguousarray(wave_TC[:, 0])
    check_wave(wave_T, str(path))
    return wave_T, rate


@contextmanager
def _opened(path: Path | str) -> Iterator[Recording]:
    try:
        with open_audio(path) as recording:
            yield recording
    except OSError as error:
        raise BadAudio(str(path), error.strerror or str(error)) from error


def _blocks(path: Path, channel: int, frames: int) -> Iterator[Wave]:
    with _opened(path) as recording:
        if recording.header.frames != frames:
            raise BadAudio(str(path), "damaged: it changed while it was read")
        for wave_TC in recording.blocks(BLOCK_SECONDS * recording.header.sample_rate_hz):
            wave_T = np.ascontiguousarray(wave_TC[:, channel])
            check_wave(wave_T, str(path))
            yield wave_T


def as_wave(wave: Samples, where: str) -> Wave:
    """Return samples (T,) as float32: floats as they are, int16 and int32 divided by full scale.

    Of any byte order and, of a tensor, on any device. ``UserError`` naming ``where`` for other
    types. Shape and values are for ``check_wave``.
    """
    array = _array(wave, where)
    dtype = array.dtype.newbyteorder("=")
    if dtype in FULL_SCALE:
        return (array / FULL_SCALE[dtype]).astype(np.float32)
    if dtype.kind != "f" and dtype.name != "bfloat16":  # which NumPy knows from other packages
        raise UserError(f"{where}: samples of type {dtype}: give floats, int16 or int32")
    with np.errstate(over="ignore"):  # what is too large for float32 is then not finite
        return np.asarray(array, np.float32, order="C")


def _array(wave: Samples, where: str) -> NDArray[Any]:
    try:
        if not isinstance(wave, Tensor):
            return np.asarray(wave)
        floats = wave.is_floating_point() and wave.dtype != torch.float64
        return (wave.float() if floats else wave).numpy(force=True)  # NumPy has no bfloat16
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        kind = f"{wave.dtype} ({wave.layout})" if isinstance(wave, Tensor) else type(wave).__name__
        raise UserError(
            f"{where}: samples of type {kind}: give floats, int16 or int32: {error}"
        ) from error


def check_wave(wave_T: Wave, where: str) -> None:
    """``ValueError`` naming ``where`` if a wave has no samples or values that are not finite."""
    if wave_T.ndim != 1:
        raise UserError(f"{where}: shape {wave_T.shape}; need one channel, shape (T,)")
    if not len(wave_T):
        raise UserError(f"{where}: has no samples")
    if not np.isfinite(wave_T).all():
        raise UserError(f"{where}: holds samples that are not finite (NaN or infinite)")


def to_16k(wave_T: Wave, rate: int, resampler: Resampler = "soft") -> Wave:
    """Resample (T,) from ``rate`` Hz to 16 kHz by torchaudio, "soft" as distillmos does.

    ``ValueError`` for a rate that is not positive.
    """
    if rate <= 0:
        raise UserError(f"sample rate {rate} Hz: must be positive")
    if rate == SAMPLE_RATE:
        return wave_T
    if _is_odd(rate):
        return np.asarray(soxr.resample(wave_T, rate, SAMPLE_RATE, quality="VHQ"), np.float32)
    with torch.inference_mode():
        resampled_T: Wave = _resampler(rate, resampler)(torch.from_numpy(wave_T)).numpy()
    return resampled_T


def _is_odd(rate: int) -> bool:
    divisor = math.gcd(rate, SAMPLE_RATE)
    return (rate // divisor) * (SAMPLE_RATE // divisor) > LARGEST_KERNEL


@lru_cache(maxsize=16)
def _resampler(rate: int, resampler: Resampler) -> torchaudio.transforms.Resample:
    lobes, edge = FILTERS[resampler]
    return torchaudio.transforms.Resample(
        rate, SAMPLE_RATE, lowpass_filter_width=lobes, rolloff=edge
    )


def _resampled(
    blocks: Iterable[Wave], rate: int, frames: int, resampler: Resampler
) -> Iterator[Wave]:
    if rate == SAMPLE_RATE:
        return iter(blocks)
    if _is_odd(rate):
        return _by_soxr(blocks, rate, math.ceil(SAMPLE_RATE * frames / rate))
    return _by_torchaudio(blocks, rate, resampler)


def _by_torchaudio(blocks: Iterable[Wave], rate: int, resampler: Resampler) -> Iterator[Wave]:
    """The blocks at 16 kHz, as ``to_16k`` of all of them: its filter sees ``around`` both ways."""
    divisor = math.gcd(rate, SAMPLE_RATE)
    step, steps_out = rate // divisor, SAMPLE_RATE // divisor  # samples in, samples out
    around = (math.ceil(_resampler(rate, resampler).width / step) + 1) * step
    held_T, context = np.zeros(0, np.float32), 0
    for block_T in blocks:
        held_T = np.concatenate([held_T, block_T])
        ready = (len(held_T) - around) // step * step
        if ready <= context:
            continue
        first, last = (place // step * steps_out for place in (context, ready))
        yield to_16k(held_T, rate, resampler)[first:last]
        kept = max(0, ready - around)
        held_T, context = held_T[kept:], ready - kept
    yield to_16k(held_T, rate, resampler)[context // step * steps_out :]


def _by_soxr(blocks: Iterable[Wave], rate: int, samples: int) -> Iterator[Wave]:
    """The blocks at 16 kHz, ``samples`` in all: soxr may end a sample earlier or later."""
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="VHQ")
    for block_T in blocks:
        out_T = np.asarray(stream.resample_chunk(block_T), np.float32)[:samples]
        samples -= len(out_T)
        yield out_T
    out_T = np.asarray(stream.resample_chunk(np.zeros(0, np.float32), last=True), np.float32)
    yield np.pad(out_T[:samples], (0, max(0, samples - len(out_T))))
