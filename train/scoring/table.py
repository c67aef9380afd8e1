"""Tables of scores that are appended to and resumed: CSV, JSON lines, Parquet.

A file's rows are written together; a run that was killed leaves at most one torn line or some of
a file's rows at the end, which the next run cuts off. Parquet cannot be appended to: rows are kept
in a JSON-lines journal beside it, and the table is replaced by a whole one at the end.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_specs.io.errors import UserError
from data_specs.io.files import lock, whole_file, write_atomically
from data_specs.io.names import cell, plain
from train.scoring.base import Score

Row = dict[str, Any]

ROWS_AT_A_TIME = 10_000
"""Rows that are in memory while a Parquet table is written."""


class Settings(NamedTuple):
    """What, besides the file, decides a score."""

    weights_sha256: str
    version: str
    precision: str
    mode: str
    padding: str
    channels: str
    curve: str


class Stamp(NamedTuple):
    """What a file was when it was scored; another size or time means other audio."""

    file_bytes: int | None
    file_mtime_ns: int | None


COLUMNS: dict[str, type] = {
    **{"path": str, "mos": float, "seconds": float, "channel": int, "scope": str},
    **{"start_seconds": float, "end_seconds": float, "model": str},
    **dict.fromkeys(Settings._fields, str),
    **{"file_bytes": int, "file_mtime_ns": int, "rows": int, "error": str},
}
"""``scope`` is "clip" or "window"; ``rows`` is how many rows the file has from one run."""


def stamp_of(path: Path) -> Stamp:
    """Return the stamp of a file; empty where there is none."""
    try:
        about = path.stat()
    except OSError:
        return Stamp(None, None)
    return Stamp(about.st_size, about.st_mtime_ns)


def rows_of(path: Path, scores: Sequence[Score], settings: Settings, stamp: Stamp) -> list[Row]:
    """Return all rows of one file: for each channel the clip's and, with a curve, its windows'."""
    same = {"path": str(path)} | settings._asdict() | stamp._asdict()
    rows: list[Row] = []
    for score in scores:
        end = None if score.mos is None else score.seconds
        found = [("clip", None if end is None else 0.0, end, score.mos)]
        if settings.curve == "yes":
            found += [("window", *window) for window in score.windows]
        of_score = {"channel": score.channel, "model": score.model, "error": score.error}
        of_score["seconds"] = _rounded(score.seconds, 3)
        for scope, start, until, mos in found:
            extent = {"start_seconds": _rounded(start, 4), "end_seconds": _rounded(until, 4)}
            rows.append(same | of_score | extent | {"scope": scope, "mos": _rounded(mos, 6)})
    return [{name: (row | {"rows": len(rows)})[name] for name in COLUMNS} for row in rows]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


Key = tuple[str, Settings]
ScoredAs = tuple[Stamp, str | None]
"""What a file was when it was scored, and why that failed."""


def _key(row: Row) -> Key:
    return row["path"], Settings(*(row[name] for name in Settings._fields))


def _outcome(rows: Sequence[Row]) -> ScoredAs:
    errors = (row["error"] for row in rows if row["error"])
    return Stamp(rows[0]["file_bytes"], rows[0]["file_mtime_ns"]), next(errors, None)


def open_table(path: Path) -> LineTable:
    """Open the table at ``path``, made if it is not there; the ending says which kind.

    ``ValueError`` for another ending or folder, a file that is no such table, one that another
    run writes to, and for Parquet where pyarrow is missing.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder for --out")
    if path.suffix in (".csv", ".jsonl"):
        return LineTable(path)
    if path.suffix == ".parquet":
        return ParquetTable(path)
    raise UserError(f"{path}: the table's name must end in .csv, .jsonl or .parquet")


class LineTable:
    """CSV or JSON lines, appended to; locked from here to ``close``."""

    def __init__(self, path: Path) -> None:
        self.path, self.is_csv = path, path.suffix == ".csv"
        self.outcomes: dict[Key, ScoredAs] = {}
        """The last outcome of every file and settings in the table."""
        self.file = _opened(path)
        try:
            self._resume()
        except BaseException:
            self._let_go()
            raise

    def is_done(self, path: Path, settings: Settings, stamp: Stamp) -> bool:
        """Whether the file, as it is, has its scores under these settings."""
        return self.outcomes.get((str(path), settings)) == (stamp, None)

    def append(self, rows: Sequence[Row]) -> None:
        """Add all rows of one file; a failure that stands there already is not written again."""
        key, outcome = _key(rows[0]), _outcome(rows)
        if rows[0]["error"] and self.outcomes.get(key) == outcome:
            return
        self._write(b"".join(map(_csv_line if self.is_csv else _json_line, rows)))
        self.outcomes[key] = outcome

    def close(self) -> str:
        """Make the table whole; say what was moved, if somebody removed it meanwhile."""
        lost = ""
        try:
            with _named_errors(self.path):
                os.fsync(self.file.fileno())
            if not _is_open_at(self.file, self.path):
                target, lost = _path_after_loss(self.path)
                self.file.seek(0)
                with whole_file(target) as copy:
                    shutil.copyfileobj(self.file, copy)
        finally:
            self._let_go()
        return lost

    def _let_go(self) -> None:
        self.file.close()

    def _resume(self) -> None:
        """Take what is whole, cut off the rest; an empty CSV gets its first line."""
        head = _csv_line({name: name for name in COLUMNS}) if self.is_csv else b""
        lines, end = _Lines(self.file), 0
        for rows in lines.groups(self.path, _csv_rows if self.is_csv else _json_rows):
            self.outcomes[_key(rows[0])], end = _outcome(rows), lines.end
        if not end:
            self._require_ours(head or _json_line(dict.fromkeys(COLUMNS))[:8])
            end = len(head) if os.pread(self.file.fileno(), len(head), 0) == head else 0
        self.file.truncate(end)
        if end < len(head):
            self._write(head)

    def _require_ours(self, head: bytes) -> None:
        """Refuse to cut off what no run of ours can have left: it begins otherwise."""
        if not head.startswith(os.pread(self.file.fileno(), len(head), 0)):
            raise UserError(f"{self.path}: not a table of scores; give another --out")

    def _write(self, text: bytes) -> None:
        with _named_errors(self.path):
            while text:
                text = text[self.file.write(text) :]


class ParquetTable(LineTable):
    """Parquet; what a run adds is in ``.NAME.jsonl`` beside it until the run ends.

    The journal's lock is held until then: whoever waits for it then reads all rows.
    """

    def __init__(self, path: Path) -> None:
        _pyarrow()
        self.table = path
        self.stored: IO[bytes] | None = None
        super().__init__(path.with_name(f".{path.name}.jsonl"))

    def close(self) -> str:
        """See ``LineTable.close``: old rows and the journal's become one file, the journal goes."""
        target, lost = self.table, ""
        try:
            as_opened = _is_open_at(self.stored, target) if self.stored else not target.exists()
            journal_is_there = _is_open_at(self.file, self.path)
            if not (as_opened and journal_is_there):
                target, lost = _path_after_loss(target, as_opened)
            if self.file.seek(0, io.SEEK_END) or not target.exists():
                write_atomically(target, self._write_all)
            if journal_is_there:
                self.path.unlink()
        finally:
            self._let_go()
        return lost

    def _let_go(self) -> None:
        super()._let_go()
        if self.stored:
            self.stored.close()

    def _resume(self) -> None:
        self.stored = self.table.open("rb") if self.table.exists() else None
        for rows in _groups(self._stored_rows()):
            self.outcomes[_key(rows[0])] = _outcome(rows)
        self.stored_outcomes = dict(self.outcomes)
        super()._resume()

    def _stored_rows(self) -> Iterator[Row]:
        if not self.stored:
            return
        self.stored.seek(0)
        try:
            with _pyarrow()[1].ParquetFile(self.stored) as file:
                if file.schema_arrow.names != list(COLUMNS):
                    raise UserError("its columns are others")
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.table}: not a table of scores: {error}") from error

    def _new_rows(self) -> Iterator[Row]:
        for rows in _Lines(self.file).groups(self.path, _json_rows):
            # Else: a run was killed between the rename and the unlink.
            if self.stored_outcomes.get(_key(rows[0])) != _outcome(rows):
                yield from rows

    def _write_all(self, temporary: Path) -> None:
        arrow, parquet = _pyarrow()
        kinds = {str: arrow.string(), int: arrow.int64(), float: arrow.float64()}
        schema = arrow.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
        rows = map(_in_unicode, itertools.chain(self._stored_rows(), self._new_rows()))
        with parquet.ParquetWriter(temporary, schema) as writer:
            while some := list(itertools.islice(rows, ROWS_AT_A_TIME)):
                writer.write_table(arrow.Table.from_pylist(some, schema=schema))


def _in_unicode(row: Row) -> Row:
    """Replace what is no Unicode in a file name: Parquet holds nothing else."""
    return {
        name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for name, value in row.items()
    }


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("a .parquet table needs pyarrow: pip install pyarrow") from error
    return pyarrow, pyarrow.parquet


# --- files that are open --------------------------------------------------------------------------


def _opened(path: Path) -> FileIO:
    """Open the file at ``path``, made if it is not there, locked for as long as it is open.

    ``UserError`` where another run holds it.
    """
    while True:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115, it stays open
        try:
            lock(file, path)
        except UserError as error:
            file.close()
            raise UserError(f"{path}: another run writes to it: wait for it or stop it") from error
        if _is_open_at(file, path):
            return file
        file.close()  # whoever held it removed it, as a journal is, or replaced it


def _is_open_at(file: IO[bytes] | FileIO, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _path_after_loss(path: Path, is_ours: bool = False) -> tuple[Path, str]:
    """Where a table goes whose file was removed or replaced, and what to say of that."""
    new = path
    if path.exists() and not is_ours:
        new = path.with_stem(f"{path.stem}.{os.getpid()}")
    new.parent.mkdir(parents=True, exist_ok=True)
    return new, f"{path}: was removed or replaced while it was written; its rows are in {new}"


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Errors of the system with the path that they are about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


# --- rows as lines --------------------------------------------------------------------------------


def _csv_line(row: Row) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(map(cell, row.values()))
    return text.getvalue().encode("utf-8", "surrogateescape")


def _json_line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


class _Lines:
    """The whole lines of a file, and where the last one that was taken ends."""

    def __init__(self, file: FileIO) -> None:
        self.file, self.end, self.number = file, 0, 0

    def __iter__(self) -> Iterator[str]:
        with open(os.dup(self.file.fileno()), "rb") as file:  # the open one: it may have no name
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # torn
                self.end += len(line)
                self.number += 1
                yield line.decode("utf-8", "surrogateescape")

    def groups(
        self, path: Path, parse: Callable[[Iterator[str]], Iterator[Row]]
    ) -> Iterator[list[Row]]:
        """All rows of one file, for every file that is whole. ``UserError`` naming a bad line."""
        try:
            yield from _groups(parse(iter(self)))
        except (ValueError, csv.Error, KeyError) as error:
            if isinstance(error, csv.Error) and "unexpected end" in str(error):
                return  # torn within quotes
            raise UserError(
                f"{path}: line {self.number}: {error}; give another --out, or repair it"
            ) from error


def _csv_rows(lines: Iterator[str]) -> Iterator[Row]:
    reader = csv.reader(lines, strict=True)
    header = next(reader, None)
    if header is not None and header != list(COLUMNS):
        raise UserError("its first line is not that of a table of scores")
    for values in reader:
        pairs = zip(COLUMNS.items(), values, strict=True)
        yield {name: _value(text, kind) for (name, kind), text in pairs}


def _value(text: str, kind: type) -> Any:
    if not text:
        return None
    return plain(text) if kind is str else kind(text)


def _json_rows(lines: Iterator[str]) -> Iterator[Row]:
    for line in lines:
        row = json.loads(line)
        if not isinstance(row, dict) or list(row) != list(COLUMNS):
            raise UserError("not a row of a table of scores")
        yield row


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Gather the rows of one file each; those of a file that lacks some are left out."""
    held: list[Row] = []
    for row in rows:
        if held and _key(held[0]) != _key(row):
            held = []
        held.append(row)
        if len(held) == row["rows"]:
            yield held
            held = []
