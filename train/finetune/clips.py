"""Labelled clips as batches: tasks in turn by their share, each with its own clips.

Which clips batch ``k`` has, and where they are cropped, follows from the seed and ``k`` alone.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_specs.io.addresses import redacted
from data_specs.io.errors import UserError
from data_specs.io.waves import audible_samples
from data_specs.labelled import SPLITS, LabelledClip, Split
from train.audio import Wave
from train.data.loading import ahead
from train.data.order import Order
from train.data.shards import list_shards
from train.data.stream import PCM_SCALE, Read, ShardSamples, Waves

AHEAD = 4
"""Batches that are read while one is computed."""


class Batch(NamedTuple):
    """Clips of one task, zeros behind each; ``clean_BT``: their clean twins, where all have one."""

    task: str
    clips: list[LabelledClip]
    waves_BT: Tensor
    lengths_B: Tensor
    clean_BT: Tensor | None = None


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


def shard_clips(given: Sequence[str]) -> tuple[list[LabelledClip], Mapping[Path, Read]]:
    """The samples of ``SPLIT=FOLDER``s, and by their names how each is read.

    A folder's records are read once, for the scores. ``UserError`` for a split that is none, and
    as of ``list_shards``.
    """
    clips: list[LabelledClip] = []
    readers: dict[Path, Read] = {}
    for words in given:
        split, _, folder = words.partition("=")
        if split not in SPLITS or not folder:
            raise UserError(f"--shards {redacted(words)}: write train=FOLDER, validation= or test=")
        samples = ShardSamples(list_shards(folder))
        for number in range(len(samples)):
            path, mos = Path(folder) / str(number), samples.record(number).mos
            where = f"{redacted(folder)}: sample {number}"
            clips.append(
                LabelledClip(
                    path=path, dataset=Path(folder).name, split=split, mos=mos, where=where
                )
            )
            readers[path] = partial(_wave, samples, number)
    return clips, readers


def _wave(samples: ShardSamples, number: int) -> Wave:
    """What is heard of a sample, without the silence that fills it up."""
    pcm_T, _ = samples.read(number)
    return (pcm_T[: max(1, audible_samples(pcm_T))] / np.float32(PCM_SCALE)).astype(np.float32)
