"""Which files a command line means: files, folders, globs, lists, standard input."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_specs.io.errors import UserError

AUDIO_ENDINGS = {
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".opus",
    ".mp3",
    ".aiff",
    ".aif",
    ".au",
    ".caf",
    ".w64",
}
"""What is taken out of a folder; a file that is named is always tried."""

STANDARD_INPUT = "-"


def find_files(paths: Sequence[Path | str], lines: Iterable[str] | None = None) -> list[Path]:
    """Audio files of files, folders (recursive, sorted), globs and ``.txt`` lists (a path a line).

    Lines of a list are relative to it; "-" reads a list from ``lines`` (standard input), relative
    to the working folder. Every file comes once, where it is first named. ``ValueError`` for a
    list that cannot be read as text, and a glob that nothing fits.
    """
    found: dict[Path, None] = {}
    for path in paths:
        for file in _files_of(path, sys.stdin if lines is None else lines):
            found.setdefault(file)
    return list(found)


def _files_of(name: Path | str, lines: Iterable[str]) -> list[Path]:
    if str(name) == STANDARD_INPUT:
        return [Path(line.rstrip("\r\n")) for line in lines if line.strip()]
    path = Path(name)
    if path.is_dir():
        return _in_folder(path)
    if glob.has_magic(str(name)) and not path.exists():
        return _fitting(str(name))
    return _listed(path) if path.suffix == ".txt" else [path]


def _in_folder(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in AUDIO_ENDINGS)
    return sorted(file for file in files if file.is_file())


def _fitting(pattern: str) -> list[Path]:
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    if not matches:
        raise UserError(f"{pattern}: no file fits this pattern")
    return [
        file for match in matches for file in (_in_folder(match) if match.is_dir() else [match])
    ]


def _listed(path: Path) -> list[Path]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable list of files: {error}") from error
    return [path.parent / line.strip() for line in lines if line.strip()]
