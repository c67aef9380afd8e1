"""Scorers to compare, our own and external ones behind one interface, and their scores.

A scorer gives one or several outputs of a clip (DNSMOS gives four); every output is a model in the
tables. Clips that were scored before come out of the cache.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_specs.io.errors import UserError
from data_specs.io.progress import progress_bar
from data_specs.io.waves import Padding
from data_specs.rated import RatedClip
from data_specs.teacher import MEAN, teacher_table
from train.audio import Wave
from train.data.shards import list_shards
from train.data.stream import PCM_SCALE, ShardSamples
from train.evaluation.external_scorers import (
    ExternalScorer,
    Options,
    load_external,
    outputs_named,
)
from train.evaluation.records import (
    OWN_PADDING,
    SHARDS_PADDING,
    ClipScore,
    Failure,
    Output,
    Scored,
    Unavailable,
)
from train.evaluation.score_cache import Key, ScoreCache
from train.scoring.base import WINDOWS_A_BATCH, Scorer
from train.scoring.score import load

PADDINGS: dict[str, tuple[Padding, ...]] = {
    "own": (),
    "zero": ("zero",),
    "repeat": ("repeat",),
    "both": ("zero", "repeat"),
}
"""By ``--padding``: behind short clips; none is what each model was trained to hear."""

Scores = tuple[list[ClipScore], list[Failure]]


class OwnScorer:
    """A scorer of ``train.scoring.score``: v7, a run, a model file, a teacher."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.name, self.weights_sha256 = scorer.name, scorer.weights_sha256
        self.version = f"distill-mos-factory {scorer.version} {scorer.precision}"
        self.parameters, self.padding = scorer.parameters, scorer.padding
        self.outputs = (Output(self.name, self.name, "overall quality"),)

    def score_files(self, paths: Sequence[Path], padding: str) -> Iterator[Scored]:
        """Score files, in order."""
        for found in self.scorer.score_files(paths, "repeat" if padding == "repeat" else "zero"):
            yield {self.name: found.mos} if found.mos is not None else str(found.error)

    def score_windows(self, waves: Sequence[Wave]) -> list[Scored]:
        """Score windows of 7.68 s at 16 kHz."""
        return [
            {self.name: mos} if math.isfinite(mos) else f"{self.name} gives no finite score ({mos})"
            for mos in self.scorer.score_windows(waves)
        ]


ComparedScorer = OwnScorer | ExternalScorer


def load_scorers(
    names: Sequence[str], options: Options
) -> tuple[list[ComparedScorer], list[Unavailable]]:
    """The scorers by name, and those that are known but cannot be had here.

    ``UserError`` for a name that is none, or if none of them can be had.
    """
    scorers: list[ComparedScorer] = []
    missing: list[Unavailable] = []
    for name in dict.fromkeys(names):
        external = outputs_named(name)
        for family, outputs in external:
            found = load_external(family, outputs, options)
            if isinstance(found, Unavailable):
                missing.append(found)
            else:
                scorers.append(found)
        if not external:
            try:
                scorers.append(OwnScorer(load(name, options.device)))
            except UserError as error:
                if name not in teacher_table().teachers and not name.startswith(MEAN):
                    raise
                reason, _, command = str(error).rpartition(": run ")
                missing.append(Unavailable(name, reason or command, command if reason else ""))
    for one in missing:
        print(f"{one.model} is not available: {one.reason}", file=sys.stderr)
    if not scorers:
        why = "; ".join(f"{one.model}: {one.reason}; {one.command}" for one in missing)
        raise UserError(f"none of the scorers can be had here: {why}")
    _require_once([output.name for scorer in scorers for output in scorer.outputs])
    return scorers, missing


def _require_once(models: Sequence[str]) -> None:
    twice = sorted({name for name in models if models.count(name) > 1})
    if twice:
        raise UserError(f"{twice[0]!r} is asked for twice: name it once with --model")


def score_sets(
    scorer: ComparedScorer,
    clips: Sequence[RatedClip],
    hashes: Sequence[str],
    folders: Sequence[Path],
    paddings: Sequence[Padding],
    cache: ScoreCache | None = None,
    count: int | None = None,
) -> Scores:
    """Scores of rated clips, with every padding, and of shards, and what could not be scored.

    ``hashes`` are those of the clips' files; ``count`` samples of each folder are taken, or all.
    Shards that the scorer labelled itself are left out: there it is right by definition.
    """
    cache = cache or ScoreCache()
    found: list[ClipScore | Failure] = []
    if clips:
        own = scorer.padding if isinstance(scorer, OwnScorer) else OWN_PADDING
        for padding in (paddings if isinstance(scorer, OwnScorer) else ()) or (own,):
            found += _score_rated(scorer, clips, hashes, padding, cache)
    for folder in folders:
        samples = ShardSamples(list_shards(folder))
        if samples.record(0).teacher_sha256 != scorer.weights_sha256:
            found += _score_shards(scorer, folder.name, samples, count, cache)
    scores = [one for one in found if isinstance(one, ClipScore)]
    return scores, [one for one in found if isinstance(one, Failure)]


def _score_rated(
    scorer: ComparedScorer,
    clips: Sequence[RatedClip],
    hashes: Sequence[str],
    padding: str,
    cache: ScoreCache,
) -> Iterator[ClipScore | Failure]:
    blank = ClipScore("", "", "", math.nan, math.nan, padding, scorer.weights_sha256)
    blanks = [
        replace(
            blank,
            set=clip.dataset,
            path_or_key=str(clip.path),
            truth=clip.mos,
            condition=clip.condition or "",
            system=clip.system or "",
            clip_sha256=sha256,
        )
        for clip, sha256 in zip(clips, hashes, strict=True)
    ]

    def score(places: Sequence[int]) -> Iterator[Scored]:
        return scorer.score_files([clips[place].path for place in places], padding)

    return _score(scorer, blanks, score, cache, padding)


def _score_shards(
    scorer: ComparedScorer, name: str, samples: ShardSamples, count: int | None, cache: ScoreCache
) -> Iterator[ClipScore | Failure]:
    """All samples or ``count`` spread evenly."""
    most = min(count or len(samples), len(samples))
    chosen = np.linspace(0, len(samples) - 1, most, dtype=int).tolist()
    blank = ClipScore("", name, "", math.nan, math.nan, SHARDS_PADDING, scorer.weights_sha256)
    blanks = [
        replace(blank, path_or_key=one.key, truth=one.mos, clip_sha256=one.pcm_sha256)
        for one in map(samples.record, chosen)
    ]

    def score(places: Sequence[int]) -> Iterator[Scored]:
        for start in range(0, len(places), WINDOWS_A_BATCH):
            batch = [chosen[place] for place in places[start : start + WINDOWS_A_BATCH]]
            pcm_BT = (samples.read(number)[0] for number in batch)
            yield from scorer.score_windows([pcm.astype(np.float32) / PCM_SCALE for pcm in pcm_BT])

    return _score(scorer, blanks, score, cache, name)


def _score(
    scorer: ComparedScorer,
    blanks: Sequence[ClipScore],
    score: Callable[[Sequence[int]], Iterable[Scored]],
    cache: ScoreCache,
    about: str,
) -> Iterator[ClipScore | Failure]:
    """Fill in model and score of every clip's record, one an output, out of the cache where known.

    ``score`` gives the scores of the clips at some places of ``blanks``; of equal clips one.
    """
    names = tuple(output.name for output in scorer.outputs)
    keys: list[Key] = [
        (one.weights_sha256, scorer.version, one.padding, one.clip_sha256) for one in blanks
    ]
    missing = {key: n for n, key in enumerate(keys) if cache.get(key, names) is None}
    scored, about = score(list(missing.values())), f"{scorer.name}, {about}"
    bar = progress_bar(scored, total=len(missing), unit="clip", desc=about, disable=not missing)
    errors: dict[Key, str] = {}
    for key, found in zip(missing, bar, strict=True):
        if isinstance(found, str):
            errors[key] = found
            print(f"not scored: {found}", file=sys.stderr)
        else:
            cache.put(key, found)
    for key, blank in zip(keys, blanks, strict=True):
        values = cache.get(key, names)
        for name in names:
            if values is None:
                yield Failure(name, blank.set, blank.path_or_key, errors[key])
            else:
                yield replace(blank, model=name, score=values[name])
