"""Shards to batches.

The whole run is one endless list of batches that is a pure function of (seed, dataset, batch size,
rated share): batch ``k`` is known without making the batches before it. Workers take whole
batches in turn, so any number of them gives the same sequence, and a run resumes at batch ``k``
without decoding anything that came before.

Order of an epoch: the shards are permuted, laid end to end, and every sample is then moved by
a random distance of at most ``buffer`` places (what a shuffle buffer does, but known in advance);
reads so stay near each other on the disk. Samples are read out of the tars in place: nothing is
unpacked, and only the samples that a worker needs are read.

Of ``world`` training processes, ``rank`` reads entries ``rank``, ``rank + world``, ... of every
batch. Shards are not dealt to processes: this way each sample is read once an epoch by one process
whatever the shards' number and sizes, and the sequence is the same for any number of processes, so
that a run may stop with one and go on with another.

Shards are not trusted: of a tar only plain members ``KEY.flac`` and ``KEY.json`` are accepted, up
to a size, and a FLAC's header is held to the crop's length before anything is decoded.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import re
import signal
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_specs.rated import RatedClip
from data_specs.sample import (
    CROP_SAMPLES,
    DATASET_FILE,
    SAMPLE_RATE,
    SampleRecord,
    parse_sample,
)
from data_specs.strict import describe
from train.audio import Wave, read_mono, to_16k
from train.memory import free_bytes
from train.models.calibration import Calibration
from train.storage import (
    CACHE_REMEDY,
    Descriptor,
    LocalFolder,
    NotFound,
    ReadAhead,
    RemoteFile,
    RemoteFolder,
    ShardCache,
    default_cache,
    open_folder,
)

Pcm = NDArray[np.int16]
PCM_SCALE = 32768.0

STREAM_SHARDS, STREAM_MOVES, STREAM_RATED, STREAM_CROPS = range(4)
"""Which decision a random generator is for: one stream each, so that none moves another."""

MOST_INFO_BYTES = 16 << 20
"""Of ``dataset.json`` and of a shard's record, which lists every dropped sample."""

MOST_AUDIO_BYTES, MOST_RECORD_BYTES = 4 << 20, 1 << 20
"""Of a sample's members; 7.68 s are 0.25 MB uncompressed, a record is a few kB."""

OPEN_SHARDS = 64
"""Tars that a process keeps open."""

READ_AHEAD_SAMPLES = 2048
"""How far ahead remote shards are fetched: some shards of 250, a few seconds of training."""


@dataclass(frozen=True)
class Shard:
    """One whole shard: its tar, and how many samples it holds.

    Of a ``remote`` one ``tar`` is where it is kept on this machine once it was fetched.
    """

    tar: Path
    samples: int
    remote: RemoteFile | None = None

    @property
    def where(self) -> str:
        """Its path or address, for messages."""
        return self.remote.where if self.remote else str(self.tar)

    def open(self) -> Descriptor:
        """The tar; a remote one is fetched if it is not here."""
        return self.remote.open() if self.remote else _opened(self.tar)

    def local(self) -> Path:
        """The tar's path, fetched if it is remote; others' shards may push it out again."""
        if self.remote:
            self.remote.open()
        return self.tar


@dataclass(frozen=True)
class DatasetInfo:
    """What ``dataset.json`` beside the shards says.

    ``calibration`` is its teacher's: between the labels' scale and those of rated sets.
    """

    recipe_hash: str
    recipe: Any
    teacher: str
    calibration: Calibration | None = None


class Span(NamedTuple):
    """Where one sample's members lie in its tar, in bytes."""

    key: str
    audio_start: int
    audio_bytes: int
    record_start: int
    record_bytes: int


def read_dataset_info(folder: Path | str) -> DatasetInfo:
    """``dataset.json`` of a folder of shards, by path or address.

    ``ValueError`` if it is missing or lacks a key.
    """
    place = open_folder(folder)
    path = place.shown(DATASET_FILE)
    try:
        (data,) = place.read([DATASET_FILE], MOST_INFO_BYTES)
    except NotFound as error:
        raise ValueError(
            f"{error}: is {place.shown()} the output of `python -m pipeline shards`?"
        ) from None
    content = _json_object(data, path)
    for key in ("recipe_hash", "recipe", "teacher"):
        if key not in content:
            raise ValueError(f"{path}: no key {key!r}; make the dataset again")
    teacher = content["teacher"]
    name = teacher.get("name", teacher) if isinstance(teacher, dict) else teacher
    maps = content.get("teacher_calibration")
    try:
        calibration = None if maps is None else Calibration.model_validate(maps)
    except ValidationError as error:
        raise ValueError(describe(error, maps, f"{path}: teacher_calibration")) from error
    return DatasetInfo(str(content["recipe_hash"]), content["recipe"], str(name), calibration)


def list_shards(folder: Path | str, cache: ShardCache | None = None) -> list[Shard]:
    """The whole shards of a folder (path, or address as ``open_folder`` takes it), by name.

    A shard is whole when its record (``shard-NNNNNN.json``) stands beside its tar: the record is
    written last. Remote ones are kept in ``cache`` (``default_cache``) when they are first read.
    ``ValueError`` for a folder without one, and for a tar whose size is not the recorded one.
    """
    place = open_folder(folder)
    sizes = place.sizes()
    tars = sorted(name for name in sizes if re.fullmatch(r"shard-[\w-]+\.tar", name))
    where = place.shown()
    if not tars:
        raise ValueError(f"{where}: no shards (shard-NNNNNN.tar); make some: python -m pipeline")
    whole = [tar for tar in tars if _record_name(tar) in sizes]
    if not whole:
        raise ValueError(
            f"{where}: none of its {len(tars)} shards is whole (no shard-NNNNNN.json record "
            "beside the tar): let the pipeline finish, or run it again"
        )
    records = place.read([_record_name(tar) for tar in whole], MOST_INFO_BYTES)
    shards = [
        _shard(place, tar, sizes[tar], _json_object(record, place.shown(_record_name(tar))), cache)
        for tar, record in zip(whole, records, strict=True)
    ]
    if not any(shard.samples for shard in shards):
        raise ValueError(f"{where}: none of its {len(whole)} whole shards holds a sample")
    return [shard for shard in shards if shard.samples]


def _record_name(tar: str) -> str:
    return f"{Path(tar).stem}.json"


def _shard(
    place: LocalFolder | RemoteFolder,
    tar: str,
    size: int | None,
    record: dict[str, Any],
    cache: ShardCache | None,
) -> Shard:
    where = place.shown(_record_name(tar))
    expected = _count(record, "tar_bytes", where)
    if size is not None and size != expected:  # where a listing tells none, the download does
        raise ValueError(
            f"{place.shown(tar)}: {size} bytes, but its record says {expected}: it is truncated or "
            f"changed; delete {tar} and {_record_name(tar)} and run the pipeline again"
        )
    if isinstance(place, LocalFolder):
        shard = Shard(place.path / tar, 0)
    else:
        sha256 = _sha256(record, where)
        remote = RemoteFile(place, tar, expected, sha256, cache or default_cache())
        shard = Shard(remote.local, 0, remote)
    return replace(shard, samples=_samples(shard, record, expected, where))


def _samples(shard: Shard, record: dict[str, Any], tar_bytes: int, where: str) -> int:
    """How many samples a shard holds. Its record is held to what its size can be: arrays follow."""
    if record.get("samples") is None:
        return len(_index(shard.open(), shard.where))
    samples = _count(record, "samples", where)
    if samples * 4 * BLOCK > tar_bytes:
        raise ValueError(f"{where}: {samples} samples in a tar of {tar_bytes} bytes: not possible")
    return samples


def _count(record: dict[str, Any], name: str, where: str) -> int:
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{where}: no number {name!r}; make the shard again")
    return value


def _sha256(record: dict[str, Any], where: str) -> str | None:
    """The tar's hash: it becomes part of a file name."""
    value = record.get("tar_sha256")
    if value is not None and not re.fullmatch("[0-9a-f]{64}", str(value)):
        raise ValueError(f"{where}: 'tar_sha256' is no SHA-256; make the shard again")
    return value


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: not a JSON object")
    return content


# ---------------------------------------------------------------- tars

BLOCK = 512
MEMBER = re.compile(r"([A-Za-z0-9_-]+)\.(flac|json)")
MOST_BYTES = {"flac": MOST_AUDIO_BYTES, "json": MOST_RECORD_BYTES}

MOST_PAX_BYTES = 1 << 16
CHANGES_MEANING = re.compile(rb"(?:^|\n)\d+ (?:path|size|linkpath|GNU\.sparse[^=]*)=")
"""Keywords of a PAX header that would make its member another than the plain header says.
webdataset's writer has such headers before every member, for the time in fractions of a second."""


class _Member(NamedTuple):
    """A tar's header: ``kind`` is its type flag, the content is ``size`` bytes from ``start``."""

    name: str
    kind: bytes
    start: int
    size: int


def shard_index(tar: Path) -> list[Span]:
    """Where every sample of a tar lies, in file order; reads the headers only.

    ``ValueError`` naming the tar and the member: damaged, or anything but one plain ``KEY.flac``
    and one plain ``KEY.json`` a sample, in any order.
    """
    return _index(_opened(tar), str(tar))


def _opened(tar: Path) -> Descriptor:
    try:
        return Descriptor(tar)
    except OSError as error:
        raise ValueError(f"{tar}: cannot be read: {error.strerror}") from error


def _index(file: Descriptor, where: str) -> list[Span]:
    samples: dict[str, dict[str, _Member]] = {}
    for member in _members(file, where):
        found = MEMBER.fullmatch(member.name)
        if found is None or member.kind not in (b"0", b"\0"):
            raise ValueError(
                f"{where}: unexpected member {member.name!r} of type {member.kind!r}: a shard "
                "holds plain files KEY.flac and KEY.json"
            )
        key, ending = found.groups()
        if ending in samples.setdefault(key, {}):
            raise ValueError(f"{where}: member {member.name} is there twice")
        if member.size > MOST_BYTES[ending]:
            raise ValueError(f"{where}: member {member.name}: {member.size} bytes are too many")
        samples[key][ending] = member
    return [_span(where, key, found) for key, found in samples.items()]


def _members(file: Descriptor, where: str) -> Iterator[_Member]:
    """Every member but PAX headers. Python's ``tarfile`` reads whole PAX headers into memory."""
    place, end = 0, os.fstat(file.number).st_size
    while place < end:
        block = os.pread(file.number, BLOCK, place)
        if not any(block):  # the mark of the end
            return
        member = _header(block, place, where)
        if member.start + member.size > end:
            raise ValueError(
                f"{where}: member {member.name!r}: {member.size} bytes go past the end of the tar: "
                "truncated or damaged; delete it and its record, make it again"
            )
        if member.kind in (b"x", b"g"):
            _require_harmless(file, member, where)
        else:
            yield member
        place = member.start + -(-member.size // BLOCK) * BLOCK


def _header(block: bytes, place: int, where: str) -> _Member:
    checksum, size = (_octal(block[field]) for field in (slice(148, 156), slice(124, 136)))
    actual = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if len(block) != BLOCK or size is None or checksum != actual:
        raise ValueError(
            f"{where}: damaged: no tar header at byte {place}; delete it and its record, make it "
            "again"
        )
    prefix = block[345:500] if block[257:263] == b"ustar\0" else b""
    parts = [part.partition(b"\0")[0] for part in (prefix, block[:100])]
    name = b"/".join(part for part in parts if part).decode("utf-8", "backslashreplace")
    return _Member(name, block[156:157], place + BLOCK, size)


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(b"[0-7]+", digits) else None


def _require_harmless(file: Descriptor, member: _Member, where: str) -> None:
    if member.size > MOST_PAX_BYTES:
        raise ValueError(f"{where}: PAX header {member.name!r}: {member.size} bytes are too many")
    found = CHANGES_MEANING.search(os.pread(file.number, member.size, member.start))
    if found:
        keyword = found[0].strip().partition(b" ")[2].decode("utf-8", "backslashreplace")
        raise ValueError(f"{where}: PAX header {member.name!r} sets {keyword}: not read")


def _span(where: str, key: str, found: dict[str, _Member]) -> Span:
    for ending, what in (("flac", "audio"), ("json", "label")):
        if ending not in found:
            raise ValueError(
                f"{where}: sample {key} has no {what}: member {key}.{ending} is missing"
            )
    audio, record = found["flac"], found["json"]
    return Span(key, audio.start, audio.size, record.start, record.size)


def _content(file: Descriptor, start: int, size: int, where: str) -> bytes:
    data = os.pread(file.number, size, start)
    if len(data) != size:
        raise ValueError(f"{where}: truncated ({len(data)} of {size} bytes)")
    return data


def read_record(tar: Path, span: Span) -> SampleRecord:
    """A sample's record; ``ValueError`` naming shard, member and field."""
    return _record(_opened(tar), str(tar), span)


def _record(file: Descriptor, where: str, span: Span) -> SampleRecord:
    where = f"{where}: {span.key}.json"
    data = _content(file, span.record_start, span.record_bytes, where)
    try:
        record = parse_sample(data, where)
    except RecursionError:
        raise ValueError(f"{where}: not JSON that is read: nested too deeply") from None
    if record.key != span.key:
        raise ValueError(f"{where}: is the record of sample {record.key!r}")
    return record


def read_pcm(tar: Path, span: Span) -> Pcm:
    """A sample's audio, int16 (122880,); ``ValueError`` naming shard and member."""
    pcm_T = np.empty(CROP_SAMPLES, np.int16)
    _decode(_opened(tar), str(tar), span, pcm_T)
    return pcm_T


def _decode(file: Descriptor, where: str, span: Span, pcm_T: Pcm) -> None:
    """Decode a sample's audio into ``pcm_T``: never more than that, whatever the file holds."""
    where = f"{where}: {span.key}.flac"
    data = _content(file, span.audio_start, span.audio_bytes, where)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            _require_crop(sound, where)
            decoded = len(sound.read(out=pcm_T))
    except soundfile.SoundFileError as error:
        raise ValueError(f"{where}: not readable as FLAC: {error}") from error
    if decoded != CROP_SAMPLES:
        raise ValueError(f"{where}: truncated or damaged ({decoded} of {CROP_SAMPLES} samples)")


def _require_crop(sound: soundfile.SoundFile, where: str) -> None:
    if sound.format != "FLAC":
        raise ValueError(f"{where}: not FLAC but {sound.format}")
    shape = (sound.frames,) if sound.channels == 1 else (sound.frames, sound.channels)
    if sound.samplerate != SAMPLE_RATE or shape != (CROP_SAMPLES,):
        raise ValueError(
            f"{where}: {sound.samplerate} Hz, shape {shape}; need {SAMPLE_RATE} Hz, "
            f"({CROP_SAMPLES},)"
        )


# ---------------------------------------------------------------- order: pure functions


def _generator(seed: int, stream: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, epoch])))


def epoch_order(counts: Sequence[int], seed: int, epoch: int, buffer: int) -> NDArray[np.int64]:
    """The order of an epoch: every sample's number once (shards' samples counted end to end).

    A pure function of its arguments. ``counts`` are samples per shard; ``buffer`` is how many
    places a sample may move within the permuted shards (1: not at all).
    """
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    shards = _generator(seed, STREAM_SHARDS, epoch).permutation(len(counts))
    laid_out = np.concatenate([np.arange(counts[s]) + starts[s] for s in shards])
    moves = _generator(seed, STREAM_MOVES, epoch).random(len(laid_out)) * buffer
    order: NDArray[np.int64] = laid_out[np.argsort(np.arange(len(laid_out)) + moves, kind="stable")]
    return order.astype(np.int64)


class Item(NamedTuple):
    """One entry of a batch: a sample of the shards, or a rated clip with where it is cropped."""

    rated: bool
    number: int
    crop: float = 0.0


@dataclass(frozen=True)
class Order:
    """The endless sequence of batches, and how to make any of them.

    ``rated_share`` of all entries are rated clips: exactly, over any run of batches, to one clip.
    """

    counts: tuple[int, ...]
    rated_clips: int
    seed: int
    batch: int
    rated_share: float = 0.0
    buffer: int = 4096
    _cache: dict[tuple[str, int], NDArray[np.int64]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rated_share <= 1:
            raise ValueError(f"rated share {self.rated_share}: must be 0 to 1")
        if self.rated_share and not self.rated_clips:
            raise ValueError(f"rated share {self.rated_share}, but no rated clips: give --rated")
        if self.rated_share < 1 and not sum(self.counts):
            raise ValueError("the shards hold no samples")

    def consumed(self, step: int) -> tuple[int, int]:
        """(samples of the shards, rated clips) in the batches before batch ``step``."""
        rated = int(step * self.batch * self.rated_share + 1e-9)
        return step * self.batch - rated, rated

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, samples taken in it) before batch ``step``; of the shards."""
        total = sum(self.counts)
        return divmod(self.consumed(step)[0], total) if total else (0, 0)

    def items(self, step: int) -> list[Item]:
        """The entries of batch ``step``, samples of the shards first."""
        (first, first_rated), (last, last_rated) = (
            self.consumed(step),
            self.consumed(step + 1),
        )
        samples = [Item(False, self._sample(k)) for k in range(first, last)]
        return samples + [self._rated(k) for k in range(first_rated, last_rated)]

    def _sample(self, position: int) -> int:
        epoch, place = divmod(position, sum(self.counts))
        return int(self._epoch("samples", epoch)[place])

    def _rated(self, position: int) -> Item:
        epoch, place = divmod(position, self.rated_clips)
        crop = float(_generator(self.seed, STREAM_CROPS, position).random())
        return Item(True, int(self._epoch("rated", epoch)[place]), crop)

    def _epoch(self, kind: str, epoch: int) -> NDArray[np.int64]:
        if (kind, epoch) not in self._cache:
            for stale in [key for key in self._cache if key[0] == kind and key[1] < epoch - 1]:
                del self._cache[stale]
            self._cache[kind, epoch] = (
                epoch_order(self.counts, self.seed, epoch, self.buffer)
                if kind == "samples"
                else _generator(self.seed, STREAM_RATED, epoch).permutation(self.rated_clips)
            )
        return self._cache[kind, epoch]


# ---------------------------------------------------------------- reading


class DecodedCache:
    """Decoded audio of all samples, in memory that worker processes share; filled as it is read.

    An anonymous shared mapping, not /dev/shm: that is often only 64 MB in a container.
    """

    def __init__(self, samples: int) -> None:
        row = CROP_SAMPLES * 2
        self._pcm = np.frombuffer(mmap.mmap(-1, samples * row), np.int16)
        self._pcm = self._pcm.reshape(samples, CROP_SAMPLES)
        self._mos = np.frombuffer(mmap.mmap(-1, samples * 4), np.float32)
        self._there = np.frombuffer(mmap.mmap(-1, samples), np.uint8)

    def get(self, number: int) -> tuple[Pcm, float] | None:
        """Sample ``number`` if it was put before."""
        if not self._there[number]:
            return None
        return self._pcm[number], float(self._mos[number])

    def put(self, number: int, pcm_T: Pcm, mos: float) -> None:
        """Keep a sample. The flag goes last: a reader never sees a half-written row."""
        self._pcm[number] = pcm_T
        self._mos[number] = mos
        self._there[number] = 1


def cache_fits(samples: int, budget_gb: float) -> bool:
    """Whether all decoded samples fit the budget and half of the memory that is free now."""
    needed = samples * CROP_SAMPLES * 2
    return needed <= min(budget_gb * 1e9, free_bytes() / 2)


class ShardSamples:
    """Samples of a list of shards by number (all shards' samples counted end to end)."""

    def __init__(self, shards: Sequence[Shard], cache: DecodedCache | None = None) -> None:
        self.shards = list(shards)
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self._files: OrderedDict[int, Descriptor] = OrderedDict()
        self._indices: dict[int, tuple[NDArray[np.str_], NDArray[np.int64]]] = {}
        self._cache = cache
        self._ahead = ReadAhead()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def remote(self) -> list[RemoteFile]:
        """Those of the shards that are not on this machine."""
        return [shard.remote for shard in self.shards if shard.remote]

    def locate(self, number: int) -> tuple[Path, Span]:
        """The tar of sample ``number``, on this machine, and its place there."""
        shard = self._shard(number)
        return self.shards[shard].local(), self._span(shard, number)

    def read(self, number: int) -> tuple[Pcm, float]:
        """(audio int16 (122880,), teacher's MOS) of sample ``number``."""
        kept = self._cache.get(number) if self._cache else None
        if kept is not None:
            return kept
        pcm_T = np.empty(CROP_SAMPLES, np.int16)
        return pcm_T, self.read_into(number, pcm_T)

    def read_into(self, number: int, pcm_T: Pcm) -> float:
        """Write a sample's audio to ``pcm_T``, int16 (122880,); its teacher's MOS."""
        kept = self._cache.get(number) if self._cache else None
        if kept is not None:
            pcm_T[:] = kept[0]
            return kept[1]
        shard = self._shard(number)
        where, file, span = self.shards[shard].where, self._file(shard), self._span(shard, number)
        mos = _record(file, where, span).mos
        _decode(file, where, span, pcm_T)
        if self._cache:
            self._cache.put(number, pcm_T, mos)
        return mos

    def expect(self, numbers: Sequence[int]) -> None:
        """Fetch the remote shards of these samples in the background, if they will be read."""
        unread = [n for n in numbers if not (self._cache and self._cache.get(n))]
        for shard in {self._shard(number): None for number in unread}:
            remote = self.shards[shard].remote
            if remote and shard not in self._files:
                self._ahead.ask(remote)

    def _shard(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _file(self, shard: int) -> Descriptor:
        """The shard's tar, kept open; the one used longest ago is closed for it."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        for other in [other for other, file in self._files.items() if file.removed]:
            del self._files[other]  # its disk space is free only then
        while len(self._files) >= OPEN_SHARDS:
            self._files.popitem(last=False)
        self._files[shard] = self.shards[shard].open()
        return self._files[shard]

    def _span(self, shard: int, number: int) -> Span:
        if shard not in self._indices:
            self._indices[shard] = self._read_index(shard)
        keys, places = self._indices[shard]
        place = number - int(self._starts[shard])
        return Span(str(keys[place]), *places[place].tolist())

    def _read_index(self, shard: int) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
        """Keys, and places (samples, 4): as arrays a tenth of the memory of tuples."""
        listed = self.shards[shard]
        spans = _index(self._file(shard), listed.where)
        if len(spans) != listed.samples:
            raise ValueError(
                f"{listed.where}: holds {len(spans)} samples, its record says {listed.samples}"
            )
        return np.array([span.key for span in spans]), np.array([span[1:] for span in spans])


def rated_pcm(clip: RatedClip, crop: float) -> tuple[Pcm, int]:
    """A rated clip as int16 (122880,), peak-normalised, and how many of these samples are its own.

    Longer clips are cropped at ``crop`` (0: the start, 1: the end); shorter ones get zeros at
    the end, as published. ``ValueError`` naming the file if it cannot be read.
    """
    return cropped(to_16k(*read_mono(clip.path)), crop)


def cropped(wave_T: Wave, crop: float) -> tuple[Pcm, int]:
    """See ``rated_pcm``; of the clip's wave at 16 kHz."""
    start = round(crop * max(0, len(wave_T) - CROP_SAMPLES))
    wave_T = wave_T[start : start + CROP_SAMPLES]
    wave_T = wave_T / max(float(np.abs(wave_T).max()), 1e-8)
    pcm_T = np.zeros(CROP_SAMPLES, np.int16)
    pcm_T[: len(wave_T)] = np.round(wave_T * (PCM_SCALE - 1))
    return pcm_T, len(wave_T)


RATED_BYTES = 256 << 20
"""Decoded rated clips that each worker keeps: to decode and resample one takes longer than a small
student takes to learn from it. There is no order in which to drop some: an epoch reads all."""


class Batch(NamedTuple):
    """Clips with their scores.

    ``pcm_BT`` is int16 (B, 122880), ``mos_B`` float32 (B,), ``lengths_B`` int64 (B,): how many
    samples of each clip are its own; the rest is zeros.
    """

    pcm_BT: Tensor
    mos_B: Tensor
    lengths_B: Tensor


class Batches(Dataset[Batch]):
    """Batch ``step``, or this rank's share of it (``rank::world``); indexed by step.

    ``ValueError`` if a batch cannot be shared evenly, or if the cache of remote shards is smaller
    than what the order needs at a time.
    """

    def __init__(
        self,
        samples: ShardSamples,
        order: Order,
        rated: Sequence[RatedClip] = (),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of world {world}: must be 0 to {world - 1}")
        if order.batch % world:  # a world larger than the batch, too
            raise ValueError(
                f"a batch of {order.batch} cannot be shared by {world} processes: give a --batch "
                f"that is a multiple of {world}, or another number of processes"
            )
        _require_room(samples, order)
        self.samples, self.order, self.rated = samples, order, list(rated)
        self.rank, self.world = rank, world
        self._waves: dict[int, Wave] = {}
        self._ahead = math.ceil(READ_AHEAD_SAMPLES / order.batch) if samples.remote else 0

    @property
    def size(self) -> int:
        """Clips in a batch, of this rank."""
        return self.order.batch // self.world

    def __getitem__(self, step: int) -> Batch:
        pcm_BT = np.empty((self.size, CROP_SAMPLES), np.int16)
        return _batch(torch.from_numpy(pcm_BT), *self.read_into(step, pcm_BT))

    def read_into(self, step: int, pcm_BT: Pcm) -> tuple[list[float], list[int]]:
        """Write a batch's audio to ``pcm_BT``, int16 (size, 122880); its scores and lengths."""
        if self._ahead:
            ahead = self._items(step + self._ahead)
            self.samples.expect([item.number for item in ahead if not item.rated])
        pairs = zip(self._items(step), pcm_BT, strict=True)
        read = [self._read(item, pcm_T) for item, pcm_T in pairs]
        return [mos for mos, _ in read], [length for _, length in read]

    def _items(self, step: int) -> list[Item]:
        return self.order.items(step)[self.rank :: self.world]

    def _read(self, item: Item, pcm_T: Pcm) -> tuple[float, int]:
        """Write an entry's audio to ``pcm_T``; its score and length."""
        if not item.rated:
            return self.samples.read_into(item.number, pcm_T), CROP_SAMPLES
        clip = self.rated[item.number]
        pcm_T[:], length = cropped(self._rated_wave(item.number), item.crop)
        return clip.mos, length

    def _rated_wave(self, number: int) -> Wave:
        """A rated clip at 16 kHz; decoded once, where there is room to keep it."""
        if number in self._waves:
            return self._waves[number]
        wave_T = to_16k(*read_mono(self.rated[number].path))
        if sum(kept.nbytes for kept in self._waves.values()) + wave_T.nbytes <= RATED_BYTES:
            self._waves[number] = wave_T
        return wave_T


def _require_room(samples: ShardSamples, order: Order) -> None:
    """``ValueError`` if the cache would drop remote shards that are still being read."""
    remote = samples.remote
    if not remote:
        return
    places = order.buffer + READ_AHEAD_SAMPLES + order.batch
    live = 2 + places // min(shard.samples for shard in samples.shards)
    needed = sum(sorted((file.size for file in remote), reverse=True)[:live])
    limit = remote[0].cache.limit_bytes
    if needed > limit:
        raise ValueError(
            f"{remote[0].cache.folder}: may hold {limit / 1e9:.2f} GB, but a shuffle over "
            f"{order.buffer} samples reads from up to {min(live, len(remote))} shards at a time, "
            f"{needed / 1e9:.2f} GB: {CACHE_REMEDY}, or lower --buffer"
        )


def _batch(pcm_BT: Tensor, mos: list[float], lengths: list[int]) -> Batch:
    return Batch(pcm_BT, torch.tensor(mos, dtype=torch.float32), torch.tensor(lengths))


# ---------------------------------------------------------------- worker processes

PREFETCH = 4
"""Batches that each worker makes ahead."""

RINGS: WeakValueDictionary[int, _Ring] = WeakValueDictionary()
"""The rings of this process by number: what workers send refers to them."""


class _Filled(NamedTuple):
    """What a worker sends: the audio itself is in a place of the ring that both share."""

    ring: int
    place: int
    mos: list[float]
    lengths: list[int]

    def copied(self) -> Batch:
        """The batch in memory of its own: the place will be filled again."""
        batch = self._in_place()
        return batch._replace(pcm_BT=batch.pcm_BT.clone())

    def pin_memory(self) -> Batch:
        """The same in pinned memory; called by the DataLoader's own thread."""
        return Batch(*(part.pin_memory() for part in self._in_place()))

    def _in_place(self) -> Batch:
        return _batch(RINGS[self.ring].rows(self.place), self.mos, self.lengths)


class _Ring(Dataset[_Filled]):
    """Batches in places of one memory that workers share, used in turn.

    New shared memory for every batch, as the DataLoader has it for tensors, costs a seventh of the
    time that decoding takes, and /dev/shm is often only 64 MB in a container. A worker is asked for
    batch ``k + places - 1`` when batch ``k`` is asked for, and ``k - 1`` was copied before.
    """

    def __init__(self, batches: Batches, places: int) -> None:
        self._batches = batches
        memory = mmap.mmap(-1, places * batches.size * CROP_SAMPLES * 2)
        rows = np.frombuffer(memory, np.int16)
        self._pcm: Pcm = rows.reshape(places, batches.size, CROP_SAMPLES)
        RINGS[id(self)] = self

    def __getitem__(self, step: int) -> _Filled:
        place = step % len(self._pcm)
        return _Filled(id(self), place, *self._batches.read_into(step, self._pcm[place]))

    def rows(self, place: int) -> Tensor:
        """A place's audio, int16 (size, 122880); not a copy."""
        return torch.from_numpy(self._pcm[place])


def _start_worker(_: int) -> None:
    """Ctrl-C reaches the whole process group: the parent alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def loader(
    batches: Batches, first: int, last: int, workers: int, pin: bool = False
) -> Iterator[Batch]:
    """Batches ``first`` to ``last`` (exclusive) in order, made by that many worker processes.

    Workers are forked, so that they share memory. ``pin`` puts batches into pinned memory, from
    which a GPU copies them while it computes.
    """
    if workers:
        yield from _from_workers(batches, range(first, last), workers, pin)
        return
    for step in range(first, last):
        batch = batches[step]
        yield Batch(*(part.pin_memory() for part in batch)) if pin else batch


def _from_workers(batches: Batches, steps: range, workers: int, pin: bool) -> Iterator[Batch]:
    made: DataLoader[_Filled] = DataLoader(
        _Ring(batches, workers * PREFETCH + 1),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork",
        pin_memory=pin,
    )
    feed: Any = iter(made)
    try:
        yield from (filled if isinstance(filled, Batch) else filled.copied() for filled in feed)
    finally:
        feed._shutdown_workers()  # else at a garbage collection after an error, which takes 5 s


def to_waves(pcm_BT: Tensor, device: torch.device) -> Tensor:
    """int16 (B, T) to float32 (B, T) within -1 to 1, on the device."""
    return pcm_BT.to(device, non_blocking=True).float() / PCM_SCALE
