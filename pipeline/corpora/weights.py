"""Fetch the weight files that processors and teachers need into one cache.

``<cache>/<name>/`` holds the files of an entry of ``data_specs/weights.yaml`` by their official
names, and ``SHA256SUMS`` once all of them are whole. A file being fetched is called ``.part`` until
its size and hash were checked, so ``train.models.weights.find`` takes nothing half-fetched. Files
placed by hand are used as they are; ``make weights`` checks and records them.

Files come in pieces through ``data_specs.io.storage``: it tries again, follows no redirection from
https to http and takes no more bytes than it asked for. pooch 1.9 does none of these, and neither
it nor ``hf_hub_download`` goes on with what an earlier process began (up to 8 GB).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from data_specs import weight as table
from data_specs.io.errors import UserError
from data_specs.io.files import one_at_a_time, sha256_of, sync_folder, whole_file, write_text
from data_specs.io.names import inside
from data_specs.io.progress import progress_bar
from data_specs.io.storage import RemoteFolder
from data_specs.weight import Archive, Build, HuggingFace, Plain, WeightFile, Weights, Wheel
from train.models.weights import (
    FOLDER_VARIABLE,
    MOST_BYTES,
    SUMS_FILE,
    Sum,
    Sums,
    cache_folder,
    entry_of,
    folder_of,
    read_sums,
    remedy,
    state_of,
)

LOCK_FILE = ".lock"
PIECE_BYTES = 16 << 20
MOST_UNPACKED_BYTES = 1 << 30
"""Of a file in a zip whose size the table does not say; the largest has 20 MB."""


def fetch(name: str, entry: Weights) -> None:
    """Bring every file of an entry into the cache, checked; what is there already is kept.

    Interrupted, it goes on where it was. Raises ``OSError`` naming the address and what is wrong.
    """
    if isinstance(entry, Wheel | Build):
        state = state_of(name, entry)
        if state.problem:
            raise FileNotFoundError(state.problem)
        print(f"{name}: {state.word}; nothing to fetch")
        return
    folder = folder_of(name, entry)
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder / LOCK_FILE):
        if state_of(name, entry).word != "whole":
            sums = _files(entry, folder, read_sums(folder))
            # Sizes in comments, hashes as ``sha256sum -c SHA256SUMS`` reads them.
            lines = [f"# {s.size} bytes: {name}\n{s.sha256}  {name}\n" for name, s in sums.items()]
            write_text(folder / SUMS_FILE, "".join(lines))
        print(f"{name}: whole in {folder}; licence {entry.licence}")


def _files(entry: Plain | HuggingFace | Archive, folder: Path, recorded: Sums) -> Sums:
    """Have every file of an entry in its folder, and say what they are."""
    sums = {}
    archive = folder / entry.archive.name if isinstance(entry, Archive) else None
    for file in entry.files:
        path, before = folder / file.name, recorded.get(file.name)
        if path.is_file():  # it may be somebody's own
            sums[file.name] = measure(path)
            if problem := _objection(file, sums[file.name], before):
                raise OSError(f"{path} {problem}: move it away, and run the same command again")
        elif isinstance(entry, Archive) and archive:
            if not archive.is_file():
                _download(entry.archive, entry.archive.url, archive)
            sums[file.name] = _unpack(entry, archive, file, path, before)
        elif isinstance(entry, HuggingFace):
            sums[file.name] = _download(*_at_hub(entry, file, folder), path, before)
        else:
            sums[file.name] = _download(file, getattr(file, "url", ""), path, before)
    if archive:
        archive.unlink(missing_ok=True)
    return sums


def _objection(file: WeightFile, have: Sum, before: Sum | None) -> str:
    """What speaks against a file: the table's size or hash, or those of an earlier fetch."""
    if file.size is not None and have.size != file.size:
        return f"has {have.size} bytes, expected {file.size}"
    if not have.sha256.startswith(file.published):
        return f"has SHA-256 {have.sha256}, expected {file.published}"
    if before and have.sha256 != before.sha256:
        return f"has SHA-256 {have.sha256}, was fetched before with {before.sha256}"
    return ""


def measure(path: Path) -> Sum:
    """Size and SHA-256 of a file."""
    return Sum(path.stat().st_size, sha256_of(path))


# --- one file over HTTP ---------------------------------------------------------------------------


def _at_hub(entry: HuggingFace, file: WeightFile, folder: Path) -> tuple[WeightFile, str]:
    """A hub's file with the size and SHA-256 that the hub says where the table does not, and its
    address. Raises ``OSError`` where the hub cannot be asked (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(entry.repository, file.name, revision=entry.revision)
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"{url}: HF_HUB_OFFLINE is set: unset it, or copy the file to {folder}")
    if file.published:
        return file, url
    found = get_hf_file_metadata(url, token=False)
    tag = found.etag or ""  # of a small file it is git's hash: its commit is what pins it
    known = {"size": file.size or found.size, "sha256": tag if len(tag) == 64 else None}
    return WeightFile.model_validate(file.model_dump() | known), url


def _download(file: WeightFile, url: str, path: Path, before: Sum | None = None) -> Sum:
    """Fetch a file, or the rest of it, and give it its name once it is what it should be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    if not (file.published or before):
        part.unlink(missing_ok=True)  # no hash would tell that two halves are of two files
    have = _transfer(url, part, file.size)
    if problem := _objection(file, have, before):
        part.unlink()
        raise OSError(f"{url} {problem}; it was deleted, run the same command to try again")
    if not (file.published or before):
        print(f"no SHA-256 of {url} is published; from now on it has to be {have.sha256}")
    part.replace(path)
    sync_folder(path.parent)
    return have


def _transfer(url: str, part: Path, size: int | None) -> Sum:
    """Bring ``part`` up to ``size``, or what the server says, from where it ends."""
    address, _, name = url.rpartition("/")
    source, name = RemoteFolder(address), unquote(name)
    size = source.size(name) if size is None else size
    if size > MOST_BYTES:
        raise OSError(f"{url}: {size} bytes are too many: not a file of weights")
    if part.is_file() and part.stat().st_size > size:
        part.unlink()
    with (
        part.open("ab") as file,
        progress_bar(total=size, unit="B", unit_scale=True, desc=part.stem) as bar,
    ):
        for start in range(file.tell(), size, PIECE_BYTES):
            file.write(source.part(name, start, min(start + PIECE_BYTES, size)))
            bar.update(file.tell() - bar.n)
        file.flush()
        os.fsync(file.fileno())
    return measure(part)


# --- archives -------------------------------------------------------------------------------------


def _unpack(entry: Archive, path: Path, file: WeightFile, target: Path, before: Sum | None) -> Sum:
    """Write one file of a zip to ``target``: no name from within it is ever used as a path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as archive:
            member = _member(archive, file.name, entry.flat)
            if member.file_size > (file.size or MOST_UNPACKED_BYTES):
                raise UserError(f"{file.name} would have {member.file_size} bytes: too many")
            with archive.open(member) as source, whole_file(target) as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
                copy.flush()
                have = measure(Path(copy.name))
                if problem := _objection(file, have, before):
                    raise OSError(f"{file.name} in {entry.archive.url} {problem}")
    except (zipfile.BadZipFile, ValueError) as error:
        path.unlink()
        raise OSError(f"{entry.archive.url}: {error}; it was deleted") from error
    return have


def _member(archive: zipfile.ZipFile, name: str, flat: bool) -> zipfile.ZipInfo:
    """The file called ``name``. ``UserError`` if it is not there, or any name leads outside."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    for info in infos:
        try:
            inside(info.filename)
        except UserError as error:
            raise UserError(f"the archive leads out of its folder: {error}") from None
    found = [i for i in infos if (PurePosixPath(i.filename).name if flat else i.filename) == name]
    if len(found) != 1:
        held = ", ".join(info.filename for info in infos)
        raise UserError(f"the archive has {len(found)} files {name!r}; it holds {held}")
    return found[0]


# --- the verb -------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Fetch, list or check weights. Exit status 1 where something is not whole."""
    entries = {name: entry_of(name) for name in options.names or table.all_weights()}
    if options.list:
        print(_listing(entries))
        return 0
    if options.check:
        return _check(entries, bool(options.names))
    if not options.names:
        entries = {name: entry for name, entry in entries.items() if entry.by_default}
    return _fetch(entries)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = f"The cache is ${FOLDER_VARIABLE}, or else ~/.cache/distill-mos-factory."
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="default: what the paper's processors read"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="show the table, and what is here")
    only.add_argument("--check", action="store_true", help="read and hash every file that is here")


def _fetch(entries: Mapping[str, Weights]) -> int:
    failed = 0
    for name, entry in entries.items():
        try:
            fetch(name, entry)
        except (OSError, UserError) as error:
            failed += 1
            print(f"error: {name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _check(entries: Mapping[str, Weights], named: bool) -> int:
    """Hash every file. What is not here counts only if it was asked for by name."""
    wrong = 0
    for name, entry in entries.items():
        state = state_of(name, entry)
        lines = [state.problem] if state.problem else list(_wrong_files(name, entry))
        wrong += bool(lines) and (named or state.word != "missing")
        for line in lines or [f"{name}: {len(entry.files)} files as they should be ({state.word})"]:
            print(line)
    return 1 if wrong else 0


def _wrong_files(name: str, entry: Weights) -> Iterator[str]:
    folder = folder_of(name, entry)
    sums = read_sums(folder)
    for file in entry.files:
        path = folder / file.name
        if problem := _objection(file, measure(path), sums.get(file.name)):
            yield f"{path} {problem}: delete it, then {remedy(name, entry)}"


def _listing(entries: Mapping[str, Weights]) -> str:
    """A table: name, state, size, licence, official address."""
    rows = [("name", "state", "size", "licence", "address")]
    for name, entry in entries.items():
        size = _size(entry, read_sums(folder_of(name, entry)))
        rows.append((name, state_of(name, entry).word, size, entry.licence, entry.address))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join([f"weights in {cache_folder()}", *lines])


def _size(entry: Weights, sums: Sums) -> str:
    """Of all files together, as far as it is known: what is fetched, else what is published."""
    sizes = [sums[file.name].size if file.name in sums else file.size for file in entry.files]
    if isinstance(entry, Archive) and None in sizes:
        sizes = [entry.archive.size]
    known = [size for size in sizes if size is not None]
    return f"{sum(known) / 1e6:.1f} MB" if len(known) == len(sizes) else "not known"
