"""The clips of a grid, out of a CSV of rated or of labelled clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.labelled import LabelledClip, read_labelled
from data_specs.rated import RatedClip, read_rated, read_rows
from data_specs.strict import digest
from train.evaluation.lengths import chosen_numbers
from train.robustness.interface import Clip


def read_judged(path: Path, slices: str, most: int | None = None) -> list[Clip]:
    """The clips, by ``slices``: their condition or their dataset; of each ``most``, spread evenly.

    Of a labelled CSV (it has a column ``split``) those to test on. ``UserError`` naming what is
    wrong in it.
    """
    rows: Sequence[RatedClip | LabelledClip]
    if "split" in read_rows(path, ("path",), (), "clips to judge")[0][0]:
        rows = [one for one in read_labelled([path]) if one.split == "test"]
    else:
        rows = read_rated(path)
    if not rows:
        raise UserError(f"{path}: no clip of split 'test'")
    return some_of([_clip(one, slices) for one in rows], most)


def _clip(one: RatedClip | LabelledClip, slices: str) -> Clip:
    """Drawn in resamples: speakers; else the conditions of a dataset; else clips with their twins.

    A clip in several conditions is drawn in all of them or in none: conditions are paired.
    """
    speaker, text, clean = (getattr(one, name, None) for name in ("speaker", "text", "clean"))
    by_condition = slices == "condition" and one.condition
    group = speaker or str(clean or one.path)
    if not by_condition and one.condition and not (speaker or clean):
        group = f"{one.dataset}/{one.condition}"
    condition = str(one.condition if by_condition else one.dataset)
    known = digest([sha256_of(path) if path else "" for path in (one.path, clean)] + [text])
    return Clip(one.path, known, condition, group, one.mos, text, clean)


def some_of(clips: Sequence[Clip], most: int | None) -> list[Clip]:
    """At most so many clips of every condition, spread evenly, in their order."""
    places: dict[str, list[int]] = {}
    for number, clip in enumerate(clips):
        places.setdefault(clip.condition, []).append(number)
    chosen = [mine[n] for mine in places.values() for n in chosen_numbers(len(mine), most)]
    return [clips[number] for number in sorted(chosen)]
