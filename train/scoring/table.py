"""Tables of scores that are appended to and resumed: CSV, JSON lines, Parquet.

A file's rows are written together; a run that was killed leaves at most one torn line or some of
a file's rows at the end, which the next run cuts off. Parquet cannot be appended to: rows are kept
in a JSON-lines journal beside it, and the table is replaced by a whole one at the end.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from data_specs.io.errors import UserError
from data_specs.io.files import lock, whole_file, write_atomically
from data_specs.io.names import cell, plain
from train.scoring.result import Score

TEXT, WHOLE, REAL = "text", "whole", "real"

COLUMNS: dict[str, str] = {
    "path": TEXT,
    "mos": REAL,
    "seconds": REAL,
    "channel": WHOLE,
    "scope": TEXT,
    "start_seconds": REAL,
    "end_seconds": REAL,
    "model": TEXT,
    "weights_sha256": TEXT,
    "version": TEXT,
    "precision": TEXT,
    "mode": TEXT,
    "short": TEXT,
    "channels": TEXT,
    "curve": TEXT,
    "file_bytes": WHOLE,
    "file_mtime_ns": WHOLE,
    "rows": WHOLE,
    "error": TEXT,
}
"""``scope`` is "clip" or "window"; ``rows`` is how many rows the file has from one run."""

Row = dict[str, Any]


class Settings(NamedTuple):
    """What, besides the file, decides a score."""

    weights_sha256: str
    version: str
    precision: str
    mode: str
    short: str
    channels: str
    curve: str


class Stamp(NamedTuple):
    """What a file was when it was scored; another size or time means other audio."""

    file_bytes: int | None
    file_mtime_ns: int | None


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file; empty where there is none."""
    try:
        about = path.stat()
    except OSError:
        return Stamp(None, None)
    return Stamp(about.st_size, about.st_mtime_ns)


def rows_of(path: Path, scores: Sequence[Score], settings: Settings, stamp: Stamp) -> list[Row]:
    """All rows of one file: for each channel the clip's and, with a curve, its windows'."""
    rows: list[Row] = []
    for score in scores:
        same = {"path": str(path), "channel": score.channel, "model": score.model}
        same |= {"error": score.error}
        same |= settings._asdict() | stamp._asdict()
        end = None if score.mos is None else score.seconds
        start = None if end is None else 0.0
        rows.append(same | _heard("clip", score.mos, score.seconds, start, end))
        if settings.curve == "yes":
            for window in score.windows:
                rows.append(same | _heard("window", window.mos, score.seconds, *window[:2]))
    return [{name: (row | {"rows": len(rows)})[name] for name in COLUMNS} for row in rows]


def _heard(
    scope: str, mos: float | None, seconds: float | None, start: float | None, end: float | None
) -> Row:
    return {
        "scope": scope,
        "mos": None if mos is None else round(mos, 6),
        "seconds": None if seconds is None else round(seconds, 3),
        "start_seconds": None if start is None else round(start, 4),
        "end_seconds": None if end is None else round(end, 4),
    }


class Table(Protocol):
    """An open table."""

    def is_done(self, path: Path, settings: Settings, stamp: Stamp) -> bool:
        """Whether the file, as it is, has its scores under these settings."""

    def append(self, rows: Sequence[Row]) -> None:
        """Add all rows of one file."""

    def close(self) -> str:
        """Make the table whole; says what was lost, or moved, if somebody removed it meanwhile."""


class _Done:
    """What is in a table: the last stamp of every file and settings, and what failed how."""

    def __init__(self) -> None:
        self.stamps: dict[tuple[str, Settings], tuple[Stamp, str | None]] = {}

    def take(self, rows: Sequence[Row]) -> None:
        stamp, errors = _stamp_in(rows[0]), [row["error"] for row in rows if row["error"]]
        self.stamps[_key(rows[0])] = stamp, (errors[0] if errors else None)

    def has(self, path: Path, settings: Settings, stamp: Stamp) -> bool:
        return self.stamps.get((str(path), settings)) == (stamp, None)

    def failed_so(self, rows: Sequence[Row]) -> bool:
        """Whether exactly this failure stands there already."""
        error = rows[0]["error"]
        return bool(error) and self.stamps.get(_key(rows[0])) == (_stamp_in(rows[0]), error)

    def contains(self, rows: Sequence[Row]) -> bool:
        """Whether these very rows were taken: same file, settings, stamp, outcome."""
        errors = [row["error"] for row in rows if row["error"]]
        outcome = _stamp_in(rows[0]), (errors[0] if errors else None)
        return self.stamps.get(_key(rows[0])) == outcome


def _key(row: Row) -> tuple[str, Settings]:
    return row["path"], Settings(*(row[name] for name in Settings._fields))


def _stamp_in(row: Row) -> Stamp:
    return Stamp(row["file_bytes"], row["file_mtime_ns"])


def open_table(path: Path) -> Table:
    """The table at ``path``, made if it is not there; the ending says which kind.

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
    """CSV or JSON lines, appended to."""

    def __init__(self, path: Path) -> None:
        self.path, self.is_csv = path, path.suffix == ".csv"
        self.done = _Done()
        self.lost = ""
        """What became of the table where somebody removed or replaced it meanwhile."""
        self.file = _opened(path)
        try:
            self._resume()
        except BaseException:
            self.file.close()
            raise

    def groups(self) -> Iterator[tuple[list[Row], int]]:
        """(all rows of one file, where they end) for every file that is whole in the table."""
        return _groups(self.path, self.file, _csv_rows if self.is_csv else _json_rows)

    def _resume(self) -> None:
        """Take what is whole, cut off the rest; an empty CSV gets its first line."""
        head = _csv_line(list(COLUMNS)) if self.is_csv else b""
        end = 0
        for rows, end in self.groups():  # noqa: B007, the last end
            self.done.take(rows)
        if not end:
            self._require_ours(head or _json_line(dict.fromkeys(COLUMNS))[:8])
            end = len(head) if os.pread(self.file.fileno(), len(head), 0) == head else 0
        self.file.truncate(end)
        if end < len(head):
            self._write(head)

    def _require_ours(self, head: bytes) -> None:
        """Refuse to cut off what no run of ours can have left: it begins otherwise."""
        begin = os.pread(self.file.fileno(), len(head), 0)
        if not head.startswith(begin):
            raise UserError(f"{self.path}: not a table of scores; give another --out")

    def is_done(self, path: Path, settings: Settings, stamp: Stamp) -> bool:
        """See ``Table``."""
        return self.done.has(path, settings, stamp)

    def append(self, rows: Sequence[Row]) -> None:
        """See ``Table``; a failure that stands there already is not written again."""
        if self.done.failed_so(rows):
            return
        text = b"".join(
            _csv_line(list(row.values())) if self.is_csv else _json_line(row) for row in rows
        )
        self._write(text)
        self.done.take(rows)

    def _write(self, text: bytes) -> None:
        self.keep()
        with _named_errors(self.path):
            while text:
                text = text[self.file.write(text) :]

    def keep(self) -> None:
        """Where the table is no longer under its name, go on with a copy of what is open."""
        if _is_open_at(self.file, self.path):
            return
        place = _own_name(self.path) if self.path.exists() else self.path
        self.lost = _lost(self.path, place)
        place.parent.mkdir(parents=True, exist_ok=True)
        self.file.seek(0)
        with whole_file(place) as copy:
            shutil.copyfileobj(self.file, copy)
        self.file.close()
        self.file, self.path = _opened(place), place

    def close(self) -> str:
        """See ``Table``."""
        try:
            self.keep()
            with _named_errors(self.path):
                os.fsync(self.file.fileno())
        finally:
            self.file.close()
        return self.lost


def _opened(path: Path) -> FileIO:
    """The file at ``path``, made if it is not there, locked for as long as it is open.

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


def _own_name(path: Path) -> Path:
    """A name beside ``path``, which is another's now."""
    return path.with_stem(f"{path.stem}.{os.getpid()}")


def _lost(path: Path, place: Path) -> str:
    return f"{path}: was removed or replaced while it was written; its rows are in {place}"


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Errors of the system with the path that they are about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_open_at(file: IO[bytes] | FileIO, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class ParquetTable:
    """Parquet; what a run adds is in ``.NAME.jsonl`` beside it until the run ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = _Done()
        _pyarrow()
        self.journal = LineTable(path.with_name(f".{path.name}.jsonl"))
        self.stored = path.open("rb") if path.exists() else None
        try:
            for rows in self._stored():
                self.done.take(rows)
        except BaseException:
            self._let_go()
            raise

    def is_done(self, path: Path, settings: Settings, stamp: Stamp) -> bool:
        """See ``Table``."""
        newer = self.journal.done.stamps.get((str(path), settings))
        if newer is not None:
            return newer == (stamp, None)
        return self.done.has(path, settings, stamp)

    def append(self, rows: Sequence[Row]) -> None:
        """See ``Table``."""
        if not self.done.failed_so(rows):
            self.journal.append(rows)

    def close(self) -> str:
        """See ``Table``: the old rows and the journal's become one file, then the journal goes.

        The journal's lock is held until then: whoever waits for it then reads all rows.
        """
        try:
            self.journal.keep()
            place, lost = self._place()
            if self.journal.done.stamps or not place.exists():
                write_atomically(place, self._write_all)
            self.journal.path.unlink()
        finally:
            self._let_go()
        return lost

    def _place(self) -> tuple[Path, str]:
        """Where the table goes, and what to say if that is not as it was when it was opened."""
        there = self.path.exists()
        same = _is_open_at(self.stored, self.path) if self.stored else not there
        if same and not self.journal.lost:
            return self.path, ""
        place = self.path if same or not there else _own_name(self.path)
        return place, _lost(self.path, place)

    def _let_go(self) -> None:
        self.journal.file.close()
        if self.stored:
            self.stored.close()

    def _stored(self) -> Iterator[list[Row]]:
        _, parquet = _pyarrow()
        if not self.stored:
            return
        self.stored.seek(0)
        try:
            with parquet.ParquetFile(self.stored) as file:
                if file.schema_arrow.names != list(COLUMNS):
                    raise UserError("its columns are others")
                rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
                yield from _whole_groups(rows)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a table of scores: {error}") from error

    def _write_all(self, temporary: Path) -> None:
        arrow, parquet = _pyarrow()
        kinds = {TEXT: arrow.string(), WHOLE: arrow.int64(), REAL: arrow.float64()}
        schema = arrow.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
        with parquet.ParquetWriter(temporary, schema) as writer:
            for rows in _in_lots(self._all()):
                plain = [{k: _unicode(v) for k, v in row.items()} for row in rows]
                writer.write_table(arrow.Table.from_pylist(plain, schema=schema))

    def _all(self) -> Iterator[Row]:
        for rows in self._stored():
            yield from rows
        for rows, _ in self.journal.groups():
            if not self.done.contains(rows):  # else: killed between the rename and the unlink
                yield from rows


def _unicode(value: Any) -> Any:
    """Parquet holds Unicode only: of a file name that is not UTF-8, what is none is replaced."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _in_lots(rows: Iterable[Row], lot: int = 10_000) -> Iterator[list[Row]]:
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) == lot:
            yield held
            held = []
    yield held


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("a .parquet table needs pyarrow: pip install pyarrow") from error
    return pyarrow, pyarrow.parquet


def _csv_line(values: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow("" if v is None else cell(v) for v in values)
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


def _csv_rows(lines: _Lines) -> Iterator[Row]:
    reader = csv.reader(iter(lines), strict=True)
    header = next(reader, None)
    if header is not None and header != list(COLUMNS):
        raise UserError("its first line is not that of a table of scores")
    for values in reader:
        yield {
            name: _value(text, COLUMNS[name]) for name, text in zip(COLUMNS, values, strict=True)
        }


def _value(text: str, kind: str) -> Any:
    if not text:
        return None
    return plain(text) if kind == TEXT else int(text) if kind == WHOLE else float(text)


def _json_rows(lines: _Lines) -> Iterator[Row]:
    for line in lines:
        row = json.loads(line)
        if not isinstance(row, dict) or list(row) != list(COLUMNS):
            raise UserError("not a row of a table of scores")
        yield row


def _groups(path: Path, file: FileIO, parse: Any) -> Iterator[tuple[list[Row], int]]:
    lines = _Lines(file)
    held: list[Row] = []
    try:
        for row in parse(lines):
            if held and _key(held[0]) != _key(row):
                held = []
            held.append(row)
            if len(held) == row["rows"]:
                yield held, lines.end
                held = []
    except (ValueError, csv.Error, KeyError) as error:
        if isinstance(error, csv.Error) and "unexpected end" in str(error):
            return  # torn within quotes
        raise UserError(
            f"{path}: line {lines.number}: {error}; give another --out, or repair it"
        ) from error


def _whole_groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) == row["rows"]:
            yield held
            held = []
