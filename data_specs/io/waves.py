"""What is heard of a wave at 16 kHz, and what stands behind one that is shorter than a window."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_specs.sample import CROP_SAMPLES, FRAME_SAMPLES, SAMPLE_RATE

Wave = NDArray[np.float32]

Padding = Literal["zero", "repeat"]
"""Zeros (published), or the clip again, its end going over into its beginning."""

Resampler = Literal["soft", "sharp"]
"""To 16 kHz: torchaudio's defaults (published), which let through what folds over at 8 kHz, or a
filter that keeps that out, as the one that shards are made with (soxr)."""

FADE_SAMPLES = SAMPLE_RATE // 20
"""50 ms, over which one wave goes over into the next: a period of 20 Hz."""


def audible_samples(wave_T: NDArray[Any]) -> int:
    """How many samples come before the digital silence at the end.

    All of them where that is shorter than a frame, or where there is nothing else: a last sample of
    zero is no padding. A frame at least.
    """
    silent = int((wave_T[::-1] != 0).argmax()) if len(wave_T) else 0  # where all is: none
    count = max(len(wave_T) - silent, FRAME_SAMPLES)
    return count if len(wave_T) - count >= FRAME_SAMPLES else len(wave_T)


def cross_fade(wave: Wave, then: Wave) -> Wave:
    """One wave going over into another at equal power: a hard seam clicks, which students learn.

    Where the two are alike their sum would be louder: it is brought to the power of either.
    """
    fade = min(FADE_SAMPLES, len(wave) // 2, len(then) // 2)
    before, after = (part.astype(np.float64) for part in (wave[len(wave) - fade :], then[:fade]))
    angle = (np.arange(fade) + 0.5) / max(fade, 1) * np.pi / 2
    energy = np.sqrt(np.sum(before**2) * np.sum(after**2))
    # Rounded, so that a machine that sums in another order makes the same bytes.
    alike = round(max(0.0, float(np.sum(before * after))) / energy, 2) if energy else 0.0
    mixed = before * np.cos(angle) + after * np.sin(angle)
    mixed /= np.sqrt(1 + alike * np.sin(2 * angle))
    parts = [wave[: len(wave) - fade], mixed.astype(np.float32), then[fade:]]
    return np.concatenate(parts)


def filled(wave_T: Wave, padding: Padding) -> Wave:
    """A wave of at least ``CROP_SAMPLES``: a shorter one is filled up to that."""
    missing = CROP_SAMPLES - len(wave_T)
    if missing <= 0:
        return wave_T
    if padding == "zero":
        return np.pad(wave_T, (0, missing))
    while len(wave_T) < CROP_SAMPLES:
        wave_T = cross_fade(wave_T, wave_T)
    return wave_T[:CROP_SAMPLES]
