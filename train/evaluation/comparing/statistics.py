"""How well scores agree with ratings, at the level of clips, conditions and systems.

Pearson's (PCC) and Spearman's correlation, Kendall's tau-b, RMSE in MOS, and RMSE after a monotone
third-order map (``train.evaluation.comparing.mapping``), each with its bootstrap interval
(``train.evaluation.bootstrap``): at every level conditions are drawn where clips have them, else
systems, else clips, for clips of one condition are no independent evidence. A condition's score and
rating are the means of its clips. Correlations of fewer than three points are not defined: two
always lie on a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from train.evaluation.bootstrap import RESAMPLES, Interval, draws, interval, pearson, rmse, spearman
from train.evaluation.comparing.mapping import FREEDOM, resampled_rmse_mapped, rmse_mapped
from train.evaluation.comparing.rows import METRICS, CommonClips, Doubles, Entry, SetResult
from train.metrics import agreement

FEWEST = 3
KENDALL_MOST = 3000
"""More points than this have no interval for Kendall's tau: its table of pairs would be large."""

NO_MOS = "not on the MOS scale"


@dataclass(frozen=True)
class Level:
    """Points of one set: their names (P,) and every clip's point (N,), as an index."""

    name: str
    points: list[str]
    place_N: np.ndarray

    def means(self, values: ArrayLike) -> Doubles:
        """Mean of every point's clips (P,)."""
        sums_P = np.bincount(self.place_N, np.asarray(values, np.float64), len(self.points))
        means_P: Doubles = sums_P / np.bincount(self.place_N, minlength=len(self.points))
        return means_P


def levels_of(clips: CommonClips) -> list[Level]:
    """Clips, then conditions and systems where every clip of the set has one."""
    found = [Level("clip", clips.keys, np.arange(len(clips.keys)))]
    for name, labels in (("condition", clips.conditions), ("system", clips.systems)):
        if labels:
            points, place_N = np.unique(np.asarray(labels), return_inverse=True)
            found.append(Level(name, [str(point) for point in points], place_N))
    return found


def kendall(truth: ArrayLike, score: ArrayLike) -> float | None:
    """Kendall's tau-b of (N,) and (N,); None where one side does not vary."""
    value = float(scipy.stats.kendalltau(truth, score).statistic)
    return value if np.isfinite(value) else None


def resampled_kendall(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
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
    found, place_N = np.unique(values_N, return_inverse=True)
    order_N = np.argsort(place_N, kind="stable")
    first = np.searchsorted(place_N[order_N], np.arange(len(found)))
    tied_RU = np.add.reduceat(counts_RN[:, order_N], first, axis=1)
    pairs_R: Doubles = counts_RN.sum(axis=1) ** 2 - np.sum(tied_RU**2, axis=1)
    return pairs_R


RESAMPLED: dict[str, Callable[[Doubles, ArrayLike, ArrayLike], Doubles]] = {
    "pcc": pearson,
    "spearman": spearman,
    "kendall": resampled_kendall,
    "rmse": rmse,
    "rmse_mapped": resampled_rmse_mapped,
}


def values_of(
    truth: ArrayLike, score: ArrayLike, mos_scale: bool = True
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Every metric of (N,) and (N,); and for those that are None, why.

    ``mos_scale`` False: scores of another unit, which have no error in MOS before the map.
    """
    found = agreement(truth, score)
    why: dict[str, str] = {}
    if found.clips < FEWEST or found.reason:
        said = "fewer than three points" if found.clips < FEWEST else str(found.reason)
        why = dict.fromkeys(("pcc", "spearman", "kendall"), said)
    values: dict[str, float | None] = {
        "pcc": None if why else found.pcc,
        "spearman": None if why else found.spearman,
        "kendall": None if why else kendall(truth, score),
        "rmse": found.rmse if mos_scale else None,
        "rmse_mapped": rmse_mapped(truth, score),
    }
    if not mos_scale:
        why["rmse"] = NO_MOS
    if values["rmse_mapped"] is None:
        why["rmse_mapped"] = f"a map needs more than {FREEDOM} points and {FREEDOM} scores"
    return values, why


def judge(clips: CommonClips, seed: int, resamples: int = RESAMPLES) -> list[SetResult]:
    """Every entry at every level, all on the same resamples."""
    found = []
    for level in levels_of(clips):
        truth_P = level.means(clips.truth)
        groups_N = np.asarray(clips.groups)
        both = set(zip(level.place_N.tolist(), groups_N.tolist(), strict=True))
        nested = len(both) == len(level.points)
        firsts = np.unique(level.place_N, return_index=True)[1]
        # Systems that are made of several conditions are drawn themselves.
        groups = [str(groups_N[first]) for first in firsts] if nested else level.points
        counts_RP = draws(groups, seed, resamples)
        unit = (clips.unit if nested else level.name, len(set(groups)))
        for entry in clips.entries:
            score_P = level.means(clips.scores[entry.label])
            found.append(_judged(clips, entry, level, unit, (truth_P, score_P), counts_RP))
    return found


def _judged(
    clips: CommonClips,
    entry: Entry,
    level: Level,
    unit: tuple[str, int],
    points: tuple[Doubles, Doubles],
    counts_RP: Doubles,
) -> SetResult:
    values, why = values_of(*points, mos_scale=entry.mos_scale)
    figures: dict[str, float | None] = {}
    for name in METRICS:
        one = _interval(name, values[name], points, counts_RP)
        if one.reason and name not in why:
            why[name] = one.reason
        figures |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return SetResult(
        model=entry.model,
        set=clips.name,
        clips=len(clips.keys),
        short=entry.short,
        kind=clips.kind,
        reason=in_words(why),
        weights_sha256=entry.weights_sha256,
        level=level.name,
        points=len(level.points),
        resampled=unit[0],
        groups=unit[1],
        parameters=entry.parameters,
        **figures,
    )


def _interval(
    name: str, value: float | None, points: tuple[Doubles, Doubles], counts_RP: Doubles
) -> Interval:
    if value is None:
        return Interval(None)
    if name == "kendall" and len(points[0]) > KENDALL_MOST:
        return Interval(value, reason=f"no interval for more than {KENDALL_MOST} points")
    return interval(value, RESAMPLED[name](counts_RP, *points))


def in_words(why: dict[str, str]) -> str | None:
    """Reasons, each once, with what they are the reason for."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in why.items():
        by_reason.setdefault(reason, []).append(name.replace("_", " "))
    if len(by_reason) == 1 and len(next(iter(by_reason.values()))) > 2:
        return next(iter(by_reason))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in by_reason.items()) or None
