"""Samples of shards as labelled clips: their teacher's score is the label ``mos``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_specs.io.addresses import redacted
from data_specs.io.errors import UserError
from data_specs.io.waves import audible_samples
from data_specs.labelled import SPLITS, LabelledClip
from train.audio import Wave
from train.data.shards import list_shards
from train.data.stream import PCM_SCALE, ShardSamples
from train.finetune.clips import Read


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
