"""What is compared, loaded: our own scorers and those of others behind one interface.

A judge hears clips and gives one or several outputs (DNSMOS gives four); every output is a model in
the tables. Clips that were scored before come out of the cache.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from data_specs.io.errors import UserError
from data_specs.io.progress import progress_bar
from data_specs.io.tars import Span
from data_specs.rated import RatedClip
from data_specs.sample import SAMPLE_RATE
from train.audio import Wave, read_mono
from train.data.shards import list_shards
from train.data.stream import PCM_SCALE, ShardSamples
from train.data.tars import read_pcm, read_record
from train.evaluation.comparing.cache import Key, ScoreCache
from train.evaluation.comparing.others import Other, Output
from train.evaluation.comparing.rows import OWN_SHORT, SHARDS_SHORT, ClipScore, Failure
from train.scoring.code import made_with
from train.scoring.score import WINDOWS_A_BATCH, Scorer, Short
from train.scoring.scorer import torch_on

Place = tuple[Path, Span]
"""A tar and where a sample is in it."""


@dataclass(frozen=True)
class Heard:
    """What a judge said of one clip: its outputs' values by name, or why there are none."""

    values: dict[str, float] | None
    error: str = ""


class Judge(Protocol):
    """A loaded scorer. ``ways`` are its ways with short clips."""

    name: str
    weights_sha256: str
    version: str
    parameters: int | None

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What it gives of a clip."""
        ...

    def ways(self, asked: Sequence[Short]) -> Sequence[str]:
        """Of the ways asked for, those that it has; others have their own only."""
        ...

    def hear_files(self, paths: Sequence[Path], way: str) -> Iterator[Heard]:
        """Score files, in order."""
        ...

    def hear_windows(self, waves: Sequence[Wave]) -> list[Heard]:
        """Score windows of 7.68 s at 16 kHz."""
        ...


class OurJudge:
    """A scorer of ``train.scoring.score``: v7, a run, a model file, a teacher."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.name, self.weights_sha256 = scorer.name, scorer.weights_sha256
        self.version = f"distill-mos-factory {scorer.version} {scorer.precision}"
        self.parameters = scorer.parameters

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The score."""
        return (Output(self.name, self.name, "overall quality"),)

    def ways(self, asked: Sequence[Short]) -> Sequence[str]:
        """See ``Judge.ways``."""
        return asked

    def hear_files(self, paths: Sequence[Path], way: str) -> Iterator[Heard]:
        """See ``Judge.hear_files``."""
        short: Short = "repeat" if way == "repeat" else "zero"
        for found in self.scorer.score_files(paths, short):
            yield self._heard(found.mos, found.error or "")

    def hear_windows(self, waves: Sequence[Wave]) -> list[Heard]:
        """See ``Judge.hear_windows``."""
        return [self._heard(mos) for mos in self.scorer.score_windows(waves)]

    def _heard(self, mos: float | None, error: str = "") -> Heard:
        if mos is not None and not math.isfinite(mos):
            mos, error = None, f"{self.name} gives no finite score ({mos})"
        return Heard(None, error) if mos is None else Heard({self.name: mos})


class OtherJudge:
    """A scorer of other people."""

    def __init__(self, other: Other, device: str = "cpu") -> None:
        self.other = other
        self.name, self.weights_sha256 = other.name, other.weights_sha256
        self.parameters = other.parameters
        self.version = f"{other.version}, {made_with(torch_on(torch.device(device)))}"

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Those that were asked for."""
        return self.other.outputs

    def ways(self, asked: Sequence[Short]) -> Sequence[str]:
        """See ``Judge.ways``."""
        return (OWN_SHORT,)

    def hear_files(self, paths: Sequence[Path], way: str) -> Iterator[Heard]:
        """See ``Judge.hear_files``."""
        for path in paths:
            try:
                wave_T, rate = read_mono(path)
            except UserError as error:
                yield Heard(None, str(error))
                continue
            yield self._heard(wave_T, rate, str(path))

    def hear_windows(self, waves: Sequence[Wave]) -> list[Heard]:
        """See ``Judge.hear_windows``."""
        return [self._heard(wave_T, SAMPLE_RATE, "a sample of the shards") for wave_T in waves]

    def _heard(self, wave_T: Wave, rate: int, where: str) -> Heard:
        try:
            return Heard(self.other.score(wave_T, rate))
        except UserError as error:
            return Heard(None, f"{where}: {error}")


def hear_rated(
    judge: Judge,
    clips: Sequence[RatedClip],
    hashes: Sequence[str],
    way: str,
    cache: ScoreCache,
) -> tuple[list[ClipScore], list[Failure]]:
    """Scores of rated clips (a row an output and clip), and the clips that have none.

    ``hashes`` are those of the clips' files; of equal files one is scored.
    """
    keys: list[Key] = [(judge.weights_sha256, judge.version, way, sha256) for sha256 in hashes]
    names = tuple(output.name for output in judge.outputs)
    missing = {
        key: clip.path
        for key, clip in zip(keys, clips, strict=True)
        if cache.get(key, names) is None
    }
    errors = _score_missing(judge, missing, way, cache)
    rows, failures = [], []
    for key, clip in zip(keys, clips, strict=True):
        found = cache.get(key, names)
        for name in names:
            if found is None:
                error = errors.get(key, "not scored")
                failures.append(Failure(name, clip.dataset, str(clip.path), error))
            else:
                rows.append(_row(judge, name, clip, found[name], way, key))
    return rows, failures


def _score_missing(
    judge: Judge, missing: dict[Key, Path], way: str, cache: ScoreCache
) -> dict[Key, str]:
    """Put what can be scored into the cache; why the rest cannot."""
    errors: dict[Key, str] = {}
    heard = judge.hear_files(list(missing.values()), way)
    bar = progress_bar(
        heard, total=len(missing), unit="clip", desc=f"{judge.name}, {way}", disable=not missing
    )
    for key, found in zip(missing, bar, strict=True):
        if found.values is None:
            errors[key] = found.error
            print(f"not scored: {found.error}", file=sys.stderr)
        else:
            cache.put(key, found.values)
    return errors


def _row(judge: Judge, name: str, clip: RatedClip, score: float, way: str, key: Key) -> ClipScore:
    return ClipScore(
        model=name,
        set=clip.dataset,
        path_or_key=str(clip.path),
        truth=clip.mos,
        score=score,
        short=way,
        weights_sha256=judge.weights_sha256,
        condition=clip.condition or "",
        system=clip.system or "",
        clip_sha256=key[3],
    )


def hear_shards(
    judge: Judge, folder: Path, cache: ScoreCache
) -> tuple[list[ClipScore], list[Failure]]:
    """Scores of every sample of a folder of shards, beside the stored label."""
    samples = ShardSamples(list_shards(folder))
    names = tuple(output.name for output in judge.outputs)
    rows: list[ClipScore] = []
    failures: list[Failure] = []
    with progress_bar(total=len(samples), unit="clip", desc=f"{judge.name}, {folder.name}") as bar:
        for places in batches(samples):
            records = [read_record(*place) for place in places]
            keys: list[Key] = [
                (judge.weights_sha256, judge.version, SHARDS_SHORT, one.pcm_sha256)
                for one in records
            ]
            errors = _hear_missing(judge, places, keys, cache, names)
            for record, key in zip(records, keys, strict=True):
                found = cache.get(key, names)
                for name in names:
                    if found is None:
                        error = errors.get(key, "not scored")
                        failures.append(Failure(name, folder.name, record.key, error))
                        continue
                    rows.append(
                        ClipScore(
                            model=name,
                            set=folder.name,
                            path_or_key=record.key,
                            truth=record.mos,
                            score=found[name],
                            short=SHARDS_SHORT,
                            weights_sha256=judge.weights_sha256,
                            clip_sha256=key[3],
                        )
                    )
            bar.update(len(places))
    return rows, failures


def _hear_missing(
    judge: Judge,
    places: Sequence[Place],
    keys: Sequence[Key],
    cache: ScoreCache,
    names: tuple[str, ...],
) -> dict[Key, str]:
    missing = [number for number, key in enumerate(keys) if cache.get(key, names) is None]
    if not missing:
        return {}
    waves = [wave_of(places[number]) for number in missing]
    errors = {}
    for number, heard in zip(missing, judge.hear_windows(waves), strict=True):
        if heard.values is None:
            errors[keys[number]] = heard.error
        else:
            cache.put(keys[number], heard.values)
    return errors


def batches(samples: ShardSamples, numbers: Sequence[int] | None = None) -> Iterator[list[Place]]:
    """The places of samples (all, or those numbers), a few at a time."""
    chosen = range(len(samples)) if numbers is None else numbers
    for start in range(0, len(chosen), WINDOWS_A_BATCH):
        yield [samples.locate(number) for number in chosen[start : start + WINDOWS_A_BATCH]]


def wave_of(place: Place) -> Wave:
    """A sample's audio (122880,), float32."""
    return read_pcm(*place).astype(np.float32) / PCM_SCALE
