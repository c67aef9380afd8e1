"""Rated sets: clips that people scored, in one CSV form.

Columns ``path, mos`` (required) and ``votes, ci, condition, system, dataset`` (optional); paths are
relative to the CSV file; further columns are ignored. Ratings are from 1 to 5: those of another
scale (MUSHRA, 0 to 100) are mapped to it when the table is made.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from data_specs.io.audio import BadAudio, require_sound
from data_specs.io.errors import UserError
from data_specs.io.hardware import cpus
from data_specs.io.names import plain
from data_specs.io.text import read_text
from data_specs.strict import HERE, SpecError, Strict, load

COLUMNS = ("path", "mos", "votes", "ci", "condition", "system", "dataset")

MOST_VOTES = 1_000_000

MOST_NAMED = 20
"""Clips that cannot be read and are named."""


class Clip(Strict):
    """A clip in a table."""

    path: Path
    dataset: str
    where: Annotated[str, Field(exclude=True, repr=False)] = ""
    """Its CSV file and line, for messages."""


class RatedClip(Clip):
    """One clip and what people said of it, on the scale 1 (bad) to 5 (excellent)."""

    mos: Annotated[float, Field(ge=1, le=5)]
    condition: str | None = None
    system: str | None = None
    votes: int | None = None


class Scale(Strict):
    """The scale of the ratings as published: (1, 5) for MOS, (0, 100) for MUSHRA."""

    low: float = 1.0
    high: float = 5.0

    @model_validator(mode="after")
    def _ordered(self) -> Scale:
        if self.low >= self.high:
            raise UserError(f"low {self.low} is not below high {self.high}")
        return self


class Counts(Strict):
    """Clips per split, as in section III; none where the paper has none."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


class RatedSet(Strict):
    """A rated set as published: what it is, where it comes from, and how its table is read."""

    name: str
    about: str
    source: str
    licence: str
    languages: tuple[str, ...] = ()
    public: bool = True
    scale: Scale = Scale()
    clips: Counts = Counts()
    table1: str | None = None
    notes: str = ""


def rated_sets() -> dict[str, RatedSet]:
    """Every file of ``data_specs/rated``, by file name without the ending."""
    return {path.stem: load(RatedSet, path) for path in sorted((HERE / "rated").glob("*.yaml"))}


def read_rated(csv_path: Path | str) -> list[RatedClip]:
    """Read a CSV of rated clips.

    Raises ``SpecError`` naming the file and the row for a missing column or clip, a rating that is
    no number or off the scale.
    """
    csv_path, about = Path(csv_path), "a rated set is a CSV with columns path, mos"
    rows = read_rows(csv_path, ("path", "mos"), COLUMNS, about)
    clips = [_clip(row, csv_path, where) for row, where in rows]
    _require_once(clips)
    return clips


def read_rows(
    csv_path: Path, needed: Sequence[str], known: Sequence[str], about: str
) -> Sequence[tuple[Mapping[str, str | None], str]]:
    """The rows of a table of clips, each with its file and line for messages.

    Raises ``SpecError`` naming the file, and the line, for what is no CSV, a ``needed`` column that
    is missing, a ``known`` one that is there twice; ``about`` says what the table is.
    """
    if not csv_path.is_file():
        raise SpecError(f"{csv_path}: no such file; {about}")
    text = io.StringIO(read_text(csv_path), newline="")
    try:
        reader = csv.DictReader(text, skipinitialspace=True, strict=True)
        _require_columns(csv_path, reader.fieldnames or [], needed, known)
        rows = [(row, f"{csv_path}: line {reader.line_num}") for row in reader if any(row.values())]
    except csv.Error as error:
        raise SpecError(f"{csv_path}: not a CSV: {error}") from error
    if not rows:
        raise SpecError(f"{csv_path}: no rows")
    for row, where in rows:
        if None in row:
            raise SpecError(
                f"{where}: more cells than columns; a comma in a number, or a missing quote?"
            )
    return rows


def require_heard(clips: Sequence[Clip]) -> None:
    """Decode every clip, so that none fails a run that has begun.

    ``SpecError`` with table, line and reason for those that cannot be read.
    """
    with ThreadPoolExecutor(cpus()) as pool:
        wrong = [why for why in pool.map(_fault_of, clips) if why]
    if wrong:
        more = [f"and {len(wrong) - MOST_NAMED} more"] if len(wrong) > MOST_NAMED else []
        lines = "\n  ".join([*wrong[:MOST_NAMED], *more])
        raise SpecError(
            f"{len(wrong)} clips cannot be read; mend them or take out their rows:\n  {lines}"
        )


def _fault_of(clip: Clip) -> str:
    try:
        require_sound(clip.path)
    except (BadAudio, OSError) as error:
        return f"{clip.where}: {error}".removeprefix(": ")
    return ""


def _require_columns(
    csv_path: Path, columns: Sequence[str], needed: Sequence[str], known: Sequence[str]
) -> None:
    for name in needed:
        if name not in columns:
            raise SpecError(f"{csv_path}: no column {name!r}; it has {', '.join(columns)}")
    for name in known:
        if list(columns).count(name) > 1:
            raise SpecError(f"{csv_path}: line 1: two columns are called {name!r}")


def _require_once(clips: Sequence[RatedClip]) -> None:
    seen: dict[tuple[str, Path], str] = {}
    for clip in clips:
        first = seen.setdefault((clip.dataset, clip.path), clip.where)
        if first != clip.where:
            raise SpecError(
                f"{clip.where}: {clip.path} is rated twice in {clip.dataset!r}, first in "
                f"{first.rpartition(': ')[2]}: give one row a clip"
            )


def _clip(row: Mapping[str, str | None], csv_path: Path, where: str) -> RatedClip:
    path = file_of(csv_path, row["path"], where)
    number(row.get("ci"), "ci", where, 0, math.inf)
    votes = number(row.get("votes"), "votes", where, 1, MOST_VOTES)
    return RatedClip(
        path=path,
        mos=_rating(row["mos"], where),
        dataset=row.get("dataset") or csv_path.stem,
        condition=row.get("condition") or None,
        system=row.get("system") or None,
        votes=None if votes is None else int(votes),
        where=where,
    )


def file_of(csv_path: Path, cell: str | None, where: str) -> Path:
    """The file that a cell names, from the table's folder. ``SpecError`` if it is not there."""
    name = (cell or "").strip()
    path = csv_path.parent / name
    try:
        if not path.is_file():
            path = csv_path.parent / plain(name)  # as our tables write it
        is_there = path.is_file()
    except OSError as error:
        raise SpecError(f"{where}: {path}: {error.strerror}") from error
    if not is_there:
        raise SpecError(f"{where}: no such audio file: {path}")
    return path.resolve()


def number(text: str | None, name: str, where: str, low: float, high: float) -> float | None:
    """A cell of a column that may be empty. ``SpecError`` for what is no number or out of range."""
    if not (text or "").strip():
        return None
    try:
        value = float(text or "")
    except ValueError:
        raise SpecError(f"{where}: {name} {text!r} is not a number") from None
    if not math.isfinite(value) or not low <= value <= high:
        raise SpecError(f"{where}: {name} {text!r} is not a number from {low:g} to {high:g}")
    return value


def _rating(text: str | None, where: str) -> float:
    try:
        rating = float(text or "")
    except ValueError:
        raise SpecError(f"{where}: mos {text!r} is not a number") from None
    if not 1 <= rating <= 5:  # NaN is not, either
        raise SpecError(f"{where}: mos {rating} is not on the scale 1-5")
    return rating
