"""Real clips to calibrate and to compare with: one window of 7.68 s of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_specs.io.audio import audio_files_below
from data_specs.io.errors import UserError
from data_specs.io.waves import Resampler, filled
from data_specs.rated import read_rated
from data_specs.sample import CROP_SAMPLES, DATASET_FILE
from train.audio import Wave, read_mono, to_16k
from train.data.shards import list_shards
from train.data.stream import PCM_SCALE, ShardSamples


def read_clips(source: Path, count: int, resampler: Resampler = "soft") -> list[Wave]:
    """At most ``count`` windows (122880,), spread evenly over shards, rated clips or a folder.

    ``source`` is a folder of shards, a CSV of rated clips, or a folder of audio files; of a longer
    clip the middle is taken. ``ValueError`` naming the source or the file that cannot be read.
    """
    if count < 1:
        raise UserError(f"{count} clips of {source}: need at least 1")
    total, read = _opened(source, resampler)
    numbers = np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))
    return [read(int(number)) for number in numbers]


def _opened(source: Path, resampler: Resampler) -> tuple[int, Callable[[int], Wave]]:
    """How many clips there are, and what reads one."""
    if (source / DATASET_FILE).is_file():
        samples = ShardSamples(list_shards(source))
        return len(samples), lambda n: samples.read(n)[0].astype(np.float32) / PCM_SCALE
    if source.suffix.lower() == ".csv":
        files: Sequence[Path] = [clip.path for clip in read_rated(source)]
    elif source.is_dir():
        files = audio_files_below(source, "that can be read")
    else:
        raise UserError(f"{source}: give a folder of shards or of audio, or a CSV of rated clips")
    return len(files), lambda number: middle_window(files[number], resampler)


def middle_window(path: Path, resampler: Resampler = "soft") -> Wave:
    """The middle 7.68 s of a file at 16 kHz, or all of it and zeros."""
    wave_T = to_16k(*read_mono(path), resampler)
    start = max(0, len(wave_T) - CROP_SAMPLES) // 2
    return filled(wave_T[start : start + CROP_SAMPLES], "zero")
