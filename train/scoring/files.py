"""Which files a command line means: files, folders, globs, lists, standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_specs.io.errors import UserError
from data_specs.io.text import names_in, read_text, text_of
from data_specs.io.walk import LeftOut, walk

STANDARD_INPUT = "-"


@dataclass
class Chosen:
    """The files that a command line means, and what was left out of its folders."""

    files: dict[Path, None] = field(default_factory=dict)
    left_out: dict[Path, LeftOut] = field(default_factory=dict)

    def lost(self) -> dict[Path, str]:
        """Audio of folders that is not among the files, and why."""
        found = {path: one.reason for path, one in self.left_out.items() if one.is_loss}
        return {path: reason for path, reason in found.items() if path not in self.files}

    def harmless(self) -> list[LeftOut]:
        """What else was left out, by its whole path."""
        found = {str(path): one for path, one in self.left_out.items() if not one.is_loss}
        return [LeftOut(path, one.reason) for path, one in found.items()]

    def take(self, files: Iterable[Path]) -> None:
        """Add files that are named; a file comes once, where it is first named."""
        self.files.update(dict.fromkeys(files))

    def take_folder(self, folder: Path) -> None:
        """Add the audio files below a folder."""
        try:
            found = walk(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be read: {error.strerror}") from error
        self.take(sorted(folder / name for name in found.files))
        self.left_out.update((folder / one.path, one) for one in found.left_out)


def choose_files(paths: Sequence[Path | str]) -> Chosen:
    """Audio files of files, folders (recursive, sorted), globs and ``.txt`` lists (a path a line).

    Lines of a list are relative to it, those of standard input ("-") to the working folder. Every
    file comes once, where it is first named. ``UserError`` for a list that cannot be read as text,
    and a glob that nothing fits.
    """
    chosen = Chosen()
    for name in paths:
        path = Path(name)
        if str(name) == STANDARD_INPUT:
            text = text_of(sys.stdin.buffer.read(), "standard input", "surrogateescape")
            chosen.take(names_in(text))
        elif os.path.isdir(path):  # also where its folder may not be read: told with the others
            chosen.take_folder(path)
        elif glob.has_magic(str(name)) and not os.path.lexists(path):
            _take_fitting(chosen, str(name))
        elif path.suffix.lower() == ".txt":
            chosen.take(names_in(read_text(path, "surrogateescape"), path.parent))
        else:
            chosen.take([path])
    return chosen


def _take_fitting(chosen: Chosen, pattern: str) -> None:
    matches = sorted(set(_matches(pattern)))
    if not matches:
        raise UserError(f"{pattern}: no file fits this pattern")
    for match in matches:
        if os.path.isdir(match):
            chosen.take_folder(Path(match))
        else:
            chosen.take([Path(match)])


def _matches(pattern: str) -> Iterator[str]:
    """As ``glob.glob``, but ``**`` stands for every real folder once, whatever links there are."""
    head, stars, tail = pattern.partition("**/")
    if not stars or (head and not head.endswith("/")):
        yield from glob.glob(pattern)
        return
    for top in glob.glob(head) if head else [""]:
        for folder in walk(top or ".").folders:
            yield from _matches(os.path.join(glob.escape(os.path.join(top, folder)), tail))
