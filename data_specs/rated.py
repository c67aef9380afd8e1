"""Rated sets: clips that people scored, in one CSV form.

Columns ``path, mos`` (required) and ``votes, condition, system, dataset`` (optional); paths are
relative to the CSV file; further columns are ignored. A set on another scale (MUSHRA, 0 to 100) is
mapped linearly to 1 to 5.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from data_specs.io.errors import UserError
from data_specs.io.names import plain
from data_specs.strict import HERE, SpecError, Strict, load


class RatedClip(Strict):
    """One clip and what people said of it, on the scale 1 (bad) to 5 (excellent)."""

    path: Path
    mos: Annotated[float, Field(ge=1, le=5)]
    dataset: str
    condition: str | None = None
    system: str | None = None
    votes: int | None = None
    where: str = ""
    """Its CSV file and line, for messages."""


class Scale(Strict):
    """The scale of the ratings in a CSV file: (1, 5) for MOS, (0, 100) for MUSHRA."""

    low: float = 1.0
    high: float = 5.0

    @model_validator(mode="after")
    def _ordered(self) -> Scale:
        if self.low >= self.high:
            raise UserError(f"low {self.low} is not below high {self.high}")
        return self

    def to_mos(self, rating: float) -> float:
        """Map a rating linearly to 1 to 5; 0 to 100 as the paper does for MUSHRA (section III)."""
        return 1 + 4 * (rating - self.low) / (self.high - self.low)


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


def read_rated(csv_path: Path | str, scale: Scale | None = None) -> list[RatedClip]:
    """Read a CSV of rated clips.

    ``scale`` is the scale of the column ``mos`` (1 to 5 if not given). Raises ``SpecError`` naming
    the file and the row for a missing column or clip, a rating that is no number or off the scale.
    """
    csv_path = Path(csv_path)
    if not csv_path.is_file():
        raise SpecError(f"{csv_path}: no such file; a rated set is a CSV with columns path, mos")
    with csv_path.open(newline="", encoding="utf-8-sig") as file, _named_errors(csv_path):
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = reader.fieldnames or []
        for needed in ("path", "mos"):
            if needed not in columns:
                raise SpecError(f"{csv_path}: no column {needed!r}; it has {', '.join(columns)}")
        clips = [
            _clip(row, csv_path, reader.line_num, scale or Scale())
            for row in reader
            if any(row.values())
        ]
    if not clips:
        raise SpecError(f"{csv_path}: no rows")
    return clips


@contextmanager
def _named_errors(csv_path: Path) -> Iterator[None]:
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"{csv_path}: not a CSV in UTF-8: {error}") from error


def _clip(row: dict[str, str], csv_path: Path, line: int, scale: Scale) -> RatedClip:
    where = f"{csv_path}: line {line}"
    path = csv_path.parent / (row["path"] or "").strip()
    if not path.is_file():
        path = csv_path.parent / plain((row["path"] or "").strip())  # as our tables write it
    if not path.is_file():
        raise SpecError(f"{where}: no such audio file: {path}")
    return RatedClip(
        path=path.resolve(),
        mos=_rating(row["mos"], where, scale),
        dataset=row.get("dataset") or csv_path.stem,
        condition=row.get("condition") or None,
        system=row.get("system") or None,
        votes=_votes(row.get("votes"), where),
        where=where,
    )


def _rating(text: str | None, where: str, scale: Scale) -> float:
    try:
        rating = float(text or "")
    except ValueError:
        raise SpecError(f"{where}: mos {text!r} is not a number") from None
    if not math.isfinite(rating) or not scale.low <= rating <= scale.high:
        raise SpecError(f"{where}: mos {rating} is not on the scale {scale.low:g}-{scale.high:g}")
    return scale.to_mos(rating)


def _votes(text: str | None, where: str) -> int | None:
    if not text:
        return None
    try:
        return int(float(text))
    except ValueError:
        raise SpecError(f"{where}: votes {text!r} is not a number") from None
