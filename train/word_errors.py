"""Word error rates: what was heard wrongly, and whether one system hears better than another.

``python -m train word-errors A/words.csv B/words.csv``, of what ``train finetune`` writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.rated import read_rows
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


KINDS = ("substitutions", "deletions", "insertions")


def rates(counts_RN: Doubles, found: Sequence[WordErrors], kind: str = "errors") -> Doubles:
    """Errors of a kind a word, in every resample (R,)."""
    errors_N, words_N = (np.array([getattr(f, name) for f in found]) for name in (kind, "words"))
    rates_R: Doubles = counts_RN @ errors_N / (counts_RN @ words_N)
    return rates_R


class Comparison(NamedTuple):
    """A system's word error rate, and how far above another's it is, with 95 % intervals."""

    rate: Interval
    difference: Interval
    p: float | None


def compare(
    one: Sequence[WordErrors], other: Sequence[WordErrors], groups: Sequence[str]
) -> Comparison:
    """One minus the other by paired bootstrap over ``groups`` (an utterance, or its speaker)."""
    counts_RN = draws(groups, seed=0)
    ours_R, theirs_R = (rates(counts_RN, side) for side in (one, other))
    ours, theirs = (rates(np.ones((1, len(side))), side).item() for side in (one, other))
    apart = difference(ours, theirs, ours_R, theirs_R)
    return Comparison(interval(ours, ours_R), apart, bootstrap_p(ours_R - theirs_R))


def _heard(table: Path) -> tuple[list[tuple[str, str]], list[WordErrors]]:
    """Of each utterance its group and text, and its errors."""
    columns = ("group", "text", "heard")
    rows = [row for row, _ in read_rows(table, columns, columns, "a table of what was heard")]
    texts = [(row["group"] or "", row["text"] or "") for row in rows]
    return texts, [word_errors(row["text"] or "", row["heard"] or "") for row in rows]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train word-errors``."""
    tables = "words.csv of finetunings, of the same utterances; each is compared with the first"
    parser.add_argument("tables", type=path_here, nargs="+", help=tables)


def run(args: argparse.Namespace) -> int:
    """``python -m train word-errors``; returns the exit code."""
    texts, first = _heard(args.tables[0])
    for table in args.tables:
        same, found = _heard(table)
        if same != texts:
            raise UserError(f"{table}: not the utterances of {args.tables[0]}")
        count, compared = total(found), compare(found, first, [group for group, _ in texts])
        kinds = ", ".join(f"{getattr(count, kind)} {kind}" for kind in KINDS)
        print(f"{table}: {compared.rate.text()} of {count.words} words; {kinds}")
        if found != first:
            print(f"  above the first: {compared.difference.text('+')}, p {compared.p:.4f}")
    return 0
