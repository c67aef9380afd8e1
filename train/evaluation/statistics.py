"""How well scores agree with ratings, at the level of clips, conditions and systems.

Pearson's (PCC) and Spearman's correlation, Kendall's tau-b, RMSE in MOS, and RMSE after a monotone
third-order map, each with its bootstrap interval: at every level conditions are drawn where clips
have them, else systems, else clips. A condition's score and rating are the means of its clips.
Correlations of fewer than three points are not defined: two always lie on a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from train import bootstrap
from train.bootstrap import RESAMPLES, Doubles, Interval, Statistic, draws, interval
from train.evaluation.mapping import FREEDOM, resampled_rmse_mapped, rmse_mapped
from train.evaluation.records import METRICS, CommonClips, SetResult
from train.metrics import agreement

FEWEST = 3
KENDALL_MOST = 3000
"""More points than this have no interval for Kendall's tau: its table of pairs would be large."""

NO_MOS = "not on the MOS scale"

RESAMPLED: dict[str, Statistic] = {
    "pcc": bootstrap.pearson,
    "spearman": bootstrap.spearman,
    "kendall": bootstrap.kendall,
    "rmse": bootstrap.rmse,
    "rmse_mapped": resampled_rmse_mapped,
}


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


def values_of(
    truth: ArrayLike, score: ArrayLike, mos_scale: bool = True
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Every metric of (N,) and (N,); and for those that are None, why.

    ``mos_scale`` False: scores of another unit, which have no error in MOS before the map.
    """
    found = agreement(truth, score)
    why: dict[str, str] = {}
    if found.clips < FEWEST or found.reason:
        reason = "fewer than three points" if found.clips < FEWEST else str(found.reason)
        why = dict.fromkeys(("pcc", "spearman", "kendall"), reason)
    values: dict[str, float | None] = {
        "pcc": None if why else found.pcc,
        "spearman": None if why else found.spearman,
        "kendall": None if why else float(scipy.stats.kendalltau(truth, score).statistic),
        "rmse": found.rmse if mos_scale else None,
        "rmse_mapped": rmse_mapped(truth, score),
    }
    if not mos_scale:
        why["rmse"] = NO_MOS
    if values["rmse_mapped"] is None:
        why["rmse_mapped"] = f"a map needs more than {FREEDOM} points and {FREEDOM} scores"
    return values, why


def with_intervals(
    truth: Doubles,
    score: Doubles,
    counts_RP: Doubles,
    metrics: Sequence[str] = METRICS,
    mos_scale: bool = True,
) -> tuple[dict[str, Interval], str | None]:
    """Metrics of points (P,) with their intervals, and why some are not defined."""
    values, why = values_of(truth, score, mos_scale)
    found = {name: _interval(name, values[name], truth, score, counts_RP) for name in metrics}
    reasons = {name: reason for name, reason in why.items() if name in metrics}
    reasons |= {name: one.reason for name, one in found.items() if one.reason}
    return found, in_words(reasons)


def _interval(
    name: str, value: float | None, truth: Doubles, score: Doubles, counts_RP: Doubles
) -> Interval:
    if value is None:
        return Interval(None)
    if name == "kendall" and len(truth) > KENDALL_MOST:
        return Interval(value, reason=f"no interval for more than {KENDALL_MOST} points")
    return interval(value, RESAMPLED[name](counts_RP, truth, score))


def in_words(why: dict[str, str]) -> str | None:
    """Reasons, each once, with what they are the reason for."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in why.items():
        by_reason.setdefault(reason, []).append(name.replace("_", " "))
    if len(by_reason) == 1 and len(next(iter(by_reason.values()))) > 2:
        return next(iter(by_reason))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in by_reason.items()) or None


def set_results(clips: CommonClips, seed: int, resamples: int = RESAMPLES) -> list[SetResult]:
    """Every entry at every level, all on the same resamples."""
    return [one for level in levels_of(clips) for one in _of_level(clips, level, seed, resamples)]


def _of_level(clips: CommonClips, level: Level, seed: int, resamples: int) -> list[SetResult]:
    truth_P = level.means(clips.truth)
    groups_N = np.asarray(clips.groups)
    both = set(zip(level.place_N.tolist(), groups_N.tolist(), strict=True))
    nested = len(both) == len(level.points)
    firsts = np.unique(level.place_N, return_index=True)[1]
    # Systems that are made of several conditions are drawn themselves.
    groups = [str(groups_N[first]) for first in firsts] if nested else level.points
    counts_RP = draws(groups, seed, resamples)
    found = []
    for entry in clips.entries:
        score_P = level.means(clips.scores[entry.label])
        metrics, reason = with_intervals(truth_P, score_P, counts_RP, mos_scale=entry.mos_scale)
        named = {
            name: end for metric, one in metrics.items() for name, end in one.named(metric).items()
        }
        found.append(
            SetResult(
                model=entry.model,
                set=clips.name,
                clips=len(clips.keys),
                padding=entry.padding,
                kind=clips.kind,
                reason=reason,
                weights_sha256=entry.weights_sha256,
                level=level.name,
                points=len(level.points),
                resampled=clips.unit if nested else level.name,
                groups=len(set(groups)),
                parameters=entry.parameters,
                **named,
            )
        )
    return found
