"""Word error rates: what was heard wrongly, and whether one system hears better than another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.bootstrap import Doubles, Interval, bootstrap_p, difference, draws, interval


class WordErrors(NamedTuple):
    """Of utterances with so many words; the fewest errors that explain what was heard."""

    errors: int
    substitutions: int
    deletions: int
    insertions: int
    words: int


def word_errors(text: str, heard: str) -> WordErrors:
    """Of one utterance (Levenshtein's distance); of equal explanations fewest substitutions."""
    there, words = heard.split(), text.split()
    row = [(n, 0, 0, n) for n in range(len(there) + 1)]
    for word in words:
        above, row = row, [_plus(row[0], DELETED)]
        for place, other in enumerate(there):
            ways = ((above[place], REPLACED), (above[place + 1], DELETED), (row[place], INSERTED))
            row.append(above[place] if word == other else min(_plus(*way) for way in ways))
    return WordErrors(*row[-1], len(words))


Counts = tuple[int, int, int, int]
REPLACED, DELETED, INSERTED = (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)


def _plus(one: Counts, other: Counts) -> Counts:
    return (one[0] + other[0], one[1] + other[1], one[2] + other[2], one[3] + other[3])


def total(found: Sequence[WordErrors]) -> WordErrors:
    """All utterances' together."""
    return WordErrors(*(int(sum(values)) for values in zip(*found, strict=True)))


class Comparison(NamedTuple):
    """Word error rates of two systems on the same utterances, with 95 % intervals."""

    one: Interval
    other: Interval
    difference: Interval
    p: float | None


def compare(
    one: Sequence[WordErrors], other: Sequence[WordErrors], groups: Sequence[str], seed: int = 0
) -> Comparison:
    """One minus the other by paired bootstrap over ``groups`` (an utterance, or its speaker)."""
    counts_RN = draws(groups, seed)
    resampled = [_rates(counts_RN, side) for side in (one, other)]
    values = [_rates(np.ones((1, len(side))), side).item() for side in (one, other)]
    intervals = [interval(value, rates_R) for value, rates_R in zip(values, resampled, strict=True)]
    apart = difference(values[0], values[1], resampled[0], resampled[1])
    return Comparison(*intervals, apart, bootstrap_p(resampled[0] - resampled[1]))


def _rates(counts_RN: Doubles, found: Sequence[WordErrors]) -> Doubles:
    errors_N, words_N = (np.array([getattr(f, n) for f in found]) for n in ("errors", "words"))
    rates_R: Doubles = counts_RN @ errors_N / (counts_RN @ words_N)
    return rates_R
