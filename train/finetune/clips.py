"""Labelled clips as batches: tasks in turn by their share, each with its own clips.

Which clips batch ``k`` has, and where they are cropped, follows from the seed and ``k`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_specs.io.errors import UserError
from data_specs.labelled import SPLITS, LabelledClip, Split
from data_specs.sample import SAMPLE_RATE
from train.audio import Wave, read_mono, to_16k
from train.data.loading import ahead
from train.data.order import Order

Read = Callable[[], Wave]
"""Gives a wave (T,) at 16 kHz."""

AHEAD = 4
"""Batches that are read while one is computed."""


class Batch(NamedTuple):
    """Clips of one task, zeros behind each; ``clean_BT``: their clean twins, where all have one."""

    task: str
    clips: list[LabelledClip]
    waves_BT: Tensor
    lengths_B: Tensor
    clean_BT: Tensor | None = None


@dataclass
class Waves:
    """Clips at 16 kHz, kept in memory as far as there is room."""

    limit_bytes: float
    readers: Mapping[Path, Read] = field(default_factory=dict)
    """Of clips that are no files of their own."""
    _kept: dict[Path, Wave] = field(default_factory=dict)
    _bytes: int = 0

    def read(self, path: Path) -> Wave:
        """A clip's first channel (T,). ``UserError`` naming a file that cannot be read."""
        if path in self._kept:
            return self._kept[path]
        wave_T = self.readers[path]() if path in self.readers else to_16k(*read_mono(path))
        if self._bytes + wave_T.nbytes <= self.limit_bytes:
            self._kept[path] = wave_T
            self._bytes += wave_T.nbytes
        return wave_T


@dataclass(frozen=True)
class TaskClips:
    """The clips of every task and split, and how to make batches of them."""

    clips: Mapping[str, Mapping[Split, Sequence[LabelledClip]]]
    waves: Waves
    samples: int
    """Longest part of a clip that is heard."""

    def batch(
        self, task: str, clips: Sequence[LabelledClip], crops: Sequence[float] | None = None
    ) -> Batch:
        """These clips, a longer one cropped at a share of what is over (without: the middle)."""
        places = [0.5] * len(clips) if crops is None else crops
        cut = [self._cut(c, c.path, p) for c, p in zip(clips, places, strict=True)]
        waves_BT, lengths_B = _stacked(cut)
        clean_BT = None
        if all(clip.clean for clip in clips):
            twins = [self._cut(c, c.clean or c.path, p) for c, p in zip(clips, places, strict=True)]
            if [len(wave_T) for wave_T in twins] != lengths_B.tolist():
                raise UserError(f"{clips[0].where}: a clean twin is not as long as its clip")
            clean_BT = _stacked(twins)[0]
        return Batch(task, list(clips), waves_BT, lengths_B, clean_BT)

    def _cut(self, clip: LabelledClip, path: Path, place: float) -> Wave:
        try:
            wave_T = self.waves.read(path)
        except (ValueError, OSError) as error:
            raise UserError(f"{clip.where}: {error}") from error
        start = int(max(0, len(wave_T) - self.samples) * place)
        return wave_T[start : start + self.samples]


def _stacked(waves: Sequence[Wave]) -> tuple[Tensor, Tensor]:
    lengths = [len(wave_T) for wave_T in waves]
    waves_BT = np.zeros((len(waves), max(lengths)), np.float32)
    for row_T, wave_T in zip(waves_BT, waves, strict=True):
        row_T[: len(wave_T)] = wave_T
    return torch.from_numpy(waves_BT), torch.tensor(lengths)


def by_task(
    clips: Sequence[LabelledClip], columns: Mapping[str, str]
) -> dict[str, dict[Split, list[LabelledClip]]]:
    """The clips that have each task's label, by split.

    ``UserError`` naming a task whose column no file has, or a split of it that is empty.
    """
    found: dict[str, dict[Split, list[LabelledClip]]] = {}
    for task, column in columns.items():
        labelled = [clip for clip in clips if getattr(clip, column) is not None]
        if not labelled:
            raise UserError(f"task {task} needs clips with a {column}: add a column {column!r}")
        found[task] = {s: [clip for clip in labelled if clip.split == s] for s in SPLITS}
        for split, some in found[task].items():
            if not some:
                raise UserError(
                    f"task {task}: no clip with a {column} has the split {split!r}: mark some"
                )
    return found


def turns(shares: Mapping[str, float], steps: int) -> list[tuple[str, int]]:
    """For each step its task, and which batch of it: always the task that is furthest behind."""
    done = dict.fromkeys(shares, 0)
    found = []
    for step in range(1, steps + 1):
        task = max(shares, key=lambda name: shares[name] * step - done[name])
        found.append((task, done[task]))
        done[task] += 1
    return found


@dataclass(frozen=True)
class Feed:
    """Training batches of steps ``first`` to ``last`` (exclusive), read ahead by a thread."""

    data: TaskClips
    shares: Mapping[str, float]
    steps: int
    batch: int
    seed: int

    def __call__(self, first: int, last: int) -> Generator[Batch, None, None]:
        """See ``train.loop.loop.Feed``."""
        orders = {
            task: Order((), len(self.data.clips[task]["train"]), self.seed, self.batch, 1.0)
            for task in self.shares
        }
        todo = turns(self.shares, self.steps)[first:last]
        made = (self._made(task, orders[task], number) for task, number in todo)
        with closing(ahead(made, AHEAD)) as batches:
            yield from batches

    def _made(self, task: str, order: Order, number: int) -> Batch:
        items, clips = order.items(number), self.data.clips[task]["train"]
        return self.data.batch(task, [clips[i.number] for i in items], [i.crop for i in items])


def seconds_to_samples(seconds: float) -> int:
    """Samples at 16 kHz."""
    return max(1, round(seconds * SAMPLE_RATE))
