"""Room, noise and level: pure functions on 16 kHz waves."""

from __future__ import annotations

import numpy as np
from scipy.signal import oaconvolve

from data_specs.io.waves import FADE_SAMPLES, audible_samples, cross_fade
from data_specs.sample import FRAME_SAMPLES
from pipeline.audio import DropSample, Wave

ACTIVE_RANGE_DB = 40.0
"""A frame is active when it is at most this far below the loudest one."""

SILENCE_DBFS = -70.0
PEAK = 0.99


def active_dbfs(wave: Wave) -> float:
    """Mean level of the active 20 ms frames, dB relative to a full-scale square wave.

    Pauses do not count, so that an SNR means the same for slow and for hurried talkers, nor does
    padding, so that it means the same for short clips; the last frame may be short. Returns
    ``-inf`` for digital silence.
    """
    wave = wave[: audible_samples(wave)]
    if not len(wave):
        return -np.inf
    starts = np.arange(0, len(wave), FRAME_SAMPLES)
    counts = np.minimum(FRAME_SAMPLES, len(wave) - starts)
    frames = fit_length(wave, len(starts) * FRAME_SAMPLES).reshape(-1, FRAME_SAMPLES)
    # A whole frame weighs exactly 1, so that levels of whole crops are the same to the last bit.
    weights = counts / FRAME_SAMPLES
    power = np.mean(frames.astype(np.float64) ** 2, axis=1) / weights
    loudest = power.max()
    if loudest == 0.0:
        return -np.inf
    active = power >= loudest * 10 ** (-ACTIVE_RANGE_DB / 10)
    return float(10 * np.log10(np.average(power[active], weights=weights[active])))


def require_sound(wave: Wave, what: str) -> float:
    """The active level, or ``DropSample`` where there is nothing to hear."""
    level_dbfs = active_dbfs(wave)
    if level_dbfs < SILENCE_DBFS:
        raise DropSample("silent", f"{what}: {level_dbfs:.0f} dBFS")
    return level_dbfs


def gain(wave: Wave, gain_db: float) -> Wave:
    """Amplify by ``gain_db``."""
    return (wave * np.float32(10 ** (gain_db / 20))).astype(np.float32)


def fit_length(wave: Wave, count: int) -> Wave:
    """Cut, or pad with zeros at the end as teacher and student do with short clips."""
    return np.pad(wave[:count], (0, max(0, count - len(wave)))).astype(np.float32)


def loop(wave: Wave, again: Wave, count: int) -> Wave:
    """``count`` samples: ``wave``, then ``again`` over and over, each going over into the next.

    A ``wave`` that is too short to be faded out is left out.
    """
    if len(wave) >= count or not len(again):
        return wave[:count]
    while len(again) < count:
        again = cross_fade(again, again)
    return again[:count] if len(wave) < FADE_SAMPLES else cross_fade(wave, again)[:count]


def reverberate(speech: Wave, response: Wave, what: str) -> Wave:
    """Convolve with a room impulse response, direct sound at time zero, active level kept.

    The level is that of where the speech is, not of what rings on over the padding behind it.
    """
    before_dbfs = require_sound(speech, "speech")
    if not len(response) or not np.any(response):
        raise DropSample("silent", f"{what}: the impulse response is all zeros")
    direct = int(np.argmax(np.abs(response)))
    wet = oaconvolve(speech, response[direct:], mode="full")[: len(speech)].astype(np.float32)
    return gain(wet, before_dbfs - require_sound(wet[: audible_samples(speech)], what))


def add_noise(speech: Wave, noise: Wave, snr_db: float, what: str) -> Wave:
    """Add noise so that the active levels of speech and noise differ by ``snr_db``.

    The levels are of what is audible together: noise over the padding behind the speech counts for
    nothing.
    """
    noise_dbfs = require_sound(noise[: audible_samples(speech)], what)
    return speech + gain(noise, require_sound(speech, "speech") - noise_dbfs - snr_db)


def set_level(wave: Wave, level_dbfs: float) -> Wave:
    """Bring the active level to ``level_dbfs``; lower where a peak would clip."""
    return guard_peak(gain(wave, level_dbfs - require_sound(wave, "speech")))


def guard_peak(wave: Wave) -> Wave:
    """Scale down so that no sample clips."""
    peak = float(np.max(np.abs(wave), initial=0.0))
    return wave if peak <= PEAK else (wave * np.float32(PEAK / peak)).astype(np.float32)
