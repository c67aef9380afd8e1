"""Scorers to compare, our own and external ones behind one interface, and their scores.

A scorer gives one or several outputs of a clip (DNSMOS gives four); every output is a model in the
tables. Clips that were scored before come out of the cache.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.io.progress import progress_bar
from data_specs.rated import RatedClip
from data_specs.teacher import MEAN, teacher_table
from train.audio import Wave
from train.data.shards import list_shards
from train.data.stream import PCM_SCALE, ShardSamples
from train.evaluation.external_scorers import (
    ExternalScorer,
    NotAvailable,
    Options,
    load_external,
    outputs_named,
)
from train.evaluation.records import SHARDS_SHORT, ClipScore, Failure, Output, Scored, Unavailable
from train.evaluation.score_cache import Key, ScoreCache
from train.scoring.base import WINDOWS_A_BATCH, Scorer
from train.scoring.score import load
from train.scoring.windows import Short

PADDINGS: dict[str, tuple[Short, ...]] = {
    "zero": ("zero",),
    "repeat": ("repeat",),
    "both": ("zero", "repeat"),
}
"""By ``--short``: how short clips are padded."""

Scores = tuple[list[ClipScore], list[Failure]]


class OwnScorer:
    """A scorer of ``train.scoring.score``: v7, a run, a model file, a teacher."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.name, self.weights_sha256 = scorer.name, scorer.weights_sha256
        self.version = f"distill-mos-factory {scorer.version} {scorer.precision}"
        self.parameters = scorer.parameters
        self.outputs = (Output(self.name, self.name, "overall quality"),)

    def paddings(self, asked: Sequence[Short]) -> Sequence[str]:
        """All of them."""
        return asked

    def score_files(self, paths: Sequence[Path], padding: str) -> Iterator[Scored]:
        """Score files, in order."""
        for found in self.scorer.score_files(paths, "repeat" if padding == "repeat" else "zero"):
            yield self._scored(found.mos, found.error or "")

    def score_windows(self, waves: Sequence[Wave]) -> list[Scored]:
        """Score windows of 7.68 s at 16 kHz."""
        return [self._scored(mos) for mos in self.scorer.score_windows(waves)]

    def _scored(self, mos: float | None, error: str = "") -> Scored:
        if mos is not None and not math.isfinite(mos):
            mos, error = None, f"{self.name} gives no finite score ({mos})"
        return Scored(None, error) if mos is None else Scored({self.name: mos})


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
            try:
                scorers.append(load_external(family, outputs, options))
            except NotAvailable as error:
                missing.append(Unavailable(family, error.reason, error.command))
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


def labelled_by(folder: Path, scorer: Scorer | ComparedScorer) -> bool:
    """Whether the shards' labels are this very model's: then there is nothing to compare."""
    samples = ShardSamples(list_shards(folder))
    return samples.record(0).teacher_sha256 == scorer.weights_sha256


def complete(found: Scores) -> list[ClipScore]:
    """The scores of every clip; ``UserError`` naming the first clip that has none."""
    if found[1]:
        raise UserError(found[1][0].error)
    return found[0]


def score_rated(
    scorer: ComparedScorer,
    clips: Sequence[RatedClip],
    padding: str,
    cache: ScoreCache | None = None,
    hashes: Sequence[str] | None = None,
) -> Scores:
    """Scores of rated clips (a record an output and clip), and the clips that have none.

    ``hashes`` are those of the clips' files; of equal files one is scored.
    """
    cache = cache or ScoreCache()
    hashes = hashes or [sha256_of(clip.path) for clip in clips]
    keys: list[Key] = [
        (scorer.weights_sha256, scorer.version, padding, sha256) for sha256 in hashes
    ]
    names = tuple(output.name for output in scorer.outputs)
    missing = {
        key: clip.path
        for key, clip in zip(keys, clips, strict=True)
        if cache.get(key, names) is None
    }
    errors = _score_missing(scorer, missing, padding, cache)
    scores, failures = [], []
    for key, clip in zip(keys, clips, strict=True):
        common = {"condition": clip.condition or "", "system": clip.system or ""}
        one = _records(scorer, clip.dataset, str(clip.path), clip.mos, key, cache, errors, common)
        scores += one[0]
        failures += one[1]
    return scores, failures


def _score_missing(
    scorer: ComparedScorer, missing: dict[Key, Path], padding: str, cache: ScoreCache
) -> dict[Key, str]:
    """Put what can be scored into the cache; why the rest cannot."""
    errors: dict[Key, str] = {}
    scored = scorer.score_files(list(missing.values()), padding)
    about = f"{scorer.name}, {padding}"
    bar = progress_bar(scored, total=len(missing), unit="clip", desc=about, disable=not missing)
    for key, found in zip(missing, bar, strict=True):
        if found.values is None:
            errors[key] = found.error
            print(f"not scored: {found.error}", file=sys.stderr)
        else:
            cache.put(key, found.values)
    return errors


def _records(
    scorer: ComparedScorer,
    name: str,
    path_or_key: str,
    truth: float,
    key: Key,
    cache: ScoreCache,
    errors: Mapping[Key, str],
    more: Mapping[str, str],
) -> Scores:
    """One clip's records, one an output; or its failures."""
    models = tuple(output.name for output in scorer.outputs)
    found = cache.get(key, models)
    if found is None:
        error = errors.get(key, "not scored")
        return [], [Failure(model, name, path_or_key, error) for model in models]
    return [
        ClipScore(
            model=model,
            set=name,
            path_or_key=path_or_key,
            truth=truth,
            score=found[model],
            short=key[2],
            weights_sha256=scorer.weights_sha256,
            clip_sha256=key[3],
            **more,
        )
        for model in models
    ], []


def score_shards(
    scorer: ComparedScorer, folder: Path, cache: ScoreCache | None = None, count: int | None = None
) -> Scores:
    """Scores of a folder's samples, all or ``count`` spread evenly, beside the stored labels."""
    cache = cache or ScoreCache()
    samples = ShardSamples(list_shards(folder))
    most = min(count or len(samples), len(samples))
    chosen = np.linspace(0, len(samples) - 1, most, dtype=int).tolist()
    scores: list[ClipScore] = []
    failures: list[Failure] = []
    about = f"{scorer.name}, {folder.name}"
    with progress_bar(total=len(chosen), unit="clip", desc=about) as bar:
        for start in range(0, len(chosen), WINDOWS_A_BATCH):
            numbers = chosen[start : start + WINDOWS_A_BATCH]
            found = _score_samples(scorer, folder.name, samples, numbers, cache)
            scores += found[0]
            failures += found[1]
            bar.update(len(numbers))
    return scores, failures


def _score_samples(
    scorer: ComparedScorer,
    name: str,
    samples: ShardSamples,
    numbers: Sequence[int],
    cache: ScoreCache,
) -> Scores:
    """One batch of samples."""
    records = [samples.record(number) for number in numbers]
    about = scorer.weights_sha256, scorer.version, SHARDS_SHORT
    keys: list[Key] = [(*about, record.pcm_sha256) for record in records]
    models = tuple(output.name for output in scorer.outputs)
    missing = [n for n, key in enumerate(keys) if cache.get(key, models) is None]
    waves = [samples.read(numbers[n])[0].astype(np.float32) / PCM_SCALE for n in missing]
    errors = {}
    for n, found in zip(missing, scorer.score_windows(waves) if waves else (), strict=True):
        if found.values is None:
            errors[keys[n]] = found.error
        else:
            cache.put(keys[n], found.values)
    scores, failures = [], []
    for record, key in zip(records, keys, strict=True):
        one = _records(scorer, name, record.key, record.mos, key, cache, errors, {})
        scores += one[0]
        failures += one[1]
    return scores, failures
