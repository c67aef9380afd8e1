"""Whether one scorer's correlation with the ratings is higher than another's, on the same clips.

What decides is the paired bootstrap: the difference of the two PCCs in resamples of conditions (or
systems, or clips where a set has neither). Its two-sided p is twice the smaller share of resamples
on one side of zero, with one added above and below, adjusted over a set's pairs by Holm's method.

Williams' test for two dependent correlations that share a variable (E. J. Williams, 1959; J. H.
Steiger, Psychological Bulletin 87, 1980, equation 7) takes clips as independent and normal, so
where clips share conditions it is too sure: it is there to compare with other papers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import scipy.stats

from train.bootstrap import RESAMPLES, Doubles, bootstrap_p, difference, draws, pearson
from train.evaluation.records import CommonClips, Pair
from train.evaluation.statistics import FEWEST
from train.metrics import agreement

LEVEL = 0.05
"""A difference is called clear if its adjusted p is below this."""

SAME = 1e-4
"""Scores that are nowhere further apart are one network's: what differs is rounding."""

MOST_DRAWS = 50_000_000
"""Entries of the (resamples, clips) table of draws: 400 MB."""


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted by Holm's method, in their order; those that are None stay None."""
    defined = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(defined):
        highest = max(highest, min(1.0, p * (len(defined) - rank)))
        adjusted[place] = highest
    return adjusted


def williams(
    one_truth: float, other_truth: float, one_other: float, clips: int
) -> tuple[float, float] | None:
    """Williams' t and its two-sided p, for the correlations of two scorers with the truth.

    ``one_other`` is the correlation between the scorers. None for fewer than four clips, or where
    two of the three are the same variable.
    """
    if clips < 4:
        return None
    determinant = 1 - one_truth**2 - other_truth**2 - one_other**2
    determinant += 2 * one_truth * other_truth * one_other
    mean = (one_truth + other_truth) / 2
    below = 2 * determinant * (clips - 1) / (clips - 3) + mean**2 * (1 - one_other) ** 3
    above = (clips - 1) * (1 + one_other)
    if below <= 1e-12 or 1 - abs(one_other) < 1e-12:
        return None
    t = (one_truth - other_truth) * math.sqrt(above / below)
    return t, float(2 * scipy.stats.t.sf(abs(t), clips - 3))


def resamples_for(entries: int, clips: int) -> int:
    """So many that the smallest p is, after Holm's method, a quarter of ``LEVEL``.

    At least ``RESAMPLES``, and no more above them than the table of draws may hold.
    """
    pairs = entries * (entries - 1) // 2
    wanted = math.ceil(2 * pairs / (LEVEL / 4))
    return max(RESAMPLES, min(wanted, MOST_DRAWS // clips))


def pairs_of(clips: CommonClips, seed: int, resamples: int | None = None) -> list[Pair]:
    """All pairs of a set's entries, on the same resamples, p adjusted over the pairs."""
    resamples = resamples or resamples_for(len(clips.entries), len(clips.keys))
    counts_RN = draws(clips.groups, seed, resamples)
    resampled = {
        label: pearson(counts_RN, clips.truth, score_N) for label, score_N in clips.scores.items()
    }
    labels = [entry.label for entry in clips.entries]
    found = [_pair(clips, one, other, resampled) for one, other in combinations(labels, 2)]
    adjusted = holm([pair.p for pair in found])
    return [replace(pair, p_holm=p) for pair, p in zip(found, adjusted, strict=True)]


def _pair(clips: CommonClips, one: str, other: str, resampled: dict[str, Doubles]) -> Pair:
    scores = clips.scores[one], clips.scores[other]
    groups, points = len(set(clips.groups)), len(clips.keys)
    pair = Pair(clips.name, one, other, points, clips.unit, groups, difference=None)
    ours, theirs = (agreement(clips.truth, score_N).pcc for score_N in scores)
    if points < FEWEST or ours is None or theirs is None:
        return replace(pair, reason="a correlation is not defined")
    if np.allclose(*scores, rtol=0, atol=SAME):
        return replace(pair, difference=0.0, reason=f"the same scores, to {SAME:g}")
    above = difference(ours, theirs, resampled[one], resampled[other])
    t, p = williams(ours, theirs, agreement(*scores).pcc or 0.0, points) or (None, None)
    return replace(
        pair,
        **above.named("difference"),
        p=bootstrap_p(resampled[one] - resampled[other]),
        williams_t=t,
        williams_p=p,
        reason=above.reason,
    )
