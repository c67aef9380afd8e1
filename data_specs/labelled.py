"""Labelled sets: clips with what is known of each, in one CSV form beside the rated one.

Columns ``path, split`` (required), any of the labels ``mos, keyword, speaker, text``, and
``text_by, condition, clean, dataset`` (optional); paths are relative to the CSV file; further
columns are ignored, and so is a label that is empty. ``clean`` is the clip before it was degraded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field

from data_specs.io.names import plain
from data_specs.rated import Clip, file_of, number, read_rows
from data_specs.recipe import Split
from data_specs.strict import SpecError, unknown

SPLITS: tuple[Split, ...] = get_args(Split)
LABELS = ("mos", "keyword", "speaker", "text")
COLUMNS = ("path", "split", *LABELS, "text_by", "condition", "clean", "dataset")


class LabelledClip(Clip):
    """One clip, its split, and the labels that it has."""

    split: Split
    mos: Annotated[float, Field(ge=1, le=5)] | None = None
    keyword: str | None = None
    speaker: str | None = None
    text: str | None = None
    text_by: str | None = None
    """Who wrote the text down: a recogniser, or what the clip was made of."""
    condition: str | None = None
    clean: Path | None = None


def read_labelled(csv_paths: Iterable[Path]) -> list[LabelledClip]:
    """The clips of CSV files, in their order.

    Raises ``SpecError`` naming the file and the line for a missing column or clip, an unknown
    split, a rating off the scale, a clip that is named twice, files without any column of labels.
    """
    seen: dict[tuple[str, Path], str] = {}
    clips = []
    for csv_path in csv_paths:
        about = f"a labelled set is a CSV with columns path, split and any of {', '.join(LABELS)}"
        for row, where in read_rows(csv_path, ("path", "split"), COLUMNS, about):
            if not set(LABELS) & row.keys():
                raise SpecError(f"{csv_path}: no column of labels; {about}")
            clip = _clip(row, csv_path, where)
            first = seen.setdefault((clip.dataset, clip.path), where)
            if first != where:
                raise SpecError(f"{where}: {clip.path} is named twice, first in {first}")
            clips.append(clip)
    return clips


def _clip(row: Mapping[str, str | None], csv_path: Path, where: str) -> LabelledClip:
    cells: dict[str, Any] = {n: plain((row.get(n) or "").strip()) or None for n in COLUMNS}
    if cells["split"] not in SPLITS:
        raise SpecError(f"{where}: {unknown('split', cells['split'] or '', SPLITS)}")
    cells |= {
        "path": file_of(csv_path, row["path"], where),
        "mos": number(row.get("mos"), "mos", where, 1, 5),
        "clean": file_of(csv_path, cells["clean"], where) if cells["clean"] else None,
        "dataset": cells["dataset"] or csv_path.stem,
    }
    return LabelledClip(**cells, where=where)
