"""What a batch goes through before the student hears it. Pure functions of (seed, step)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_specs.sample import SAMPLE_RATE

SHORTEST_CROP_S = 1.0
STREAM_AUGMENT, STREAM_CROPS = 1_000, 1_001
"""Which decision a random generator is for: one stream each, so that none moves another."""


def augment(
    waves_BT: Tensor,
    lengths_B: Tensor,
    seed: int,
    step: int,
    crops: float = 0.0,
    rank: int = 0,
    world: int = 1,
) -> Tensor:
    """Flip the polarity of half of the waves, rotate each by a random time, and crop some.

    ``waves_BT`` are (B, T) with ``lengths_B`` (B,) samples each and zeros behind them. Polarity and
    rotation change nothing that a listener or the magnitudes' statistics would tell. ``crops`` is
    the share of clips that are cut to 1 s up to their length, and then repeated or (half of them)
    filled with zeros: a student that only saw whole windows takes the silence behind a short
    clip for a fault of it. The rows are ``rank``, ``rank + world``, ... of the joint batch, and
    get what they would get there.
    """
    draws = _Draws(seed, step, len(waves_BT) * world, crops)
    rows = range(rank, len(waves_BT) * world, world)
    return torch.stack(
        [
            draws.applied(wave_T, int(length), row)
            for wave_T, length, row in zip(waves_BT, lengths_B.tolist(), rows, strict=True)
        ]
    )


class _Draws:
    """The random decisions for every row of a joint batch."""

    def __init__(self, seed: int, step: int, rows: int, crops: float) -> None:
        draw = _generator(seed, STREAM_AUGMENT, step)
        self.sign = draw.integers(0, 2, rows) * 2 - 1
        self.shift = draw.random(rows)
        self.cropped, self.length, self.start, self.zeros = self._crops(seed, step, rows, crops)

    @staticmethod
    def _crops(seed: int, step: int, rows: int, crops: float) -> tuple[NDArray[np.float64], ...]:
        values = _generator(seed, STREAM_CROPS, step).random((4, rows))
        return values[0] < crops, values[1], values[2], values[3] < 0.5

    def applied(self, wave_T: Tensor, length: int, row: int) -> Tensor:
        """One wave (T,), augmented."""
        part = wave_T[:length]
        if self.cropped[row]:
            shortest = min(length, round(SHORTEST_CROP_S * SAMPLE_RATE))
            kept = round(shortest + self.length[row] * (length - shortest))
            first = round(self.start[row] * (length - kept))
            part = part[first : first + kept]
        part = part.roll(int(self.shift[row] * len(part))) * int(self.sign[row])
        return filled(part, len(wave_T), zeros=not self.cropped[row] or bool(self.zeros[row]))


def filled(wave_T: Tensor, samples: int, zeros: bool) -> Tensor:
    """A wave made ``samples`` long: zeros behind it, or itself again and again."""
    if len(wave_T) >= samples:
        return wave_T[:samples]
    if zeros:
        return torch.nn.functional.pad(wave_T, (0, samples - len(wave_T)))
    return wave_T.repeat(-(-samples // len(wave_T)))[:samples]


def _generator(seed: int, stream: int, step: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, step])))
