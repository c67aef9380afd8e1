"""Manifests: every audio file of a corpus, its header checked, sorted, with speaker and licence."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_specs.corpus import Corpus, Part, find_corpus
from data_specs.io.addresses import PathOrUrl, is_address, shown
from data_specs.io.audio import BadAudio, Header, header_of
from data_specs.io.errors import UserError
from data_specs.io.files import whole_file
from data_specs.io.names import inside
from data_specs.io.progress import progress_bar
from data_specs.io.retry import patiently
from data_specs.io.storage import LocalFolder, NotFound, RemoteFolder
from data_specs.io.text import printable
from data_specs.io.walk import (
    HIDDEN,
    UNREAD_ENDINGS,
    Found,
    LeftOut,
    kind_of,
    print_left_out,
    unread,
    walk,
)
from data_specs.recipe import Holdout
from data_specs.strict import digest
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
        ("stamp", pa.string()),
    ]
)
"""``rejected`` says why a file is left out; it is empty for the files that are used. ``stamp``
changes when the file does (``_stamp``): with its size it says whether it must be read again."""

SCAN_VERSION = 1
"""Raised whenever a scan says something else of the same file: manifests are then made again."""

NOT_HASHED = ("licence", "rejected", "stamp")
"""Columns that change no sample."""

MOST_BYTES, MOST_FILES, MOST_TEXT_BYTES = 1 << 30, 20_000_000, 1 << 31
"""Of a manifest that is read: its file, its rows, and each column of text once it is decoded."""

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

    @cached_property
    def sha256(self) -> str:
        """Hash of the usable files: paths, headers, sizes, speakers, languages; not the folder."""
        columns = [name for name in SCHEMA.names if name not in NOT_HASHED]
        found = hashlib.sha256(self.name.encode())
        table = self.usable.select(columns).combine_chunks()  # however it was read or put together
        for batch in table.to_batches(max_chunksize=10_000):
            rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
            found.update("\n".join(map(repr, rows)).encode())
        return found.hexdigest()

    def groups(self) -> list[str]:
        """Who speaks, or what was recorded together, in the files that are used, sorted."""
        return sorted(set(self.usable["speaker"].to_pylist()))

    def left_out(self) -> list[LeftOut]:
        table = self.table.filter(pc.not_equal(self.table["rejected"], ""))
        columns = (table[name].to_pylist() for name in ("path", "rejected"))
        return [LeftOut(*pair) for pair in zip(*columns, strict=True)]

    def rejections(self) -> Counter[str]:
        """How many files were left out, by reason."""
        return Counter(one.kind for one in self.left_out())

    def summary(self) -> str:
        """One line: files, hours, speakers, and what was left out."""
        table = self.usable
        seconds = table["frames"].to_numpy() / table["sample_rate_hz"].to_numpy()
        hours = sum(seconds.tolist()) / 3600
        left_out = ", ".join(f"{n} {reason}" for reason, n in self.rejections().most_common())
        return f"{self.name}: {len(table)} files, {hours:.2f} h, {len(self.groups())} speakers" + (
            f"; left out: {left_out}" if left_out else ""
        )

    def save(self, path: Path) -> None:
        """Write as parquet, whole or not at all."""
        with whole_file(path) as file:
            self.write(file)

    def write(self, file: IO[bytes]) -> None:
        """Write as parquet, with checksums."""
        pq.write_table(self.table, file, write_page_checksum=True)

    @classmethod
    def load(cls, name: str, folder: LocalFolder | RemoteFolder, file: str) -> Manifest:
        """Read one out of a folder, wherever that is.

        Raises ``CorpusError`` naming the file where it is no manifest, damaged or too large.
        """
        where = folder.shown(file)
        try:
            if (size := folder.size(file)) > MOST_BYTES:
                raise CorpusError(f"{where}: not a manifest: {size} bytes are too many")
            with folder.open(file) as opened:
                return cls(name, _checked(_read_parquet(opened)))
        except NotFound as error:
            raise CorpusError(f"{where}: not a manifest: {error}") from error
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise CorpusError(
                f"{where}: not a manifest, or damaged ({error}): bring back the one that the "
                "dataset was made with"
            ) from error


def _read_parquet(file: IO[bytes]) -> pa.Table:
    """A table whose size is held to limits before text is written out: a few bytes may say a
    million times the same."""
    source = pa.PythonFile(file, mode="r")
    about = pq.read_metadata(source)
    if about.num_rows > MOST_FILES:
        raise pa.ArrowInvalid(f"{about.num_rows} rows are too many")
    if about.schema.names != SCHEMA.names:
        raise pa.ArrowInvalid(f"its columns are {', '.join(about.schema.names[:20])}")
    texts = [name for name in about.schema.names if SCHEMA.field(name).type == pa.string()]
    table = pq.ParquetFile(
        source, metadata=about, read_dictionary=texts, page_checksum_verification=True
    ).read()
    for place, name in enumerate(SCHEMA.names):
        if name in texts:
            table = table.set_column(place, name, _written_out(table[name], name))
    return table.cast(SCHEMA.with_metadata(table.schema.metadata))


def _written_out(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        lengths = (pc.binary_length(c.dictionary).take(c.indices) for c in column.chunks)
        if sum(pc.sum(chunk).as_py() or 0 for chunk in lengths) > MOST_TEXT_BYTES:
            raise pa.ArrowInvalid(f"column {name!r} is too long")
    return column.cast(pa.string())


def _checked(table: pa.Table) -> pa.Table:
    """The table, where every row can be a scan's."""
    rejected = pc.not_equal(table["rejected"], "")
    numbers = ("root", "frames", "sample_rate_hz", "channels", "size_bytes")
    wrong = {
        "an empty field": [pc.is_null(table[name]) for name in SCHEMA.names],
        "a negative number": [pc.less(table[name], 0) for name in numbers],
        "a file without audio": [
            pc.and_(pc.invert(rejected), pc.less(table[name], 1))
            for name in ("frames", "sample_rate_hz", "channels")
        ],
        "a path that leaves its folder": [
            pc.match_substring_regex(table["path"], r"^/|^$|(^|/)\.\.(/|$)|\x00")
        ],
    }
    for what, masks in wrong.items():
        if any(pc.any(mask).as_py() for mask in masks):
            raise pa.ArrowInvalid(f"it has {what}")
    files = table.select(["root", "path"])
    if len(files.group_by(["root", "path"]).aggregate([])) != len(table):
        raise pa.ArrowInvalid("it has a file twice")
    return table


def scan(
    name: str,
    corpus: Corpus,
    roots: Sequence[PathOrUrl],
    known: Manifest | None = None,
) -> Manifest:
    """Look at every audio file of a corpus below its folders, given by path or address.

    Files that are as ``known`` has them, by folder, name, size and stamp, are not opened again;
    where that is so of all, ``known`` itself comes back.

    Raises ``CorpusError`` for a folder that is missing or holds no usable file.
    """
    if not roots:
        raise CorpusError(f"corpus {name!r} has no folder: give --corpus {name}=DIR")
    found, left_out = _found(corpus, roots)
    rejected = [_empty_row(index, one) | {"stamp": ""} for index, one in left_out]
    made_by = {"scan": str(SCAN_VERSION), "corpus": digest(corpus.model_dump(mode="json"))}
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        stamps = _stamps(roots, [(i, path) for i, path, _ in found], pool)
        kept = _kept(known, made_by, stamps)
        same = known and len(kept) == len(found) == len(known.table) - len(rejected)
        if known and same:  # what a walk left out has no stamp
            left_out_then = known.table.filter(pc.equal(known.table["stamp"], "")).to_pylist()
            if _keys(left_out_then) == _keys(rejected):
                return known
        looked_at = pool.map(lambda f: kept.get(f[:2]) or _row(corpus, roots[f[0]], *f), found)
        bar = progress_bar(looked_at, total=len(found), desc=f"scan {name}", unit="file")
        stamped = [
            row | {"stamp": stamp, "size_bytes": row["size_bytes"] or size or 0}
            for row, (size, stamp) in zip(bar, stamps.values(), strict=True)
        ]
        rows = sorted([*stamped, *rejected], key=lambda row: (row["root"], row["path"]))
        table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(made_by))
    manifest = Manifest(name, table)
    if not len(manifest.usable):
        where = ", ".join(shown(root) for root in roots)
        rejected = [row for row in table.to_pylist() if row["rejected"]]
        reasons = "; ".join(f"{row['path']}: {row['rejected']}" for row in rejected[:3])
        raise CorpusError(f"corpus {name!r}: no usable audio file in {where}. {reasons}".strip())
    return manifest


def scan_folders(role: str, option: str, folders: Sequence[PathOrUrl]) -> Manifest:
    """Scan folders of noise or rooms, given by an option; what is left out is printed.

    Raises ``CorpusError`` for a folder that is missing or holds no usable file.
    """
    manifest = scan(option, find_corpus(role, f"--{option}"), folders)
    print_left_out(f"--{option}", manifest.left_out())
    return manifest


def _found(
    corpus: Corpus, roots: Sequence[PathOrUrl]
) -> tuple[list[tuple[int, str, Part]], list[tuple[int, LeftOut]]]:
    """Every file below the folders that a part includes, and what is left out: (folder, ...)."""
    found, left_out = [], []
    for index, root in enumerate(roots):
        below = _found_below(root)
        parts = {
            path: next((part for part in corpus.parts if _included(path, part.include)), None)
            for path in below.files
        }
        found += [(index, path, part) for path, part in parts.items() if part]
        left_out += [(index, one) for one in below.left_out]
        left_out += [(index, LeftOut(path, NO_PART)) for path, part in parts.items() if not part]
    return found, left_out


def _keys(rows: Iterable[Mapping[str, object]]) -> set[tuple[object, ...]]:
    return {(row["root"], row["path"], row["rejected"]) for row in rows}


def _stamps(
    roots: Sequence[PathOrUrl], files: Sequence[tuple[int, str]], pool: ThreadPoolExecutor
) -> dict[tuple[int, str], tuple[int | None, str]]:
    """Size and stamp of each file (folder number, path): on a disk time and mode, at an address
    what its listing tells. Without a size nothing is known."""
    listed = {i: RemoteFolder(str(r)).tree() for i, r in enumerate(roots) if is_address(r)}

    def stamp(file: tuple[int, str]) -> tuple[int | None, str]:
        root, path = file
        if root in listed:
            return listed[root].get(path, (None, ""))
        try:
            status = (Path(roots[root]) / path).stat()
        except OSError:  # what is wrong with it is told by who opens it
            return None, ""
        return status.st_size, f"{status.st_mtime_ns} {status.st_mode:o}"

    return dict(zip(files, pool.map(stamp, files), strict=True))


def _kept(
    known: Manifest | None,
    made_by: Mapping[str, str],
    stamps: Mapping[tuple[int, str], tuple[int | None, str]],
) -> dict[tuple[int, str], dict[str, object]]:
    """The rows of files that are still as ``known`` has them, if it was made by the same rules."""
    metadata = (known.table.schema.metadata if known else None) or {}
    if not known or any(metadata.get(k.encode()) != v.encode() for k, v in made_by.items()):
        return {}
    return {
        (row["root"], row["path"]): row
        for batch in known.table.to_batches(max_chunksize=10_000)
        for row in batch.to_pylist()
        if stamps.get((row["root"], row["path"])) == (row["size_bytes"], row["stamp"])
    }


def _found_below(root: PathOrUrl) -> Found:
    """The audio files below a folder. ``CorpusError`` where it is not there."""
    if is_address(root):
        return _found_at(RemoteFolder(str(root)))
    try:
        found = walk(root)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorpusError(f"{root}: no such folder, or it is empty") from error
    except OSError as error:
        raise CorpusError(f"{root}: the folder cannot be read: {error.strerror}") from error
    named = [path for path in found.files if is_unicode(path)]
    others = [LeftOut(path, NOT_UNICODE) for path in found.files if not is_unicode(path)]
    return Found(named, sorted([*found.left_out, *others]))


def is_unicode(path: str) -> bool:
    """Whether a name can stand in a table."""
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


def _row(corpus: Corpus, root: PathOrUrl, index: int, path: str, part: Part) -> dict[str, object]:
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


def _header(root: PathOrUrl, path: str) -> Header:
    inside(path)
    if is_address(root):
        return read_remote_header(str(root), path)
    return patiently(partial(header_of, Path(root) / path))


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


def split_of(
    groups: Sequence[str], holdout: Holdout, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Assign each group (speaker, or noise file) to train, validation or test.

    By a hash of its name; groups that are ``known`` stay where they are. With three groups or more,
    no split that is asked for stays empty where a new group can fill it: the one whose hash is
    nearest goes there from a split that can spare it. It must stay there when the corpus grows:
    keep ``exceptions`` of the result.
    """
    known = known or {}
    ranked = sorted(groups, key=lambda group: (_place(group), group))
    split = {g: known.get(g) or _by_hash(g, holdout) for g in ranked}
    wanted = {"test": holdout.test > 0, "validation": holdout.validation > 0, "train": True}
    for name in [name for name in wanted if wanted[name] and len(ranked) >= 3]:
        counts = Counter(split.values())
        spare = [g for g in ranked if g not in known and counts[split[g]] > 1]
        if spare and not counts[name]:
            split[spare[-1] if name == "train" else spare[0]] = name
    return split


def exceptions(split: Mapping[str, str], holdout: Holdout) -> dict[str, str]:
    """The groups that are not in the split of their hash: a few, that fill an empty one."""
    return {g: name for g, name in sorted(split.items()) if name != _by_hash(g, holdout)}


def split_again(groups: Sequence[str], holdout: Holdout, kept: Mapping[str, str]) -> dict[str, str]:
    """What ``split_of`` gave, out of the ``exceptions`` that were kept of it."""
    return {g: kept.get(g) or _by_hash(g, holdout) for g in groups}


def _place(group: str) -> int:
    return int(hashlib.blake2b(group.encode(), digest_size=6).hexdigest(), 16)


def _by_hash(group: str, holdout: Holdout) -> str:
    place = _place(group) / 2**48
    held_out = "test" if place < holdout.test else "validation"
    return held_out if place < holdout.test + holdout.validation else "train"
