"""Manifests: every audio file of a corpus, its header checked, sorted, with speaker and licence."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_specs.corpus import Corpus, Part
from data_specs.io.addresses import Place, is_address, shown
from data_specs.io.audio import BadAudio, Header, header_of
from data_specs.io.errors import UserError
from data_specs.io.files import whole_file
from data_specs.io.progress import progress_bar
from data_specs.io.storage import LocalFolder, NotFound, RemoteFolder
from data_specs.io.text import printable
from data_specs.io.walk import HIDDEN, UNREAD_ENDINGS, Found, LeftOut, kind_of, unread, walk
from data_specs.recipe import Holdout
from pipeline.audio import read_remote_header

SCHEMA = pa.schema(
    [
        ("root", pa.int32()),
        ("path", pa.string()),
        ("frames", pa.int64()),
        ("sample_rate_hz", pa.int32()),
        ("channels", pa.int32()),
        ("size_bytes", pa.int64()),
        ("speaker", pa.string()),
        ("language", pa.string()),
        ("licence", pa.string()),
        ("rejected", pa.string()),
    ]
)
"""``rejected`` says why a file is left out; it is empty for the files that are used."""

NO_PART = "in no part of the corpus: its include patterns do not fit"
NOT_UNICODE = "name is not UTF-8: rename it"

HEADER_THREADS = 16
"""Reading headers waits for the disk or the network, not for the processor."""


class CorpusError(UserError):
    """A corpus folder cannot be used; the message names the folder and what to do."""


@dataclass(frozen=True)
class Manifest:
    """A corpus as it was found. ``table`` has ``SCHEMA``, sorted by root and path."""

    name: str
    table: pa.Table

    @property
    def usable(self) -> pa.Table:
        """The rows that are not rejected."""
        return self.table.filter(pc.equal(self.table["rejected"], ""))

    def sha256(self) -> str:
        """Hash of the usable files: paths, headers, sizes, speakers, languages; not the folder."""
        columns = [name for name in SCHEMA.names if name not in ("licence", "rejected")]
        digest = hashlib.sha256(self.name.encode())
        for batch in self.usable.select(columns).to_batches(max_chunksize=10_000):
            rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
            digest.update("\n".join(map(repr, rows)).encode())
        return digest.hexdigest()

    def left_out(self) -> list[LeftOut]:
        """What is left out, and why."""
        table = self.table.filter(pc.not_equal(self.table["rejected"], ""))
        columns = (table[name].to_pylist() for name in ("path", "rejected"))
        return [LeftOut(*pair) for pair in zip(*columns, strict=True)]

    def rejections(self) -> Counter[str]:
        """How many files were left out, by reason."""
        return Counter(one.kind for one in self.left_out())

    def summary(self) -> str:
        """One line: files, hours, speakers, and what was left out."""
        table = self.usable
        hours = sum(
            f / r
            for f, r in zip(
                table["frames"].to_pylist(), table["sample_rate_hz"].to_pylist(), strict=True
            )
        )
        left_out = ", ".join(f"{n} {reason}" for reason, n in self.rejections().most_common())
        return (
            f"{self.name}: {len(table)} files, {hours / 3600:.2f} h, "
            f"{len(set(table['speaker'].to_pylist()))} speakers"
            + (f"; left out: {left_out}" if left_out else "")
        )

    def save(self, path: Path) -> None:
        """Write as parquet, whole or not at all."""
        with whole_file(path) as file:
            self.write(file)

    def write(self, file: IO[bytes]) -> None:
        """Write as parquet."""
        pq.write_table(self.table, file)

    @classmethod
    def read(cls, name: str, path: Path) -> Manifest:
        """Read a saved manifest. Raises ``CorpusError`` where the file is not one."""
        return cls.load(name, LocalFolder(path.parent), path.name)

    @classmethod
    def load(cls, name: str, folder: LocalFolder | RemoteFolder, file: str) -> Manifest:
        """Read one out of a folder, wherever that is."""
        where = folder.shown(file)
        try:
            with folder.open(file) as opened:
                table = pq.read_table(pa.PythonFile(opened, mode="r"))
        except (NotFound, pa.ArrowInvalid) as error:
            raise CorpusError(f"{where}: not a manifest: {error}") from error
        if table.schema.names != SCHEMA.names:
            raise CorpusError(f"{where}: not a manifest of this version: {table.schema.names}")
        return cls(name, table)


def scan(name: str, corpus: Corpus, roots: Sequence[Place], progress: bool = True) -> Manifest:
    """Look at every audio file of a corpus below its folders, given by path or address.

    Raises ``CorpusError`` for a folder that is missing or holds no usable file.
    """
    if not roots:
        raise CorpusError(f"corpus {name!r} has no folder: give --corpus {name}=DIR")
    found, left_out = [], []
    for index, root in enumerate(roots):
        below = _found_below(root)
        parts = {path: _part_of(corpus, path) for path in below.files}
        found += [(index, path, part) for path, part in parts.items() if part]
        left_out += [(index, one) for one in below.left_out]
        left_out += [(index, LeftOut(path, NO_PART)) for path, part in parts.items() if not part]
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        looked_at = pool.map(lambda f: _row(corpus, roots[f[0]], *f), found)
        bar = progress_bar(
            looked_at, total=len(found), desc=f"scan {name}", unit="file", disable=not progress
        )
        rejected = [_empty_row(index, one) for index, one in left_out]
        rows = sorted([*bar, *rejected], key=lambda row: (row["root"], row["path"]))
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
    manifest = Manifest(name, table)
    if not len(manifest.usable):
        where = ", ".join(shown(root) for root in roots)
        rejected = [row for row in table.to_pylist() if row["rejected"]]
        reasons = "; ".join(f"{row['path']}: {row['rejected']}" for row in rejected[:3])
        raise CorpusError(f"corpus {name!r}: no usable audio file in {where}. {reasons}".strip())
    return manifest


def _part_of(corpus: Corpus, path: str) -> Part | None:
    """The first part that includes a path."""
    return next((part for part in corpus.parts if _included(path, part.include)), None)


def _found_below(root: Place) -> Found:
    """The audio files below a folder. ``CorpusError`` where it is not there."""
    if is_address(root):
        return _found_at(RemoteFolder(str(root)))
    try:
        found = walk(root)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorpusError(f"{root}: no such folder, or it is empty") from error
    except OSError as error:
        raise CorpusError(f"{root}: the folder cannot be read: {error.strerror}") from error
    named = [path for path in found.files if _is_unicode(path)]
    others = [LeftOut(path, NOT_UNICODE) for path in found.files if not _is_unicode(path)]
    return Found(named, sorted([*found.left_out, *others]))


def _is_unicode(path: str) -> bool:
    return path.encode("utf-8", "surrogateescape") == path.encode("utf-8", "replace")


def _found_at(folder: RemoteFolder) -> Found:
    tree = sorted(folder.tree())
    if not tree:
        raise CorpusError(f"{folder.shown()}: no such folder, or it is empty")
    found = Found()
    for path in filter(kind_of, tree):
        if any(name.startswith(".") for name in path.split("/")):
            found.left_out.append(LeftOut(path, HIDDEN))
        elif kind_of(path) in UNREAD_ENDINGS:
            found.left_out.append(LeftOut(path, unread(path)))
        else:
            found.files.append(path)
    return found


def _included(path: str, globs: Iterable[str]) -> bool:
    # fnmatch's * crosses folders, so that only a leading **/ needs care: it may stand for nothing.
    # An ending in capitals is the same ending: all of TIMIT has it.
    stem, ending = os.path.splitext(path)
    names = {path, stem + ending.lower()}
    both = [each for glob in globs for each in (glob, glob.removeprefix("**/"))]
    return any(fnmatch(name, glob) for name in names for glob in both)


def _row(corpus: Corpus, root: Place, index: int, path: str, part: Part) -> dict[str, object]:
    speaker, language = identify(part, path)
    row: dict[str, object] = {
        "root": index,
        "path": path,
        "speaker": speaker,
        "language": language or "",
        "licence": part.licence,
    }
    try:
        header = _header(root, path)
    except BadAudio as error:
        return _empty_row(index, LeftOut(path, error.reason)) | row
    except (PermissionError, FileNotFoundError) as error:
        return _empty_row(index, LeftOut(path, f"cannot be read: {error.strerror}")) | row
    return row | vars(header) | {"rejected": _reason(corpus, header.frames, header.sample_rate_hz)}


def _empty_row(index: int, left_out: LeftOut) -> dict[str, object]:
    """The row of a file that is left out. Parquet holds Unicode only: other bytes are escaped."""
    path, reason = (printable(text) for text in (left_out.path, left_out.reason))
    row: dict[str, object] = {"root": index, "path": path, "rejected": reason}
    numbers = dict.fromkeys(("frames", "sample_rate_hz", "channels", "size_bytes"), 0)
    return row | numbers | {"speaker": path, "language": "", "licence": ""}


def _header(root: Place, path: str) -> Header:
    if is_address(root):
        return read_remote_header(str(root), path)
    return header_of(Path(root) / path)


def _reason(corpus: Corpus, frames: int, sample_rate_hz: int) -> str:
    if sample_rate_hz < corpus.min_sample_rate_hz:
        return f"sample rate too low: {sample_rate_hz} Hz, at least {corpus.min_sample_rate_hz}"
    if frames < corpus.min_seconds * sample_rate_hz or frames <= 0:
        return f"too short: {frames / sample_rate_hz:.3f} s, at least {corpus.min_seconds} s"
    return ""


def identify(part: Part, path: str) -> tuple[str, str | None]:
    """Speaker and language of a file: the first pattern that matches its relative path."""
    for pattern in part.patterns:
        match = re.search(pattern, path)
        if match:
            groups = match.groupdict()
            return groups.get("speaker") or path, groups.get("language") or part.language
    return PurePosixPath(path).as_posix(), part.language


def split_of(groups: Sequence[str], holdout: Holdout) -> dict[str, str]:
    """Assign each group (speaker, or noise file) to train, validation or test.

    By a hash of its name, so that a group stays where it is when a corpus grows. With three groups
    or more, no split that is asked for stays empty: the group whose hash is nearest to it goes
    there from a split that can spare one.
    """
    place = {g: int(hashlib.blake2b(g.encode(), digest_size=6).hexdigest(), 16) for g in groups}
    ranked = sorted(place, key=lambda group: (place[group], group))
    edges = (holdout.test, holdout.test + holdout.validation)
    split = {g: _split_at(place[g] / 2**48, edges) for g in ranked}
    wanted = {"test": holdout.test > 0, "validation": holdout.validation > 0, "train": True}
    for name in [name for name in wanted if wanted[name] and len(ranked) >= 3]:
        if name not in split.values():
            counts = Counter(split.values())
            spare = [g for g in ranked if counts[split[g]] > 1]
            split[spare[-1] if name == "train" else spare[0]] = name
    return split


def _split_at(place: float, edges: tuple[float, float]) -> str:
    return "test" if place < edges[0] else "validation" if place < edges[1] else "train"
