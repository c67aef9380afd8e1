"""Read audio files whole, or raise ``BadAudio`` for a damaged one.

soundfile decodes. What it believes of headers is compared with the file first: it reads only the
first of chained Ogg streams, takes an MP3's length from its tag, and cannot end a FLAC of unknown
length.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
from numpy.typing import NDArray

from data_specs.io.containers import MOST_TOTAL, Damage, Flac, Piece, mp3_pieces, ogg_links
from data_specs.io.errors import UserError
from data_specs.io.walk import LeftOut, print_left_out, walk

Samples = NDArray[np.float32]

SLOWEST_HZ, FASTEST_HZ = 1_000, 10_000_000
"""Sample rates that are believed; to resample from others fills any memory."""

LARGEST_BYTES = 1 << 30
"""Most of a file that is held in memory at once, as floats."""

LONGEST_SECONDS = 24 * 3600
"""Where a length is not known, so much is read to find it."""

MISSING_SECONDS = 0.1
"""A file that lacks less than this is not called cut: some writers count their header in."""

UNKNOWN_BYTES = (0x7FFF_0000, 0x8001_0000), (0xFFFF_0000, 0x1_0000_0000)
"""Lengths that stand for "not known" in headers of 32 bits, as programs write them to pipes."""

BLOCK = 1 << 16
"""Samples that are read at a time where they are not kept."""

SMALL_BLOCK = 1 << 12
"""The same where it is to be found after how many samples an error comes."""

LAYOUTS_KEPT = 4096
"""Files whose layout is remembered: a long one is not looked through for every part of it."""

SF_ERR_SYSTEM = 2
"""libsndfile's code for an error of the operating system (``sndfile.h``)."""

CLAIMED = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE
)
"""What libsndfile's log says of a length that the file does not have."""

SAMPLE_BYTES = {
    **{"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4},
    **{"FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1},
}
"""Bytes of a sample, where all have the same."""

JOINED = "damaged: several files joined, of which only the first is read"

NIST_SAMPLES = re.compile(rb"sample_count -i (\d+)")

POINTERS = {
    b"version https://git-lfs.github.com/spec/": "Git LFS pointer: git lfs pull brings the file",
    b"/annex/objects/": "git-annex pointer: git annex get brings the file",
}


UNREADABLE = "cannot be read as audio: "


class BadAudio(UserError):
    """A file that is no audio, or not decoded whole. ``reason`` is "kind" or "kind: details"."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {UNREADABLE}{reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type[BadAudio], tuple[str, str]]:
        return type(self), (self.name, self.reason)


@dataclass(frozen=True)
class Header:
    """What a file holds."""

    frames: int
    sample_rate_hz: int
    channels: int
    size_bytes: int


@dataclass(frozen=True)
class Link:
    """A stretch that soundfile reads as a file of its own; without pieces, the file as it is."""

    frames: int
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Where the audio of a file lies."""

    header: Header
    links: tuple[Link, ...]


class Source(Protocol):
    """A file of ``size`` bytes, here or elsewhere; messages call it ``name``."""

    name: str
    size: int

    def at(self, start: int, count: int) -> bytes:
        """Bytes of it from ``start``, fewer at its end."""


class _Local:
    """An open regular file; a pipe or a device, which could wait for ever, is not opened."""

    def __init__(self, path: Path | str) -> None:
        self.name = str(path)
        _require_regular(os.stat(path).st_mode, self.name)
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        about = os.fstat(self.number)
        self.size = about.st_size
        self.identity = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)

    def at(self, start: int, count: int) -> bytes:
        return os.pread(self.number, count, start)

    def sound(self) -> soundfile.SoundFile:
        os.lseek(self.number, 0, os.SEEK_SET)
        return soundfile.SoundFile(os.dup(self.number))

    def close(self) -> None:
        os.close(self.number)


def _require_regular(mode: int, name: str) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
        raise BadAudio(name, f"{kinds.get(stat.S_IFMT(mode), 'device')}: not a file")


class _Pieces:
    """Bytes of our own and stretches of a file, one after the other, as soundfile reads a file."""

    def __init__(self, source: Source, pieces: Sequence[Piece]) -> None:
        self.source, self.pieces, self.place = source, pieces, 0
        self.sizes = [len(p) if isinstance(p, bytes) else p[1] - p[0] for p in pieces]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: sum(self.sizes)}
        self.place = base[whence] + offset
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer) and (data := self._next(len(buffer) - done)):
            buffer[done : done + len(data)] = data
            self.place += len(data)
            done += len(data)
        return done

    def _next(self, count: int) -> bytes:
        begin = 0
        for piece, size in zip(self.pieces, self.sizes, strict=True):
            offset = self.place - begin
            if 0 <= offset < size:
                most = min(count, size - offset)
                if isinstance(piece, bytes):
                    return piece[offset : offset + most]
                return self.source.at(piece[0] + offset, most)
            begin += size
        return b""


class _Forward(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is only read on: soundfile seeks after each read, past an unknown end too."""

    def seekable(self) -> bool:
        return False


class Recording:
    """An audio file that was looked through; samples are float32 (T, channels) at its own rate."""

    def __init__(self, source: Source, layout: Layout) -> None:
        self._source, self._links, self.header = source, layout.links, layout.header
        self._number, self._place = -1, 0
        self._file: soundfile.SoundFile | None = None

    def read(self, start: int, count: int) -> Samples:
        """``count`` samples from ``start``, fewer where the recording ends.

        ``BadAudio`` where they cannot be decoded, or end before they should.
        """
        end, begin = min(start + count, self.header.frames), 0
        found = [np.zeros((0, self.header.channels), np.float32)]
        for number, link in enumerate(self._links):
            first, last = max(start, begin), min(end, begin + link.frames)
            if first < last:
                found.append(self._read(number, first - begin, last - first, seek=True))
            begin += link.frames
        return found[-1] if len(found) <= 2 else np.concatenate(found)

    def whole(self) -> Samples:
        """All of it; ``BadAudio`` where that would take more than ``LARGEST_BYTES``."""
        header = self.header
        if header.frames * header.channels * 4 > LARGEST_BYTES:
            hours = header.frames / header.sample_rate_hz / 3600
            raise BadAudio(self._source.name, f"too long: {hours:.1f} h are not held in memory")
        found = list(self.blocks(max(1, header.frames)))
        return found[0] if len(found) == 1 else np.concatenate([self.read(0, 0), *found])

    def blocks(self, count: int) -> Iterator[Samples]:
        """All of it from the beginning, at most ``count`` samples at a time.

        Nothing is sought, which changes what libmpg123 decodes in the last bit.
        """
        for number, link in enumerate(self._links):
            for start in range(0, link.frames, count):
                yield self._read(number, start, min(count, link.frames - start))

    def _read(self, number: int, start: int, count: int, seek: bool = False) -> Samples:
        try:
            file = self._at(number, start, seek)
            data = np.asarray(file.read(count, dtype="float32", always_2d=True))
        except soundfile.SoundFileError as error:
            raise _error_of(self._source, error, "damaged") from error
        self._place += len(data)
        if len(data) < count:
            raise self._cut(number)
        return data

    def _cut(self, number: int) -> BadAudio:
        said = f"ends after {self._place} of {self._links[number].frames} samples"
        return BadAudio(self._source.name, f"cut short: {said}")

    def _at(self, number: int, start: int, seek: bool) -> soundfile.SoundFile:
        """A link, open at a sample; one that cannot be sought is read up to there."""
        file = self._file
        if file is None or number != self._number or (start < self._place and not file.seekable()):
            self.close()
            file = self._file = _sound(self._source, self._links[number].pieces)
            self._number, self._place = number, 0
        if (start != self._place or (seek and not start)) and file.seekable():
            self._place = file.seek(start)
        while self._place < start:
            skipped = len(file.read(min(BLOCK, start - self._place), dtype="float32"))
            if not skipped:
                raise self._cut(number)
            self._place += skipped
        return file

    def close(self) -> None:
        """Close what soundfile has open."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _sound(source: Source, pieces: Sequence[Piece] = ()) -> soundfile.SoundFile:
    if isinstance(source, _Local) and not pieces:
        return source.sound()
    return soundfile.SoundFile(_Pieces(source, pieces or ((0, source.size),)))


@contextmanager
def open_audio(path: Path | str) -> Iterator[Recording]:
    """A local file. ``BadAudio`` where not all of it can be decoded, ``OSError`` with its path."""
    with closing(_Local(path)) as source:
        layout = _LAYOUTS.get(source.identity) or _kept(source)
        with closing(Recording(source, layout)) as recording:
            yield recording


_LAYOUTS: dict[tuple[int, ...], Layout] = {}


def _kept(source: _Local) -> Layout:
    if len(_LAYOUTS) >= LAYOUTS_KEPT:
        _LAYOUTS.clear()
    _LAYOUTS[source.identity] = layout = examine(source)
    return layout


def header_of(path: Path | str) -> Header:
    """What a local file holds; raises as ``open_audio`` does."""
    with open_audio(path) as recording:
        return recording.header


def require_sound(path: Path | str) -> None:
    """Decode a whole file. ``BadAudio`` where that cannot be done or values are not finite."""
    with open_audio(path) as recording:
        if not recording.header.frames:
            raise BadAudio(str(path), "no samples")
        for block in recording.blocks(BLOCK):
            if not np.isfinite(block).all():
                raise BadAudio(str(path), "samples that are not finite (NaN or infinite)")


def audio_files_below(folder: Path, purpose: str) -> list[Path]:
    """The audio files below a folder, sorted, whose headers are in order; the others are told.

    ``UserError`` for a folder that cannot be read or has none.
    """
    try:
        found = walk(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from error
    wrong = {name: why for name in found.files if (why := _wrong_with(folder / name))}
    left_out = [*found.left_out, *(LeftOut(name, why) for name, why in wrong.items())]
    print_left_out(str(folder), sorted(left_out))
    files = sorted(folder / name for name in found.files if name not in wrong)
    if not files:
        raise UserError(f"{folder}: no audio files {purpose}")
    return files


def _wrong_with(path: Path) -> str:
    try:
        return "" if header_of(path).frames else "no samples"
    except BadAudio as error:
        return error.reason
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


# --- looking through ------------------------------------------------------------------------------


def examine(source: Source) -> Layout:
    """Where a file's audio lies and how long it is; ``BadAudio`` where not all can be decoded."""
    head = source.at(0, 1024)
    for begin, what in POINTERS.items():
        if head.startswith(begin):
            raise BadAudio(source.name, what)
    if not head:
        raise BadAudio(source.name, "no audio header: the file is empty")
    try:
        spans = ogg_links(source.at, source.size) if head.startswith(b"OggS") else []
        with _sound(source) as file:
            layout = _layout(source, file, head, spans)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a bare .raw
        raise _error_of(source, error, "no audio header") from error
    except Damage as damage:
        raise BadAudio(source.name, str(damage)) from damage
    if not SLOWEST_HZ <= layout.header.sample_rate_hz <= FASTEST_HZ:
        raise BadAudio(source.name, f"damaged: sample rate {layout.header.sample_rate_hz} Hz")
    return layout


def _error_of(source: Source, error: Exception, kind: str) -> Exception:
    """What libsndfile said of a file; an error of the system is no fault of the file."""
    if not isinstance(error, soundfile.LibsndfileError):
        return BadAudio(source.name, f"{kind}: {error}")
    if error.code == SF_ERR_SYSTEM:
        return _of_system(source)
    return BadAudio(source.name, f"{kind}: {error.error_string.strip() or 'of no known format'}")


def _of_system(source: Source) -> OSError:
    """What the system refused (a server that is away), with its number: libsndfile says no more of
    it than "System error", so that it is asked for again."""
    place = 0
    try:
        while data := source.at(place, 1 << 20):
            place += len(data)
    except OSError as told:
        return told if told.errno is None else OSError(told.errno, told.strerror, source.name)
    return OSError(errno.EIO, os.strerror(errno.EIO), source.name)  # gone by now


def _layout(
    source: Source, file: soundfile.SoundFile, head: bytes, spans: Sequence[tuple[int, int]]
) -> Layout:
    if file.format == "FLAC":
        links = _of_flac(source, file)
    elif file.format == "MP3":
        links = _of_mp3(source, file)
    elif len(spans) > 1:
        links = _of_ogg(source, file, spans)
    else:
        _require_all_there(source, file, head)
        _require_alone(source, file, head)
        links = [Link(file.frames)]
    frames = sum(link.frames for link in links)
    return Layout(Header(frames, file.samplerate, file.channels, source.size), tuple(links))


def _require_alone(source: Source, file: soundfile.SoundFile, head: bytes) -> None:
    """``Damage`` where the file's first letters come again behind its samples."""
    width = SAMPLE_BYTES.get(file.subtype) if file.format not in ("WAV", "WAVEX") else None
    if width:
        end = file.frames * file.channels * width
        if head[:4] in source.at(max(4, end), BLOCK):
            raise Damage(JOINED)


def _require_all_there(source: Source, file: soundfile.SoundFile, head: bytes) -> None:
    """``Damage`` where a header claims more bytes, or samples, than the file has."""
    nist = NIST_SAMPLES.search(head) if file.format == "NIST" else None
    if nist:
        missing = (int(nist[1]) - file.frames) / file.samplerate
    else:
        found = [(int(said), int(has)) for said, has in CLAIMED.findall(file.extra_info)]
        claims = [pair for pair in found if not any(a <= pair[0] < b for a, b in UNKNOWN_BYTES)]
        lost = max((said - has for said, has in claims), default=0)
        missing = lost * file.frames / max(1, source.size) / file.samplerate
    if missing > MISSING_SECONDS:
        seconds = file.frames / file.samplerate
        raise Damage(f"cut short: {seconds:.1f} of {seconds + missing:.1f} s are there")


def _of_flac(source: Source, file: soundfile.SoundFile) -> list[Link]:
    """The length that the last frame shows; where that is not the header's, what can be read."""
    flac = Flac.found(source.at, source.size)
    if flac is None:
        return [Link(file.frames)]
    ends = flac.last_frame_ends(source.at, source.size)
    goes_back = flac.goes_back(source.at, source.size)
    if flac.total and ends == flac.total and not goes_back and _is_read(file, flac.total - 1):
        return [Link(file.frames)]
    if flac.is_joined(source.at, source.size):
        raise Damage(JOINED)
    counted, why = _counted(source, flac, file.samplerate)
    if counted < flac.total:
        raise Damage(f"cut short: ends after {counted} of {flac.total} samples{why}")
    if not counted:
        raise Damage(f"damaged: no sample can be read{why}")
    return [Link(counted, flac.with_total(source.size, counted))]


def _is_read(file: soundfile.SoundFile, place: int) -> bool:
    """Whether a sample can be decoded."""
    try:
        file.seek(place)
        return len(file.read(1, dtype="float32")) == 1
    except soundfile.SoundFileError:
        return False


def _counted(source: Source, flac: Flac, rate_hz: int) -> tuple[int, str]:
    """How many samples a FLAC holds, by reading them, and what stopped that."""
    pieces, count = flac.with_total(source.size, MOST_TOTAL), 0
    with _Forward(_Pieces(source, pieces)) as sound:
        while count < LONGEST_SECONDS * rate_hz:
            try:
                got = len(sound.read(SMALL_BLOCK, dtype="float32", always_2d=True))
            except soundfile.SoundFileError as error:
                return count, f": {error}"
            if not got:
                return count, ""
            count += got
    raise Damage(f"damaged: more than {LONGEST_SECONDS // 3600} h, and its header has no length")


def _of_mp3(source: Source, file: soundfile.SoundFile) -> list[Link]:
    pieces, frames = mp3_pieces(source.at, source.size, file.frames)
    if pieces is None:
        return [Link(file.frames)]
    with _sound(source, pieces) as sound:
        if abs(sound.frames - frames) > MISSING_SECONDS * file.samplerate:
            raise Damage(f"damaged: {frames} samples, of which {sound.frames} can be heard")
        return [Link(sound.frames, pieces)]


def _of_ogg(
    source: Source, file: soundfile.SoundFile, spans: Sequence[tuple[int, int]]
) -> list[Link]:
    links = []
    for span in spans:
        with _sound(source, (span,)) as part:
            if (part.samplerate, part.channels) != (file.samplerate, file.channels):
                raise Damage("damaged: its streams differ in sample rate or channels")
            links.append(Link(part.frames, (span,)))
    return links
