"""Features of rated clips, taken once and kept in a folder: the encoder is frozen (section IV-A).

The folder holds ``about.json`` (what the features are: front end, its weights, the list of clips),
``frames.u16`` (the features, bf16 bit patterns, (clips, tokens, channels), read through a memory
map) and ``rows.jsonl`` (a ledger: a line for every clip that is done, with the reason if it cannot
be used). A clip's line is written after its features are on the disk: a process killed at any point
loses its last seconds, and the next run takes again what has no line.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from data_specs.io.cli import signals_wait
from data_specs.io.errors import UserError
from data_specs.io.files import lock, write_text
from data_specs.io.progress import progress_bar
from data_specs.rated import RatedClip
from data_specs.sample import SAMPLE_RATE
from data_specs.strict import Strict, digest
from train.audio import Wave, read_mono, to_16k
from train.data.loading import ahead
from train.models.front_end import FrontEnd

Bits = NDArray[np.uint16]

MAX_SECONDS = 20.0
"""Of a longer clip the middle is read: it bounds memory, and leaves the 7.68 s that the head sees
six seconds of context on each side."""

MIN_SAMPLES = 400
"""One frame of XLS-R (25 ms at 16 kHz): a shorter clip has no features."""

COMMIT_SECONDS = 2.0
"""How much work a kill can undo."""

DEVICE_BATCH = 8
"""Clips of one length that a GPU takes at once. A CPU takes one, so that features do not depend on
neighbours, and with them on where a run was stopped."""

AHEAD = 16
"""Clips decoded ahead of the encoder."""

MOST_NAMED = 10
"""Clips without features that are named."""

ABOUT, FRAMES, ROWS = "about.json", "frames.u16", "rows.jsonl"


class About(Strict):
    """What a cache holds; all of it must be the same for a cache to be continued or used.

    ``clips_sha256`` is over (dataset, file name) of all clips in order. Whether a file is still the
    one whose features were taken is decided by its size and modification time, as make and rsync
    do, and held in the ledger: hashing contents would read all audio at every start. The folder of
    the clips is in neither, so it may be moved.
    """

    format: int = 1
    front_end: str
    weights_sha256: str
    precision: str
    tokens: int
    channels: int
    max_seconds: float = MAX_SECONDS
    clips: int
    clips_sha256: str

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.channels * 2


class Row(Strict):
    """A line of the ledger. ``bad`` is the reason why a clip has no features."""

    row: int
    dataset: str
    name: str
    bytes: int
    modified_ns: int
    bad: str | None = None


Decoded = tuple[Row, Wave | None]
"""A clip's row and its audio (T,) at 16 kHz, or none where it cannot be read."""


@dataclass(frozen=True)
class FrameCache:
    """A whole cache: features of all clips but the bad ones.

    ``frames`` (N, L, C) is a read-only memory map of bf16 bit patterns (see ``from_bits``), its
    rows in the order of the clips. ``bad`` has the reason for every row that holds nothing.
    """

    about: About
    frames: Bits
    bad: dict[int, str]


def left_out(cache: FrameCache, clips: Sequence[RatedClip]) -> str:
    """Name the first clips without features, with table, line and reason; nothing without any."""
    if not cache.bad:
        return ""
    lines = [f"{len(cache.bad)} clips that have no features:"]
    for row, why in islice(cache.bad.items(), MOST_NAMED):
        lines.append("  " + f"{clips[row].where}: {clips[row].path}: {why}".removeprefix(": "))
    if len(cache.bad) > MOST_NAMED:
        lines.append(f"  and {len(cache.bad) - MOST_NAMED} more")
    return "\n".join(lines)


def to_bits(frames: Tensor) -> Bits:
    """Float features of any shape, rounded to bf16, as bit patterns."""
    bits: Bits = frames.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
    return bits.view(np.uint16)


def from_bits(bits: Bits) -> Tensor:
    """Bit patterns of any shape as a bf16 tensor on the CPU."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16)


def open_cache(folder: Path, clips: Sequence[RatedClip], front_end: FrontEnd) -> FrameCache:
    """The features of these clips out of ``folder``; what is missing there is taken first.

    After Ctrl-C the same call continues. ``UserError`` for a folder of another front end or other
    clips, and for one that is damaged; ``OSError`` where the disk has no room. Clips that cannot be
    read are listed in ``bad``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = _about(clips, front_end)
    with _locked(folder):
        ledger = _read_ledger(folder)
        _require_same(folder, about, clips, ledger)
        _require_frames(folder, about, ledger)
        pending = _pending(folder, clips, ledger)
        if pending:
            _require_space(folder, about, len(pending))
            _fill(folder, about, clips, pending, front_end)
            ledger = _read_ledger(folder)
    frames: Bits = np.memmap(
        folder / FRAMES, np.uint16, "r", shape=(len(clips), about.tokens, about.channels)
    )
    return FrameCache(about, frames, {n: row.bad for n, row in sorted(ledger.items()) if row.bad})


def _about(clips: Sequence[RatedClip], front_end: FrontEnd) -> About:
    dtype = getattr(front_end, "dtype", torch.float32)  # MFCC is not asked for a precision
    return About(
        front_end=front_end.name,
        weights_sha256=front_end.weights_sha256,
        precision=str(dtype).removeprefix("torch."),
        tokens=front_end.tokens,
        channels=front_end.channels,
        clips=len(clips),
        clips_sha256=digest([[clip.dataset, clip.path.name] for clip in clips]),
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process fill a cache at a time; the lock goes with the process, however that ends."""
    with (folder / ROWS).open("ab") as file:
        try:
            lock(file, folder)
        except UserError:
            print(f"waiting: another process is at {folder}", file=sys.stderr, flush=True)
            lock(file, folder, wait=True)
        yield


def _require_same(
    folder: Path, about: About, clips: Sequence[RatedClip], ledger: dict[int, Row]
) -> None:
    """Write ``about.json``, or ``ValueError`` saying in what the cache that is there differs."""
    path = folder / ABOUT
    if not path.is_file():
        if ledger:
            raise UserError(f"{path} is missing: {_remedy(folder)}")
        write_text(path, about.model_dump_json(indent=2) + "\n")
        return
    try:
        before = About.model_validate_json(path.read_bytes()).model_dump()
    except ValidationError as error:
        raise UserError(f"{path}: damaged: {_remedy(folder)} ({error})") from error
    for name, now in about.model_dump().items():
        if before[name] != now:
            detail = _other_clip(clips, ledger) if name.startswith("clips") else ""
            raise UserError(
                f"{folder}: holds features with {name}={before[name]!r}, not {now!r}{detail}: "
                f"{_remedy(folder)}"
            )


def _other_clip(clips: Sequence[RatedClip], ledger: dict[int, Row]) -> str:
    """The first clip that the cache has another of."""
    for number, clip in enumerate(clips):
        ours, kept = f"{clip.dataset} {clip.path.name}", ledger.get(number)
        theirs = f"{kept.dataset} {kept.name}" if kept else ours
        if theirs != ours:
            return f" (clip {number} is {theirs} there, {ours} here)"
    return ""


def _remedy(folder: Path) -> str:
    return f"give another --cache, or delete {folder} to take the features again"


def _read_ledger(folder: Path) -> dict[int, Row]:
    """The last line of every row; a last line that a kill cut short is removed from the file."""
    path = folder / ROWS
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    try:
        rows = [Row.model_validate_json(line) for line in whole.splitlines()]
    except ValidationError as error:
        raise UserError(f"{path}: damaged: {_remedy(folder)} ({error})") from error
    return {row.row: row for row in rows}


def _require_frames(folder: Path, about: About, ledger: dict[int, Row]) -> None:
    """``ValueError`` if the features of rows in the ledger are not there."""
    path = folder / FRAMES
    size, expected = path.stat().st_size if path.is_file() else 0, about.clips * about.row_bytes
    if size != expected and any(row.bad is None for row in ledger.values()):
        raise UserError(f"{path}: {size} bytes, not {expected}: {_remedy(folder)}")


def _pending(folder: Path, clips: Sequence[RatedClip], ledger: dict[int, Row]) -> list[Row]:
    """The rows to take: those without a line, and bad ones whose file has changed since.

    ``UserError`` where the file of a good row has changed.
    """
    pending = []
    for number, clip in enumerate(clips):
        kept, now = ledger.get(number), clip.path.stat()
        file: dict[str, Any] = {"bytes": now.st_size, "modified_ns": now.st_mtime_ns}
        if kept is not None and kept.model_dump(include=set(file)) == file:
            continue
        if kept is not None and not kept.bad:
            raise UserError(
                f"{clip.path}: changed since its features were taken: {_remedy(folder)}"
            )
        pending.append(Row(row=number, dataset=clip.dataset, name=clip.path.name, **file))
    return pending


def _require_space(folder: Path, about: About, rows: int) -> None:
    needed, free = rows * about.row_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: features of {rows} clips need {needed / 1e9:.2f} GB "
            f"({about.row_bytes / 1e6:.2f} MB each), the disk has {free / 1e9:.2f} GB free: "
            "make room, or give a --cache on another disk"
        )


class _Writer:
    """Writes features, and lines of the ledger once their features are on the disk.

    ``write`` and not a memory map: a full disk is then an error, not a signal that kills.
    """

    def __init__(self, frames: IO[bytes], ledger: IO[bytes], row_bytes: int) -> None:
        self._frames, self._ledger, self._row_bytes = frames, ledger, row_bytes
        self._waiting: list[Row] = []
        self._committed = time.monotonic()

    def add(self, row: Row, bits_LC: Bits | None = None) -> None:
        """A row's features, or none for a bad one; committed every ``COMMIT_SECONDS``."""
        if bits_LC is not None:
            self._frames.seek(row.row * self._row_bytes)
            self._frames.write(bits_LC.tobytes())
        self._waiting.append(row)
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make all rows so far durable."""
        _sync(self._frames)
        lines = [row.model_dump_json(exclude_none=True) + "\n" for row in self._waiting]
        self._ledger.write("".join(lines).encode())
        _sync(self._ledger)
        self._waiting, self._committed = [], time.monotonic()


@contextmanager
def _opened(folder: Path, about: About) -> Iterator[_Writer]:
    """A writer into a folder; what it was given is durable at the end, however that comes."""
    path = folder / FRAMES
    path.touch()
    os.truncate(path, about.clips * about.row_bytes)
    with path.open("r+b") as frames, (folder / ROWS).open("ab") as ledger:
        writer = _Writer(frames, ledger, about.row_bytes)
        try:
            yield writer
        finally:
            with signals_wait():
                writer.commit()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _fill(
    folder: Path,
    about: About,
    clips: Sequence[RatedClip],
    pending: Sequence[Row],
    front_end: FrontEnd,
) -> None:
    """Take the features of the pending rows."""
    bar = progress_bar(
        total=len(clips),
        initial=len(clips) - len(pending),
        unit="clip",
        desc=f"features ({front_end.name})",
    )
    size = 1 if torch.device(front_end.device).type == "cpu" else DEVICE_BATCH
    decoded = ahead((_decoded(row, clips[row.row].path) for row in pending), AHEAD)
    with bar, _opened(folder, about) as writer:
        for part in _of_one_length(decoded, size):
            for row, bits_LC in _features(part, front_end, about):
                with signals_wait():
                    writer.add(row, bits_LC)
            bar.update(len(part))


def _features(
    part: Sequence[Decoded], front_end: FrontEnd, about: About
) -> Iterator[tuple[Row, Bits | None]]:
    """Rows with waves of one length and their features; rows without waves have none."""
    waves = [wave_T for _, wave_T in part if wave_T is not None]
    if not waves:
        yield from ((row, None) for row, _ in part)
        return
    frames_BLC = front_end.frames(torch.from_numpy(np.stack(waves)))
    expected = (len(waves), about.tokens, about.channels)
    if tuple(frames_BLC.shape) != expected:
        raise UserError(
            f"front end {front_end.name!r} gives features of shape {tuple(frames_BLC.shape)}; a "
            f"head is trained on one layer, shape {expected}"
        )
    finite_B = torch.isfinite(frames_BLC).flatten(1).all(dim=1).tolist()
    for (row, _), bits_LC, finite in zip(part, to_bits(frames_BLC), finite_B, strict=True):
        bad = None if finite else "the front end gives values not finite"
        yield row.model_copy(update={"bad": bad}), bits_LC if finite else None


def _of_one_length(decoded: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    """Neighbours of one length together, at most ``size``; those without a wave apart."""
    for _, group in groupby(decoded, lambda pair: None if pair[1] is None else len(pair[1])):
        while part := list(islice(group, size)):
            yield part


def _decoded(row: Row, path: Path) -> Decoded:
    try:
        return row, middle(to_16k(*read_mono(path)))
    except UserError as error:
        return row.model_copy(update={"bad": str(error).removeprefix(f"{path}: ")}), None


def middle(wave_T: Wave) -> Wave:
    """The middle ``MAX_SECONDS`` of a wave (T,) at 16 kHz; ``ValueError`` if it has no frame."""
    if len(wave_T) < MIN_SAMPLES:
        raise UserError(f"{len(wave_T)} samples at 16 kHz: shorter than one frame of 25 ms")
    longest = round(MAX_SECONDS * SAMPLE_RATE)
    start = max(0, (len(wave_T) - longest) // 2)
    return wave_T[start : start + longest]
