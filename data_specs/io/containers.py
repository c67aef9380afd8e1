"""Where audio lies in FLAC, MP3 and Ogg files: what libsndfile does not look at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

At = Callable[[int, int], bytes]
"""(start, count) to the bytes of a file from there, fewer at its end."""

Piece = bytes | tuple[int, int]
"""Bytes of our own, or from where to where in a file."""


class Damage(ValueError):
    """Not all of a file can be decoded; the message is "kind: details"."""


class _Window:
    """Small reads of a file, out of blocks of 1 MiB."""

    def __init__(self, at: At, block: int = 1 << 20) -> None:
        self.at, self.block, self.start, self.held = at, block, 0, b""

    def __call__(self, start: int, count: int) -> bytes:
        offset = start - self.start
        if offset < 0 or offset + count > len(self.held):
            self.start, self.held = start, self.at(start, max(count, self.block))
            offset = 0
        return self.held[offset : offset + count]

    def find(self, what: bytes, start: int, stop: int) -> int:
        """Where ``what`` is next, or -1."""
        while start < stop:
            data = self(start, min(self.block, stop - start))
            place = data.find(what)
            if place >= 0:
                return start + place
            start += max(1, len(data) - len(what) + 1)
        return -1


def after_id3(at: At, start: int = 0) -> int:
    """Where a file goes on after the ID3v2 tags at ``start``."""
    while (head := at(start, 10))[:3] == b"ID3" and len(head) == 10:
        size = 0
        for byte in head[6:]:
            size = size << 7 | byte & 0x7F
        start += 10 + size + (10 if head[5] & 0x10 else 0)
    return start


# --- FLAC -----------------------------------------------------------------------------------------

TAIL_BYTES = 1 << 16
"""The last frame of a FLAC begins in so much of its end, or twice its largest frame."""

LARGEST_TAIL = 1 << 20

MOST_TOTAL = (1 << 36) - 1
"""The largest number of samples that a header holds."""


@dataclass(frozen=True)
class Flac:
    """The STREAMINFO of a FLAC: at ``place``, 34 bytes."""

    place: int
    info: bytes

    @classmethod
    def found(cls, at: At, size: int) -> Flac | None:
        """None for what has none: FLAC in another container."""
        start = after_id3(at)
        head = at(start, 42)
        return cls(start + 8, head[8:]) if head[:4] == b"fLaC" and len(head) == 42 else None

    @property
    def total(self) -> int:
        """Samples by the header; 0: not known."""
        return int.from_bytes(self.info[10:18], "big") & MOST_TOTAL

    def with_total(self, size: int, total: int) -> tuple[Piece, ...]:
        """The file with another total in its header."""
        packed = int.from_bytes(self.info[10:18], "big") >> 36 << 36 | total
        begin = self.place + 10
        return (0, begin), packed.to_bytes(8, "big"), (begin + 8, size)

    def last_frame_ends(self, at: At, size: int) -> int | None:
        """The sample after the last frame, as its header says; None where none is found."""
        largest = int.from_bytes(self.info[7:10], "big")
        start = max(self.place + 34, size - min(LARGEST_TAIL, max(TAIL_BYTES, 2 * largest)))
        tail = at(start, size - start)
        return self._first_end(tail, reversed(list(_syncs(tail))))

    def is_joined(self, at: At, size: int) -> bool:
        """Whether another FLAC follows in the file."""
        return _Window(at).find(b"fLaC\0\0\0\x22", self.place, size) >= 0

    def goes_back(self, at: At, size: int) -> bool:
        """Whether a frame comes before one of a lower number, at three places of the file."""
        starts = (max(size * quarter // 4, self.place + 34) for quarter in (1, 2, 3))
        blocks = [at(start, TAIL_BYTES) for start in starts]
        found = [self._first_end(block, _syncs(block)) for block in blocks]
        ends = [end for end in found if end is not None]
        return ends != sorted(ends)

    def _first_end(self, data: bytes, places: Iterable[int]) -> int | None:
        """The sample after the first frame that begins at one of some places."""
        ends = (self._frame_end(data[place : place + 16]) for place in places)
        return next((end for end in ends if end is not None), None)

    def _frame_end(self, head: bytes) -> int | None:
        """The sample after a frame; None for what is no header of one (RFC 9639, section 9.1)."""
        if len(head) < 6 or head[1] not in (0xF8, 0xF9) or head[3] & 1 or head[3] >> 4 > 10:
            return None
        size, rate = head[2] >> 4, head[2] & 15
        length = _coded_length(head[4])
        extra = {6: 1, 7: 2}.get(size, 0)
        crc = 4 + length + extra + {12: 1, 13: 2, 14: 2}.get(rate, 0)
        if not size or rate == 15 or not length or crc >= len(head):
            return None
        if _crc8(head[:crc]) != head[crc]:
            return None
        number = head[4] & (0x7F >> length if length > 1 else 0x7F)
        for byte in head[5 : 4 + length]:
            number = number << 6 | byte & 0x3F
        fixed = int.from_bytes(head[4 + length : 4 + length + extra], "big") + 1
        samples = fixed if extra else _block_size(size)
        first = number if head[1] == 0xF9 else number * int.from_bytes(self.info[2:4], "big")
        return first + samples


def _syncs(data: bytes) -> Iterator[int]:
    """Where frames may begin."""
    return (found.start() for found in re.finditer(b"\xff", data))


def _block_size(code: int) -> int:
    return 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8


def _coded_length(byte: int) -> int:
    """Bytes of a number coded as UTF-8 is; 0 for a byte that begins none."""
    ones = 8 - (byte ^ 0xFF).bit_length()
    return 1 if ones == 0 else ones if 2 <= ones <= 7 else 0


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07 if crc & 0x80 else crc << 1) & 0xFF
    return crc


# --- Ogg ------------------------------------------------------------------------------------------

FIRST_OF_STREAM = 2


def ogg_links(at: At, size: int) -> list[tuple[int, int]]:
    """From where to where the streams reach that follow each other in a file (RFC 3533).

    ``Damage`` where bytes between pages are none, or the last page is not whole.
    """
    links: list[int] = []
    beginning, end = False, 0
    for start, stop, flags in _pages(_Window(at), size):
        end = stop
        if flags & FIRST_OF_STREAM and not beginning:
            links.append(start)
        beginning = bool(flags & FIRST_OF_STREAM)
    if not links:
        raise Damage("damaged: no stream begins in it")
    return list(zip(links, [*links[1:], end], strict=True))


def _pages(at: _Window, size: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, flags) of every page."""
    start = 0
    while start < size:
        head = at(start, 27)
        if head[:4] != b"OggS"[: len(head)]:
            if at.find(b"OggS", start, size) >= 0:
                raise Damage(f"damaged: no page where one must begin, at byte {start}")
            return  # a tag at the end
        sizes = at(start + 27, head[26]) if len(head) == 27 else b""
        end = start + 27 + len(sizes) + sum(sizes)
        if len(head) < 27 or len(sizes) < head[26] or end > size:
            raise Damage("cut short: it ends within a page")
        yield start, end, head[5]
        start = end


# --- MP3 ------------------------------------------------------------------------------------------

RATES_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
"""By version: 3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5."""

KBITS = {
    (True, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""By whether it is MPEG 1, and layer (3 is layer I, 1 is layer III)."""

TAG_KBITS = 9
"""Index of a rate whose frames hold a tag: 48 bytes at least."""

SLACK_FRAMES = 4
"""Encoders add up to so many frames of silence, and count their tag or do not."""

HOLE_BYTES = 1 << 12
"""So much that is no frame, between frames, is damage; less may be a tag of some program's."""


LARGEST_TAG = 1 << 20
"""So far is looked for the next frame; what is longer is a tag with pictures, at the end."""


@dataclass(frozen=True)
class _Frame:
    start: int
    end: int
    samples: int
    rate_hz: int
    mono: bool
    tag: int | None
    """Frames by a tag that is in the place of audio; 0 where the tag does not say."""


def mp3_pieces(at: At, size: int, decoded: int) -> tuple[tuple[Piece, ...] | None, int]:
    """The file with a tag of its length, or None where ``decoded`` samples are all of it;
    and its samples.

    ``Damage`` where fewer frames are there than a tag says, or the last is not whole.
    """
    window = _Window(at)
    first = None
    stretches: list[tuple[int, int]] = []
    count = claimed = 0
    for frame in _frames(window, size):
        first = first or frame
        if (frame.rate_hz, frame.mono) != (first.rate_hz, first.mono):
            raise Damage("damaged: its sample rate or channels change on the way")
        if frame.tag is not None:
            claimed += frame.tag
            continue
        count += 1
        if stretches and stretches[-1][1] == frame.start:
            stretches[-1] = stretches[-1][0], frame.end
        else:
            stretches.append((frame.start, frame.end))
    if first is None:  # of free format, or none that this knows: it is as libsndfile decodes it
        return None, decoded
    if count + SLACK_FRAMES < claimed:
        seconds = [frames * first.samples / first.rate_hz for frames in (count, claimed)]
        raise Damage("cut short: {:.1f} of {:.1f} s are there".format(*seconds))
    samples = count * first.samples
    if abs(samples - decoded) <= SLACK_FRAMES * first.samples:
        return None, decoded
    return (_tag(window(first.start, 4), count, stretches), *stretches), samples


def _frames(at: _Window, size: int) -> Iterator[_Frame]:
    place, last = after_id3(at), None
    while place + 4 <= size:
        frame = _frame(at, place)
        if frame is None or (last and frame.rate_hz != last.rate_hz and not _goes_on(at, frame)):
            place = _next_place(at, place, size, last)
            continue
        if frame.end > size:
            raise Damage("cut short: it ends within a frame")
        yield frame
        place, last = frame.end, frame


def _goes_on(at: _Window, frame: _Frame) -> bool:
    after = _frame(at, frame.end)
    return after is not None and after.rate_hz == frame.rate_hz


def _next_place(at: _Window, place: int, size: int, last: _Frame | None) -> int:
    """Where to look on where no frame is: after a tag, or where two frames follow each other."""
    after = after_id3(at, place)
    if after > place:
        return after
    begin, stop = place, min(size, place + LARGEST_TAG)
    while (place := at.find(b"\xff", place + 1, stop)) >= 0:
        frame = _frame(at, place)
        if frame and _goes_on(at, frame):
            if last and place - begin > HOLE_BYTES:
                raise Damage(f"damaged: {place - begin} bytes without audio at byte {begin}")
            return place
    return size


def _frame(at: _Window, start: int) -> _Frame | None:
    """The frame that begins at a byte (ISO 11172-3, 2.4.1.3); None where none does."""
    head = at(start, 4)
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    kbits, rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or not layer or kbits in (0, 15) or rate == 3:
        return None
    rate_hz, bits = RATES_HZ[version][rate], KBITS[version == 3, layer][kbits - 1] * 1000
    samples = 384 if layer == 3 else 576 if layer == 1 and version != 3 else 1152
    unit = 4 if layer == 3 else 1
    end = start + (samples // 8 // unit * bits // rate_hz + padding) * unit
    mono = head[3] >> 6 == 3
    tag = _tag_in(at(start, 4 + 32 + 18), version, mono) if layer == 1 else None
    return _Frame(start, end, samples, rate_hz, mono, tag)


def _side_bytes(version: int, mono: bool) -> int:
    return (17 if mono else 32) if version == 3 else (9 if mono else 17)


def _tag_in(head: bytes, version: int, mono: bool) -> int | None:
    place = 4 + _side_bytes(version, mono)
    if head[place : place + 4] in (b"Xing", b"Info"):
        has_frames = head[place + 7 : place + 8] and head[place + 7] & 1
        return int.from_bytes(head[place + 8 : place + 12], "big") if has_frames else 0
    if head[36:40] == b"VBRI":
        return int.from_bytes(head[50:54], "big")
    return None


def _tag(head: bytes, frames: int, stretches: list[tuple[int, int]]) -> bytes:
    """A frame that holds a Xing tag, for frames like the one with this header."""
    header = bytes([head[0], head[1] | 1, TAG_KBITS << 4 | head[2] & 0x0C, head[3]])
    made = _frame(_Window(lambda start, count: (header + bytes(64))[start : start + count]), 0)
    if made is None or head[1] >> 1 & 3 != 1:
        raise Damage("damaged: its length cannot be found")
    side = _side_bytes(head[1] >> 3 & 3, head[3] >> 6 == 3)
    size = made.end + sum(end - start for start, end in stretches)
    tag = b"Xing" + (3).to_bytes(4, "big") + frames.to_bytes(4, "big") + size.to_bytes(4, "big")
    return (header + bytes(side) + tag).ljust(made.end, b"\0")
