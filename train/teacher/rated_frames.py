"""Rated clips with their features: how they split, and which of them make a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_specs.io.errors import UserError
from data_specs.rated import RatedClip, read_rated
from train.data.hold_out import hold_out
from train.data.loading import ahead
from train.data.order import generator
from train.data.sources import digest_of, require_apart, require_once
from train.models.calibration import Doubles
from train.teacher.feature_cache import About, Bits, FrameCache, from_bits, left_out

STREAM_BATCH, _, STREAM_DROPOUT = range(3)
"""Which decision a random generator is for: one stream each, so that none moves another."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class RatedFrames:
    """Rated clips with their features: N rows, of which M train and V validate.

    ``frames`` (N, L, C) holds bf16 bit patterns, in the order of ``clips``.
    """

    about: About
    frames: Bits
    clips: Sequence[RatedClip]
    train_rows: Rows
    validation_rows: Rows

    @cached_property
    def mos(self) -> NDArray[np.float32]:
        """Ratings, 1 to 5."""
        return np.array([clip.mos for clip in self.clips], np.float32)

    @cached_property
    def training_counts(self) -> dict[str, int]:
        """Training clips of every dataset, by name."""
        counts = Counter(self.clips[row].dataset for row in self.train_rows)
        return dict(sorted(counts.items()))

    @cached_property
    def validation_sets(self) -> dict[str, Rows]:
        """Places in ``validation_rows`` of every validation set, by name."""
        names = np.array([self.clips[row].dataset for row in self.validation_rows])
        return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}

    def read(self, rows_B: Rows) -> Tensor:
        """Features (B, L, C), bf16, of these rows."""
        return from_bits(self.frames[rows_B])

    def digest(self, rows: Rows) -> str:
        """A hash of some of the clips: names and ratings, not where they lie."""
        return digest_of([self.clips[row] for row in rows])


def gather(
    rated: Sequence[Path], validation: Sequence[Path], seed: int
) -> tuple[list[RatedClip], list[bool]]:
    """Clips of all CSV files, and which of them validate: those of ``validation``, or a hold-out.

    Sorted by dataset and file name, so that one cache of features serves any split of the same
    clips. ``ValueError`` for a file that both trains and validates, or a CSV that is wrong.
    """
    training = [clip for path in rated for clip in read_rated(path)]
    validating = [clip for path in validation for clip in read_rated(path)]
    require_apart(training, validating)
    require_once([*training, *validating])
    held = [False] * len(training) if validating else hold_out(training, seed)
    pairs = [*zip(training, held, strict=True), *((clip, True) for clip in validating)]
    pairs.sort(key=lambda pair: (pair[0].dataset, pair[0].path.name, str(pair[0].path)))
    return [clip for clip, _ in pairs], [validates for _, validates in pairs]


def usable(cache: FrameCache, clips: Sequence[RatedClip], held: Sequence[bool]) -> RatedFrames:
    """The clips that have features.

    ``ValueError`` if none is left to train on, or less than the two that a universal scale needs.
    """
    rows = [row for row in range(len(clips)) if row not in cache.bad]
    train = np.array([row for row in rows if not held[row]], np.int64)
    validation = np.array([row for row in rows if held[row]], np.int64)
    for what, found, least in (("train on", train, 1), ("validate on", validation, 2)):
        if len(found) < least:
            why = left_out(cache, clips)
            raise UserError(
                f"{len(found)} clips to {what}, at least {least} needed{': ' if why else ''}{why}"
            )
    return RatedFrames(cache.about, cache.frames, clips, train, validation)


class Batch(NamedTuple):
    """What one step learns from: features (B, L, C) in bf16, ratings (B,), dataset numbers (B,).

    The numbers count the training datasets by name.
    """

    frames: Tensor
    mos: Tensor
    datasets: Tensor


class Draws:
    """Which clips make a batch: a pure function of (seed, step).

    A dataset is drawn with a probability in proportion to its clips, counted up to ``cap``
    (section IV-A: 7000), then one of its clips uniformly.
    """

    def __init__(self, data: RatedFrames, cap: int, batch: int, seed: int) -> None:
        self._data, self._batch, self._seed = data, batch, seed
        names_M = np.array([data.clips[row].dataset for row in data.train_rows])
        self._members = [data.train_rows[names_M == name] for name in data.training_counts]
        weights_D = np.minimum([len(rows) for rows in self._members], cap)
        self.probabilities_D: Doubles = weights_D / weights_D.sum()

    def rows(self, step: int) -> tuple[Rows, Rows]:
        """(rows (B,), dataset numbers (B,)) of the batch of step ``step`` (0-based)."""
        draw = generator(self._seed, STREAM_BATCH, step)
        datasets_B = draw.choice(len(self._members), self._batch, p=self.probabilities_D)
        places_B = draw.random(self._batch)
        rows = [
            self._members[dataset][int(place * len(self._members[dataset]))]
            for dataset, place in zip(datasets_B, places_B, strict=True)
        ]
        return np.array(rows, np.int64), datasets_B.astype(np.int64)

    def read(self, step: int) -> Batch:
        rows_B, datasets_B = self.rows(step)
        mos_B = torch.from_numpy(self._data.mos[rows_B])
        return Batch(self._data.read(rows_B), mos_B, torch.from_numpy(datasets_B))

    def feed(self, first: int, last: int) -> Generator[Batch, None, None]:
        """The batches of steps ``first`` to ``last`` (exclusive); a thread reads one ahead."""
        return ahead((self.read(step) for step in range(first, last)), 1)
