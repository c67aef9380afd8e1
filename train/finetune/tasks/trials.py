"""Trials of speaker verification: pairs of clips, equal error rate, smallest detection cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_specs.io.errors import UserError
from data_specs.io.text import read_text
from data_specs.labelled import LabelledClip
from data_specs.rated import file_of
from train.bootstrap import VALUES_AT_ONCE, Doubles, draws
from train.data.order import generator

TARGET_PRIOR = 0.01
"""How often a trial is of one speaker, for the cost; a miss and a false alarm cost the same (NIST
SRE 2008's prior with equal costs, as VoxCeleb's first lists have it)."""

MOST_PAIRS = 200_000
"""Where no list of trials is given, more pairs than these are thinned by drawing."""

STREAM_PAIRS = 5
"""Of ``train.data.order.generator``."""


class Trials(NamedTuple):
    """Pairs of clips by number (N,) and (N,), and which of them are one speaker's (N,)."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    is_target: NDArray[np.bool_]


def read_trials(path: Path) -> list[tuple[Path, Path]]:
    """The pairs of a list: lines ``1|0 path path``, paths relative to the file.

    Whether a pair is one speaker's the clips' labels say. ``UserError`` naming file and line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a list of trials has lines 1|0 path path")
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        cells, where = line.split(), f"{path}: line {number}"
        if len(cells) != 3 or cells[0] not in "01":
            raise UserError(f"{where}: {line[:80]!r} is no trial: write 1|0 path path")
        found.append((file_of(path, cells[1], where), file_of(path, cells[2], where)))
    return found


def trials_of(
    clips: Sequence[LabelledClip], pairs: Sequence[tuple[Path, Path]] | None = None
) -> Trials:
    """The listed trials among these clips; without a list every pair, at most ``MOST_PAIRS``.

    ``UserError`` where these are not trials of both kinds.
    """
    if pairs is None:
        first, second = np.triu_indices(len(clips), 1)
        if len(first) > MOST_PAIRS:
            chosen = generator(0, STREAM_PAIRS).choice(len(first), MOST_PAIRS, replace=False)
            first, second = first[chosen], second[chosen]
    else:
        places = {clip.path: number for number, clip in enumerate(clips)}
        known = [(places[a], places[b]) for a, b in pairs if a in places and b in places]
        first, second = np.array(known, np.int64).reshape(-1, 2).T
    names = np.array([clip.speaker for clip in clips])
    is_target = names[first] == names[second]
    if is_target.all() or not is_target.any():
        raise UserError(
            f"speakers: the {len(first)} trials of the split {clips[0].split!r} (such as "
            f"{clips[0].where}) are not of both kinds: two clips of a speaker, clips of two"
        )
    return Trials(first, second, is_target)


def drawn(trials: Trials, clips: Sequence[LabelledClip], seed: int) -> Doubles:
    """How often every trial is in every resample of the speakers: (R, N)."""
    counts_RC = draws([str(clip.speaker) for clip in clips], seed)
    first_RN, second_RN = counts_RC[:, trials.first], counts_RC[:, trials.second]
    return np.where(trials.is_target, first_RN, first_RN * second_RN)


def errors(
    scores_N: Doubles, is_target_N: NDArray[np.bool_], counts_RN: Doubles
) -> tuple[Doubles, Doubles]:
    """Equal error rate and smallest cost in every resample, (R,) each; NaN where a kind lacks.

    The rate is where the line through the points of false alarms and misses meets equality.
    """
    parts = np.array_split(counts_RN, 1 + counts_RN.size // VALUES_AT_ONCE)
    found = [_errors(scores_N, is_target_N, part) for part in parts]
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def _errors(
    scores_N: Doubles, is_target_N: NDArray[np.bool_], counts_RN: Doubles
) -> tuple[Doubles, Doubles]:
    order = np.argsort(scores_N, kind="stable")
    starts = np.flatnonzero(np.diff(scores_N[order], prepend=-np.inf))
    sums = []
    for kind in (is_target_N, ~is_target_N):
        tied_RU = np.add.reduceat((counts_RN * kind)[:, order], starts, axis=1)
        total_RK = np.cumsum(np.pad(tied_RU, ((0, 0), (1, 0))), axis=1)
        with np.errstate(invalid="ignore"):
            sums.append(total_RK / total_RK[:, -1:])
    miss_RK, alarm_RK = sums[0], 1 - sums[1]
    over_RK = miss_RK - alarm_RK
    after_R = np.maximum(1, (over_RK >= 0).argmax(axis=1))
    rows, before_R = np.arange(len(over_RK)), after_R - 1
    low_R, high_R = over_RK[rows, before_R], over_RK[rows, after_R]
    part_R = -low_R / (high_R - low_R)
    rate_R = (1 - part_R) * miss_RK[rows, before_R] + part_R * miss_RK[rows, after_R]
    cost_RK = TARGET_PRIOR * miss_RK + (1 - TARGET_PRIOR) * alarm_RK
    return rate_R, cost_RK.min(axis=1) / TARGET_PRIOR
