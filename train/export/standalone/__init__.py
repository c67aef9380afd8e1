"""Score the quality of recorded speech as people would, 1 (bad) to 5 (excellent), on its own.

This package is what ``python -m train export --wheel`` puts into a wheel beside ``model.onnx``: it
needs numpy, onnxruntime, soundfile and soxr, and nothing of the project that made it. Scores are
that project's: the same resampler, the same windows, the same filling of short clips.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Model", "load", "score", "score_file"]

Wave = NDArray[np.float32]

RATE_HZ = 16_000
WINDOW_SAMPLES = 122_880
HOP_SAMPLES = 16_000
"""Windows of a longer clip start at most so far apart, spread evenly; their mean is its score."""

FADE_SAMPLES = 800
"""50 ms, over which the end of a repeated clip goes over into its beginning."""

FILTERS = {"soft": (6, 0.99), "sharp": (64, 0.9475937)}
"""Of the resampling filter, a sinc under a Hann window: lobes to a side, and its edge as a share of
half the lower rate, by the word in the model's file."""

MOST_TAPS = 20_000_000
"""Rates whose filter would be larger than this are resampled by soxr."""


class Model:
    """A scorer of speech quality; loaded once, it may be called from several threads."""

    def __init__(self, path: str | PathLike[str], threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session: onnxruntime.InferenceSession = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.about: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        """What the file says of itself: model, hash of its weights, how short clips are filled."""

    def score(self, wave: NDArray[Any], sample_rate: int) -> float:
        """Mean opinion score of one channel, shape (T,): floats, or int16 or int32 at full scale.

        ``ValueError`` for another shape, no samples, or values that are not finite.
        """
        wave_T = resampled(_as_floats(wave), sample_rate, self.about.get("resampler", "soft"))
        repeats = self.about.get("padding") == "repeat"
        scores = [
            float(self._session.run(None, {"waves": window_T[None]})[0][0])
            for window_T in windows(wave_T, repeats)
        ]
        return float(np.mean(scores))

    def score_file(self, path: str | PathLike[str]) -> float:
        """Mean opinion score of an audio file's first channel.

        ``ValueError`` naming a file that is not audio, or cannot be scored.
        """
        import soundfile

        try:
            wave_TC, rate = soundfile.read(path, dtype="float32", always_2d=True)
            return self.score(wave_TC[:, 0], rate)
        except (soundfile.SoundFileError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def _as_floats(wave: NDArray[Any]) -> Wave:
    wave_T = np.asarray(wave)
    if wave_T.ndim != 1 or not len(wave_T):
        raise ValueError(f"shape {wave_T.shape}: need one channel, shape (T,), not empty")
    scale = {"int16": 2**15, "int32": 2**31}.get(wave_T.dtype.name, 1)
    if scale == 1 and wave_T.dtype.kind != "f":
        raise ValueError(f"samples of type {wave_T.dtype}: need floats, int16 or int32")
    floats_T = np.ascontiguousarray(wave_T / scale, np.float32)
    if not np.isfinite(floats_T).all():
        raise ValueError("samples that are not finite (NaN or infinite)")
    return floats_T


def windows(wave_T: Wave, repeats: bool) -> Iterator[Wave]:
    """The pieces of 7.68 s that a clip at 16 kHz is scored in; a short one is filled up."""
    spare = len(wave_T) - WINDOW_SAMPLES
    if spare <= 0:
        yield repeated(wave_T) if repeats else np.pad(wave_T, (0, -spare))
        return
    for share in np.linspace(0, 1, math.ceil(spare / HOP_SAMPLES) + 1):
        yield wave_T[int(share * spare) :][:WINDOW_SAMPLES]


def repeated(wave_T: Wave) -> Wave:
    """A window of a short clip over and over, its end going over into its beginning."""
    while len(wave_T) < WINDOW_SAMPLES:
        fade = min(FADE_SAMPLES, len(wave_T) // 2)
        end, start = (
            part.astype(np.float64) for part in (wave_T[len(wave_T) - fade :], wave_T[:fade])
        )
        angle = (np.arange(fade) + 0.5) / max(fade, 1) * np.pi / 2
        energy = np.sqrt(np.sum(end**2) * np.sum(start**2))
        alike = round(max(0.0, float(np.sum(end * start))) / energy, 2) if energy else 0.0
        mixed = end * np.cos(angle) + start * np.sin(angle)
        mixed /= np.sqrt(1 + alike * np.sin(2 * angle))  # at equal power, alike or not
        parts = wave_T[: len(wave_T) - fade], mixed.astype(np.float32), wave_T[fade:]
        wave_T = np.concatenate(parts)
    return wave_T[:WINDOW_SAMPLES]


def resampled(wave_T: Wave, rate_hz: int, by: str = "soft") -> Wave:
    """The wave at 16 kHz; ``ValueError`` for a rate that is not a positive whole number."""
    if rate_hz != int(rate_hz) or rate_hz <= 0:
        raise ValueError(f"sample rate {rate_hz} Hz: need a positive whole number")
    divisor = math.gcd(int(rate_hz), RATE_HZ)
    old, new = int(rate_hz) // divisor, RATE_HZ // divisor
    if old == new:
        return wave_T
    if old * new > MOST_TAPS:
        import soxr

        return np.asarray(soxr.resample(wave_T, rate_hz, RATE_HZ, quality="VHQ"), np.float32)
    taps_NK, width = _filter(old, new, *FILTERS[by])
    padded_T = np.pad(wave_T, (width, width + old))
    # One row an output phase; a block of them for every ``old`` samples that come in.
    pieces_BK = np.lib.stride_tricks.sliding_window_view(padded_T, taps_NK.shape[1])[::old]
    count = math.ceil(new * len(wave_T) / old)
    return np.ascontiguousarray((pieces_BK @ taps_NK.T).reshape(-1)[:count])


@lru_cache(maxsize=8)
def _filter(old: int, new: int, lobes: int, edge: float) -> tuple[Wave, int]:
    """A filter for each of ``new`` phases, and how far it reaches, in samples that come in."""
    cutoff = min(old, new) * edge
    width = math.ceil(lobes * old / cutoff)
    phases_N = (np.arange(new) / new).astype(np.float32)  # rounded, as torchaudio has them
    times_NK = np.arange(-width, width + old) / old - phases_N[:, None]
    lobes_NK = np.clip(times_NK * cutoff, -lobes, lobes)
    hann_NK = np.cos(lobes_NK * np.pi / lobes / 2) ** 2
    return (np.sinc(lobes_NK) * hann_NK * cutoff / old).astype(np.float32), width


@lru_cache(maxsize=1)
def load() -> Model:
    """The model of this package, loaded at the first call."""
    return Model(Path(__file__).with_name("model.onnx"))


def score(wave: NDArray[Any], sample_rate: int) -> float:
    """Mean opinion score of one channel of speech; see ``Model.score``."""
    return load().score(wave, sample_rate)


def score_file(path: str | PathLike[str]) -> float:
    """Mean opinion score of an audio file; see ``Model.score_file``."""
    return load().score_file(path)
