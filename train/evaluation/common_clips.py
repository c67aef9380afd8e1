"""The clips of a set that all of its models scored: what is compared is paired.

A clip that one model could not score is left out for all models, and named. A model that could not
score half of a set's clips is left out of that set instead: it would take too many from the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from train.evaluation.records import ClipScore, CommonClips, Entry, Kind

LEAST_SHARE = 0.5
"""A model has to score at least this share of a set's clips to be compared on it."""


def entries_of(
    records: Sequence[ClipScore], sizes: Mapping[str, int | None], other_scales: set[str]
) -> dict[tuple[str, str], Entry]:
    """The models of a set with their paddings, in order of appearance.

    A label names the padding where a model is there with several.
    """
    entries: dict[tuple[str, str], Entry] = {}
    pairs = dict.fromkeys((row.model, row.short) for row in records)
    weights = {row.model: row.weights_sha256 for row in records}
    for model, short in pairs:
        several = sum(one == model for one, _ in pairs) > 1
        label = f"{model} ({short})" if several else model
        entries[model, short] = Entry(
            label, model, short, weights[model], sizes.get(model), model not in other_scales
        )
    return entries


def common_clips(
    records: Sequence[ClipScore],
    keys: Sequence[str],
    kind: Kind,
    entries: Mapping[tuple[str, str], Entry],
) -> tuple[CommonClips | None, list[str]]:
    """One set's clips that all of its models scored, and what was left out, in words.

    ``records`` are all of one set, ``keys`` (in the order of the result) its clips. None where
    no clip is left.
    """
    tables: dict[tuple[str, str], dict[str, ClipScore]] = {key: {} for key in entries}
    for row in records:
        tables[row.model, row.short][row.path_or_key] = row
    name = records[0].set
    notes = []
    for key in list(tables):
        share = len(tables[key]) / len(keys)
        if share < LEAST_SHARE:
            notes.append(
                f"{name}: {entries[key].label} scored {len(tables[key])} of {len(keys)} clips and "
                "is not compared there"
            )
            del tables[key]
    common = [key for key in keys if all(key in table for table in tables.values())]
    if not tables or not common:
        return None, [*notes, f"{name}: no clip that all models scored"]
    if len(common) < len(keys):
        gone = [key for key in keys if key not in set(common)]
        named = ", ".join(gone[:5]) + (" and others" if len(gone) > 5 else "")
        notes.append(
            f"{name}: {len(gone)} of {len(keys)} clips are left out for all models, for not all "
            f"could score them: {named}"
        )
    return _common(name, kind, common, tables, entries), notes


def _common(
    name: str,
    kind: Kind,
    keys: list[str],
    tables: Mapping[tuple[str, str], Mapping[str, ClipScore]],
    entries: Mapping[tuple[str, str], Entry],
) -> CommonClips:
    first = next(iter(tables.values()))
    kept = [first[key] for key in keys]
    conditions, systems = ([getattr(row, of) for row in kept] for of in ("condition", "system"))
    return CommonClips(
        name,
        kind,
        keys,
        np.array([row.truth for row in kept]),
        {
            entries[key].label: np.array([table[clip].score for clip in keys])
            for key, table in tables.items()
        },
        [entries[key] for key in tables],
        conditions if all(conditions) else [],
        systems if all(systems) else [],
    )
