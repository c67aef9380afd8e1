"""Where a clip is scored: windows of 7.68 s, at most 1 s apart, spread evenly (published code)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from data_specs.io.errors import UserError
from data_specs.sample import CROP_SAMPLES
from train.audio import Clip, Wave

Mode = Literal["exact", "fast"]

MAX_HOP_SAMPLES = 16_000
"""Windows of a long clip start at most 1 s apart (published code)."""

MIN_SAMPLES = 400
"""What one frame of XLS-R or of MFCC is made of; shorter clips are padded."""

SEGMENT_SAMPLES = 60 * 16_000
"""The longest stretch whose windows share their convolutions."""

LEVELS_ALIKE = 4.0
"""Windows share convolutions while their peaks are within this ratio (12 dB)."""


@dataclass(frozen=True)
class WindowGroup:
    """Samples (T,) at 16 kHz and the windows in them: one, or several that share convolutions.

    ``start`` is where the samples start in the clip, ``offsets`` where the windows start in them.
    """

    wave_T: Wave
    start: int = 0
    offsets: tuple[int, ...] = (0,)
    peak: float = 0.0
    """What stands for the windows' own peaks, where they share convolutions."""


def checked(name: str, value: str, kind: Any) -> str:
    """Return a setting; ``ValueError`` where it is none of its ``Literal``'s values."""
    if value not in get_args(kind):
        raise UserError(f"{name}={value!r}: known are {', '.join(get_args(kind))}")
    return value


def window_count(samples: int) -> int:
    """How many windows a clip of that many samples at 16 kHz is scored in."""
    return math.ceil(max(0, samples - CROP_SAMPLES) / MAX_HOP_SAMPLES) + 1


def window_starts(samples: int, grid: int = 1) -> list[int]:
    """Where the windows of a clip start, in samples; each moved to the next multiple of ``grid``.

    Moved by half of ``grid`` at most, the last by less than ``grid``: it must end in the clip.
    """
    missing = max(0, samples - CROP_SAMPLES)
    starts = [int(share * missing) for share in np.linspace(0, 1, window_count(samples))]
    last = missing // grid * grid
    return [min(round(start / grid) * grid, last) for start in starts]


def whole(clip: Clip) -> Wave:
    """All samples of a clip at 16 kHz."""
    blocks = list(clip.blocks())
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def cut(clip: Clip, starts: Iterable[int]) -> Iterator[tuple[int, Wave]]:
    """(start, window (122880,)) of a clip of at least 7.68 s; holds a block and a window of it."""
    blocks = clip.blocks()
    held_T, first = np.zeros(0, np.float32), 0
    for start in starts:
        while first + len(held_T) < start + CROP_SAMPLES:
            block_T = next(blocks, None)
            if block_T is None:
                raise UserError(f"a clip of {clip.samples} samples ends at {first + len(held_T)}")
            held_T = np.concatenate([held_T[max(0, start - first) :], block_T])
            first = max(first, start)
        yield start, held_T[start - first : start - first + CROP_SAMPLES]
    for _ in blocks:  # a file that is shorter than it says must not pass for whole
        pass


def shared_parts(clip: Clip, grid: int) -> Iterator[WindowGroup]:
    """Stretches of at most a minute, of windows of similar level, that start on a grid."""
    group: list[tuple[int, Wave, float]] = []
    for start, window_T in cut(clip, window_starts(clip.samples, grid)):
        peak = float(np.abs(window_T).max())
        if group and not _may_join(group, start, peak):
            yield _joined(group)
            group = []
        group.append((start, window_T, peak))
    yield _joined(group)


def _may_join(group: list[tuple[int, Wave, float]], start: int, peak: float) -> bool:
    peaks = [peak, *(one for _, _, one in group)]
    alike = max(peaks) <= LEVELS_ALIKE * min(peaks)
    return alike and start + CROP_SAMPLES - group[0][0] <= SEGMENT_SAMPLES


def _joined(group: list[tuple[int, Wave, float]]) -> WindowGroup:
    starts = [start for start, _, _ in group]
    hops = np.diff(starts)
    ends = [
        window_T[CROP_SAMPLES - hop :]
        for hop, (_, window_T, _) in zip(hops, group[1:], strict=True)
    ]
    return WindowGroup(
        np.concatenate([group[0][1], *ends]),
        starts[0],
        tuple(start - starts[0] for start in starts),
        float(np.median([peak for _, _, peak in group])),
    )
