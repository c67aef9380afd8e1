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
    weights = {(row.model, row.padding): row.weights_sha256 for row in records}
    for (model, padding), sha256 in weights.items():
        several = sum(one == model for one, _ in weights) > 1
        label = f"{model} ({padding})" if several else model
        mos_scale = model not in other_scales
        entries[model, padding] = Entry(label, model, padding, sha256, sizes.get(model), mos_scale)
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
    tables: dict[str, dict[str, ClipScore]] = {entry.label: {} for entry in entries.values()}
    for row in records:
        tables[entries[row.model, row.padding].label][row.path_or_key] = row
    name = records[0].set
    few = [label for label, table in tables.items() if len(table) < LEAST_SHARE * len(keys)]
    notes = [
        f"{name}: {label} scored {len(tables[label])} of {len(keys)} clips and is not compared "
        "there"
        for label in few
    ]
    tables = {label: table for label, table in tables.items() if label not in few}
    common = [key for key in keys if all(key in table for table in tables.values())]
    if not tables or not common:
        return None, [*notes, f"{name}: no clip that all models scored"]
    kept = set(common)
    if gone := [key for key in keys if key not in kept]:
        named = ", ".join(gone[:5]) + (" and others" if len(gone) > 5 else "")
        notes.append(
            f"{name}: {len(gone)} of {len(keys)} clips are left out for all models, for not all "
            f"could score them: {named}"
        )
    compared = [entry for entry in entries.values() if entry.label in tables]
    return clips_of(common, kind, tables, compared), notes


def clips_of(
    keys: Sequence[str],
    kind: Kind,
    tables: Mapping[str, Mapping[str, ClipScore]],
    entries: Sequence[Entry] = (),
) -> CommonClips:
    """A set's clips from records by label and key; each label has all of ``keys``."""
    kept = [next(iter(tables.values()))[key] for key in keys]
    conditions, systems = ([getattr(row, of) for row in kept] for of in ("condition", "system"))
    return CommonClips(
        kept[0].set,
        kind,
        list(keys),
        np.array([row.truth for row in kept]),
        {label: np.array([table[key].score for key in keys]) for label, table in tables.items()},
        list(entries),
        conditions if all(conditions) else [],
        systems if all(systems) else [],
    )
