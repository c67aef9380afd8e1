"""Models judged on a held-out set, with bootstrap intervals.

An interval says how far a figure would move with other clips of the same kind. What is drawn with
replacement are groups of clips: conditions where a set has them, because clips of one condition are
no independent evidence, else clips. All models of a set are judged on the same draws, so that
differences between models have intervals too (paired). Intervals are the percentiles of 2000 draws.
With a dozen conditions they are somewhat too narrow: a bootstrap knows only the conditions it has.
So they are for shards whose samples come from few speakers: each sample counts as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.evaluation.comparing.rows import SHARDS_SHORT
from train.metrics import agreement

Doubles = NDArray[np.float64]

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


def draws(groups: Sequence[str], seed: int, resamples: int = RESAMPLES) -> Doubles:
    """How often every clip is in every resample, (R, N); the clips of a group go together.

    ``groups`` (N,) names each clip's group; as many groups are drawn as there are. A pure
    function of its arguments. ``ValueError`` without clips.
    """
    if not len(groups):
        raise ValueError("no clips to draw from")
    names, member_N = np.unique(np.asarray(groups), return_inverse=True)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(names)])))
    counts_RG = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    return counts_RG[:, member_N].astype(np.float64)


def pearson(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    """Pearson's correlation in every resample, (R,); NaN where one side does not vary."""
    return _by_parts(_pearson, counts_RN, truth, score)


def _pearson(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    # (N,), or (R, N) where the values differ between resamples
    x_RN, y_RN = _centred(counts_RN, truth), _centred(counts_RN, score)
    products_R = np.sum(counts_RN * x_RN * y_RN, axis=1)
    squares = [np.sum(counts_RN * side**2, axis=1) for side in (x_RN, y_RN)]
    defined = (squares[0] > FLAT) & (squares[1] > FLAT)
    scale_R = np.sqrt(np.where(defined, squares[0] * squares[1], 1.0))
    return np.where(defined, products_R / scale_R, np.nan)


def _centred(counts_RN: Doubles, values: ArrayLike) -> Doubles:
    values_RN = np.asarray(values, np.float64)
    means_R = np.sum(counts_RN * values_RN, axis=1) / counts_RN.sum(axis=1)
    centred: Doubles = values_RN - means_R[:, None]
    return centred


def spearman(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    """Spearman's correlation in every resample, (R,); equal values share their mean rank."""
    return _by_parts(_spearman, counts_RN, truth, score)


def _spearman(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    return _pearson(counts_RN, ranks(counts_RN, truth), ranks(counts_RN, score))


def _by_parts(
    statistic: Callable[[Doubles, ArrayLike, ArrayLike], Doubles],
    counts_RN: Doubles,
    truth: ArrayLike,
    score: ArrayLike,
) -> Doubles:
    parts = np.array_split(counts_RN, 1 + counts_RN.size // VALUES_AT_ONCE)
    return np.concatenate([statistic(part, truth, score) for part in parts])


def ranks(counts_RN: Doubles, values: ArrayLike) -> Doubles:
    """Rank of every clip within every resample, (R, N), a clip counted as often as it was drawn."""
    found, place_N = np.unique(np.asarray(values, np.float64), return_inverse=True)
    order_N = np.argsort(place_N, kind="stable")
    first = np.searchsorted(place_N[order_N], np.arange(len(found)))
    tied_RU = np.add.reduceat(counts_RN[:, order_N], first, axis=1)
    middle_RU = np.cumsum(tied_RU, axis=1) - (tied_RU - 1) / 2
    middle_RN: Doubles = middle_RU[:, place_N]
    return middle_RN


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


def share_of_gap(
    labelled: float | None,
    distilled: float | None,
    teacher: float | None,
    resampled: tuple[Doubles, Doubles, Doubles],
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


# --- models on a held-out set ---------------------------------------------------------------------

FILLED = {"zero": ", short clips zero-padded", "repeat": ", short clips repeated", SHARDS_SHORT: ""}


@dataclass(frozen=True)
class Model:
    """A model that is judged: ``kind`` is labelled, distilled, teacher, or what was pruned how."""

    name: str
    variant: str | None
    kind: str
    parameters: int | None
    weights_sha256: str


@dataclass(frozen=True)
class TestSet:
    """One set, its short clips filled one way: the truth (N,) and every model's scores (N,).

    ``truth`` says whose ``ratings`` are; ``unit`` is what is resampled (condition, system or clip),
    ``groups`` (N,) each clip's. ``by_definition``: the ratings are the teacher's own.
    """

    __test__ = False  # not a test, whatever its name says to pytest

    name: str
    truth: Literal["people", "teacher"]
    short: str
    ratings: Doubles
    unit: str
    groups: list[str]
    scores: dict[str, Doubles]
    by_definition: bool = False

    @property
    def heading(self) -> str:
        """The set in words."""
        whom = "people" if self.truth == "people" else "the teacher's labels"
        return f"{self.name} ({whom}{FILLED[self.short]})"


@dataclass(frozen=True)
class Judged:
    """One model on one set: a row of ``results.csv``. Ends of 95 % intervals; MOS for ``rmse``."""

    model: str
    variant: str | None
    kind: str
    parameters: int | None
    set: str
    truth: str
    short: str
    clips: int
    resampled: str
    groups: int
    pcc: float | None
    pcc_low: float | None
    pcc_high: float | None
    spearman: float | None
    spearman_low: float | None
    spearman_high: float | None
    rmse: float | None
    rmse_low: float | None
    rmse_high: float | None
    by_definition: bool
    reason: str | None


@dataclass(frozen=True)
class Gap:
    """One variant on one set: how far the distilled student is above its twin.

    ``share`` is of the gap between the labelled-only student and the teacher, in PCC.
    """

    variant: str
    parameters: int
    set: str
    truth: str
    short: str
    labelled: float | None
    distilled: float | None
    teacher: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    share: float | None
    share_low: float | None
    share_high: float | None
    reason: str | None


def judge(test: TestSet, models: Sequence[Model], seed: int) -> tuple[list[Judged], list[Gap]]:
    """Every model's figures and every variant's gap, all from the same resamples."""
    counts_RN = draws(test.groups, seed)
    judged = {model.name: _judged(test, model, counts_RN) for model in models}
    pcc = {
        name: (row.pcc, pearson(counts_RN, test.ratings, test.scores[name]))
        for name, row in judged.items()
    }
    teacher = next(model.name for model in models if model.kind == "teacher")
    gaps = []
    for model in models:
        if model.kind == "distilled" and model.variant:
            twins = pcc[f"{model.variant}-labelled"], pcc[model.name], pcc[teacher]
            gaps.append(_gap(test, model.variant, model.parameters or 0, twins))
    return list(judged.values()), gaps


def _judged(test: TestSet, model: Model, counts_RN: Doubles) -> Judged:
    score_N = test.scores[model.name]
    found = agreement(test.ratings, score_N)
    values: dict[str, float | None] = {}
    reasons = [found.reason]
    for name, statistic in (("pcc", pearson), ("spearman", spearman), ("rmse", rmse)):
        resampled_R = statistic(counts_RN, test.ratings, score_N)
        one = interval(getattr(found, name), resampled_R, found.reason or "not defined")
        values |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
        reasons.append(one.reason)
    return Judged(
        model=model.name,
        variant=model.variant,
        kind=model.kind,
        parameters=model.parameters,
        set=test.name,
        truth=test.truth,
        short=test.short,
        clips=len(test.ratings),
        resampled=test.unit,
        groups=len(set(test.groups)),
        by_definition=test.by_definition and model.kind == "teacher",
        reason=next((reason for reason in reasons if reason), None),
        **values,
    )


Correlation = tuple[float | None, Doubles]
"""A correlation, and what the resamples gave (R,)."""


def _gap(
    test: TestSet,
    name: str,
    parameters: int,
    correlations: tuple[Correlation, Correlation, Correlation],
) -> Gap:
    (labelled, labelled_R), (distilled, distilled_R), (teacher, teacher_R) = correlations
    above = difference(distilled, labelled, distilled_R, labelled_R)
    resampled = labelled_R, distilled_R, teacher_R
    share = share_of_gap(labelled, distilled, teacher, resampled)
    return Gap(
        variant=name,
        parameters=parameters,
        set=test.name,
        truth=test.truth,
        short=test.short,
        labelled=labelled,
        distilled=distilled,
        teacher=teacher,
        difference=above.value,
        difference_low=above.low,
        difference_high=above.high,
        share=share.value,
        share_low=share.low,
        share_high=share.high,
        reason=above.reason or share.reason,
    )
