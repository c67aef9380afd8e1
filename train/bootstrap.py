"""Bootstrap intervals of correlations and errors, for all comparisons.

What is drawn with replacement are groups of clips: conditions where a set has them, because clips
of one condition are no independent evidence, else clips. All models of a set get the same draws, so
that differences between models have intervals too (paired). With a dozen conditions, or shards of
few speakers, intervals are somewhat too narrow: a bootstrap knows only what it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.data.order import generator
from train.pages import ranged

Doubles = NDArray[np.float64]
Statistic = Callable[[Doubles, ArrayLike, ArrayLike], Doubles]
"""Of clips with truth (N,) and score (N,), drawn as often as counts (R, N) say: (R,)."""

RESAMPLES = 2000
LEVEL = 0.95
FLAT = 1e-18
"""A sum of squares (MOS squared) below this is rounding: all values are equal."""

VALUES_AT_ONCE = 2_000_000
"""Entries of a (resamples, clips) table that are worked on at a time: 16 MB each copy."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; what is not defined is None, and ``reason`` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    def named(self, name: str) -> dict[str, Any]:
        """The fields of a record: ``name``, ``name_low`` and ``name_high``."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def text(self, sign: str = "") -> str:
        """``0.856 [0.790, 0.910]``, or what there is of it."""
        return ranged(self.value, self.low, self.high, sign)


def draws(groups: Sequence[str], seed: int, resamples: int = RESAMPLES) -> Doubles:
    """How often every clip is in every resample, (R, N); the clips of a group go together.

    ``groups`` (N,) names each clip's group; as many groups are drawn as there are. A pure
    function of its arguments. ``ValueError`` without clips.
    """
    if not len(groups):
        raise ValueError("no clips to draw from")
    names, member_N = np.unique(np.asarray(groups), return_inverse=True)
    shares = np.full(len(names), 1 / len(names))
    counts_RG = generator(seed, len(names)).multinomial(len(names), shares, resamples)
    return counts_RG[:, member_N].astype(np.float64)


def _in_parts(statistic: Statistic) -> Statistic:
    """Let a statistic work on as many resamples at a time as fit into ``VALUES_AT_ONCE``."""

    @functools.wraps(statistic)
    def whole(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
        parts = np.array_split(counts_RN, 1 + counts_RN.size // VALUES_AT_ONCE)
        return np.concatenate([statistic(part, truth, score) for part in parts])

    return whole


@_in_parts
def pearson(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    """Pearson's correlation in every resample, (R,); NaN where one side does not vary."""
    return _pearson(counts_RN, truth, score)


@_in_parts
def spearman(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    """Spearman's correlation in every resample, (R,); equal values share their mean rank."""
    return _pearson(counts_RN, _ranks(counts_RN, truth), _ranks(counts_RN, score))


def _pearson(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    # Values (N,), or (R, N) where they differ between resamples.
    x_RN, y_RN = _centred(counts_RN, truth), _centred(counts_RN, score)
    products_R = np.sum(counts_RN * x_RN * y_RN, axis=1)
    x_R, y_R = (np.sum(counts_RN * side**2, axis=1) for side in (x_RN, y_RN))
    defined = (x_R > FLAT) & (y_R > FLAT)
    return np.where(defined, products_R / np.sqrt(np.where(defined, x_R * y_R, 1.0)), np.nan)


def _centred(counts_RN: Doubles, values: ArrayLike) -> Doubles:
    values_RN = np.asarray(values, np.float64)
    means_R = np.sum(counts_RN * values_RN, axis=1) / counts_RN.sum(axis=1)
    centred: Doubles = values_RN - means_R[:, None]
    return centred


def _ranks(counts_RN: Doubles, values: ArrayLike) -> Doubles:
    """Rank of every clip within every resample, (R, N), a clip counted as often as it was drawn."""
    tied_RU, place_N = tied(counts_RN, values)
    middle_RU = np.cumsum(tied_RU, axis=1) - (tied_RU - 1) / 2
    middle_RN: Doubles = middle_RU[:, place_N]
    return middle_RN


def tied(counts_RN: Doubles, values: ArrayLike) -> tuple[Doubles, NDArray[np.intp]]:
    """How often every different value was drawn (R, U), and which of them every clip has (N,)."""
    found, place_N = np.unique(np.asarray(values, np.float64), return_inverse=True)
    order_N = np.argsort(place_N, kind="stable")
    first = np.searchsorted(place_N[order_N], np.arange(len(found)))
    return np.add.reduceat(counts_RN[:, order_N], first, axis=1), place_N


def kendall(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    """Kendall's tau-b in every resample (R,); NaN where one side does not vary.

    A clip that was drawn twice is two clips that are equal in both.
    """
    truth_N, score_N = np.asarray(truth, np.float64), np.asarray(score, np.float64)
    # Sums of products of -1, 0, 1 with counts: whole numbers, exact in float32 up to 2**24.
    signs_NN = np.sign(truth_N[:, None] - truth_N) * np.sign(score_N[:, None] - score_N)
    along_RN = counts_RN.astype(np.float32) @ signs_NN.astype(np.float32)
    both_R = np.sum(counts_RN * along_RN, axis=1)
    untied_R = _untied(counts_RN, truth_N) * _untied(counts_RN, score_N)
    defined_R = untied_R > 0
    return np.where(defined_R, both_R / np.sqrt(np.where(defined_R, untied_R, 1)), np.nan)


def _untied(counts_RN: Doubles, values_N: Doubles) -> Doubles:
    """Ordered pairs that differ, in every resample (R,)."""
    tied_R = np.sum(tied(counts_RN, values_N)[0] ** 2, axis=1)
    pairs_R: Doubles = counts_RN.sum(axis=1) ** 2 - tied_R
    return pairs_R


def rmse(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    """Root mean squared error in every resample, (R,)."""
    squares_N = (np.asarray(truth, np.float64) - np.asarray(score, np.float64)) ** 2
    errors_R: Doubles = np.sqrt(counts_RN @ squares_N / counts_RN.sum(axis=1))
    return errors_R


def interval(value: float | None, values_R: Doubles, gone: str = "not defined") -> Interval:
    """A value with the middle 95 % of what the resamples gave.

    No interval where a 40th of the resamples or more (as many as lie beyond one of its ends) have
    no value; ``gone`` says what that means.
    """
    if value is None:
        return Interval(None, reason=gone)
    undefined = float(np.mean(~np.isfinite(values_R)))
    if undefined >= (1 - LEVEL) / 2:
        return Interval(value, reason=f"no interval: {gone} in {undefined:.0%} of resamples")
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(values_R, [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def difference(
    ours: float | None, theirs: float | None, ours_R: Doubles, theirs_R: Doubles
) -> Interval:
    """``ours - theirs``, with the interval of the difference in the same resamples."""
    if ours is None or theirs is None:
        return Interval(None, reason="a correlation is not defined")
    return interval(ours - theirs, ours_R - theirs_R)


def bootstrap_p(differences_R: Doubles) -> float | None:
    """Two-sided p of "no difference" from differences (R,) in resamples; None without any."""
    defined = differences_R[np.isfinite(differences_R)]
    if not len(defined):
        return None
    sides = np.sum(defined <= 0), np.sum(defined >= 0)
    return min(1.0, 2 * (int(min(sides)) + 1) / (len(defined) + 1))


def share_of_gap(
    labelled: float | None,
    distilled: float | None,
    teacher: float | None,
    resampled: Sequence[Doubles],
) -> Interval:
    """``(distilled - labelled) / (teacher - labelled)``: 0 as good as labelled-only, 1 as teacher.

    ``resampled`` are the three correlations (R,) in the same resamples. Not defined where the
    teacher is not above the labelled-only student.
    """
    if labelled is None or distilled is None or teacher is None:
        return Interval(None, reason="a correlation is not defined")
    if teacher <= labelled:
        return Interval(None, reason="no gap: the teacher is not above the labelled-only student")
    labelled_R, distilled_R, teacher_R = resampled
    gap_R = teacher_R - labelled_R
    open_R = gap_R > 0  # False for NaN
    shares_R = np.where(open_R, (distilled_R - labelled_R) / np.where(open_R, gap_R, 1.0), np.nan)
    share = (distilled - labelled) / (teacher - labelled)
    return interval(share, shares_R, "no gap")
