"""The one walk through folders of audio: every real folder and file once, and what was left out."""

from __future__ import annotations

import os
import stat
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_specs.io.text import printable

AUDIO_ENDINGS = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc"),
    *(".au", ".snd", ".caf", ".w64", ".rf64", ".sph", ".nist"),
)
"""What is taken out of a folder, whatever the case of its letters."""

UNREAD_ENDINGS = (
    *(".m4a", ".m4b", ".mp4", ".aac", ".wma", ".webm", ".mka", ".mkv", ".mov", ".3gp", ".amr"),
    *(".ape", ".wv", ".ac3", ".eac3", ".dts", ".ra", ".rm", ".spx", ".tta", ".mpc", ".dsf", ".dff"),
    *(".weba", ".m4r", ".qcp", ".shn", ".awb"),
)
"""Audio that nothing here reads."""

HIDDEN, AGAIN = "hidden", "there already"
HARMLESS = (HIDDEN, AGAIN)
"""Kinds of what is left out without a loss."""

MOST_NAMED = 20
"""Of one kind so many are named on the screen."""


@dataclass(frozen=True, order=True)
class LeftOut:
    """A file, folder or link below the folder, and why it is left out: "kind" or "kind: more"."""

    path: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(":")[0]

    @property
    def is_loss(self) -> bool:
        """Whether audio is missing by it."""
        return self.kind not in HARMLESS


@dataclass
class Found:
    """Relative paths of the audio files and of the real folders below a folder, sorted, and what
    was left out.

    Names that are not UTF-8 come as Python has them, with surrogates.
    """

    files: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


def counts(left_out: Iterable[LeftOut]) -> str:
    """How much was left out, by kind, for a line on the screen."""
    kinds = Counter(one.kind for one in left_out)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def print_left_out(where: str, left_out: Sequence[LeftOut]) -> None:
    """Say on standard error how much was left out, by kind, and the first of each kind by name."""
    if left_out:
        print(f"{printable(where)}: left out: {counts(left_out)}", file=sys.stderr)
    for line in first_of_each_kind(left_out):
        print(line, file=sys.stderr)


def first_of_each_kind(left_out: Sequence[LeftOut]) -> Iterator[str]:
    """Lines that name what was left out, ``MOST_NAMED`` of each kind."""
    told: Counter[str] = Counter()
    for one in left_out:
        told[one.kind] += 1
        if told[one.kind] <= MOST_NAMED:
            yield printable(f"  left out: {one.path}: {one.reason}")
    for kind, count in sorted(told.items()):
        if count > MOST_NAMED:
            yield f"  and {count - MOST_NAMED} more: {kind}"


def walk(root: Path | str) -> Found:
    """Find the audio files below a folder. ``OSError`` where the folder itself cannot be read.

    Links are followed, after all that is not reached through one: to a folder or file that is there
    already they add nothing, nor do they lead out to a folder around ``root``.
    """
    walker = _Walker(os.fspath(root))
    walker.folder("", os.stat(root))
    while walker.links:
        walker.link(walker.links.popleft())
    found = walker.found
    return Found(sorted(found.files), sorted(found.left_out), sorted(found.folders))


def kind_of(path: str) -> str | None:
    """The ending of a name that is audio's, in small letters; None for other files."""
    ending = os.path.splitext(path)[1].lower()
    return ending if ending in AUDIO_ENDINGS or ending in UNREAD_ENDINGS else None


def unread(path: str) -> str:
    """Why a file of a format that nothing reads is left out."""
    return f"format not read: {kind_of(path)}; convert it to FLAC or WAV"


class _Walker:
    def __init__(self, root: str) -> None:
        self.root = root
        self.found = Found()
        self.links: deque[str] = deque()
        self.seen: dict[tuple[int, int], str] = {}

    def leave(self, path: str, reason: str) -> None:
        self.found.left_out.append(LeftOut(path, reason))

    def is_new(self, path: str, about: os.stat_result) -> bool:
        """Whether a real file or folder comes for the first time; else it is left out."""
        first = self.seen.setdefault((about.st_dev, about.st_ino), path)
        if first != path:
            self.leave(path, f"{AGAIN}: as {first or 'the folder itself'}")
        return first == path

    def folder(self, path: str, about: os.stat_result) -> None:
        """A folder and all below it, but for what is behind links."""
        if not self.is_new(path, about):
            return
        below = deque([path])
        while below:
            folder = below.popleft()
            try:
                with os.scandir(os.path.join(self.root, folder)) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if not folder:
                    raise
                self.leave(folder, f"folder cannot be read: {error.strerror}")
                continue
            self.found.folders.append(folder)
            for entry in found:
                self._entry(entry, os.path.join(folder, entry.name), below)

    def _entry(self, entry: os.DirEntry[str], path: str, below: deque[str]) -> None:
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name.startswith("."):
            if is_folder or kind_of(entry.name):
                self.leave(path, HIDDEN)
        elif entry.is_symlink():
            self.links.append(path)
        elif is_folder or kind_of(entry.name):
            try:
                about = entry.stat(follow_symlinks=False)
            except OSError as error:
                self.leave(path, f"cannot be read: {error.strerror}")
                return
            if not is_folder:
                self.file(path, about)
            elif self.is_new(path, about):
                below.append(path)

    def file(self, path: str, about: os.stat_result) -> None:
        """A file by its name's ending, if it is one."""
        ending = kind_of(path)
        if ending is None:
            return
        if not stat.S_ISREG(about.st_mode):
            self.leave(path, "not a file: a pipe, a socket or a device")
        elif ending in UNREAD_ENDINGS:
            self.leave(path, unread(path))
        elif self.is_new(path, about):
            self.found.files.append(path)

    def link(self, path: str) -> None:
        """What a link leads to."""
        full = os.path.join(self.root, path)
        try:
            about = os.stat(full)
        except OSError as error:
            if kind_of(path) or not os.path.splitext(path)[1]:
                self.leave(path, f"dead link: {error.strerror}")
            return
        if not stat.S_ISDIR(about.st_mode):
            self.file(path, about)
        elif self._is_around(full):
            self.leave(path, f"{AGAIN}: a folder around this one")
        else:
            self.folder(path, about)

    def _is_around(self, link: str) -> bool:
        target, root = os.path.realpath(link), os.path.realpath(self.root)
        return root != target and os.path.commonpath([target, root]) == target
