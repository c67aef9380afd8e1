"""Shards to batches.

The whole run is one endless list of batches that is a pure function of (seed, dataset, batch size,
rated share): batch ``k`` is known without making the batches before it. Workers take whole
batches in turn, so any number of them gives the same sequence, and a run resumes at batch ``k``
without decoding anything that came before.

Order of an epoch: the shards are permuted, laid end to end, and every sample is then moved by
a random distance of at most ``buffer`` places (what a shuffle buffer does, but known in advance);
reads so stay near each other on the disk. Samples are read out of the tars in place: nothing is
unpacked, and only the samples that a worker needs are read.
"""

from __future__ import annotations

import io
import json
import mmap
import signal
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_specs.rated import RatedClip
from data_specs.sample import (
    CROP_SAMPLES,
    DATASET_FILE,
    SAMPLE_RATE,
    SampleRecord,
    parse_sample,
)
from data_specs.strict import describe
from train.audio import read_mono, to_16k
from train.memory import free_bytes
from train.models.calibration import Calibration

Pcm = NDArray[np.int16]
PCM_SCALE = 32768.0

STREAM_SHARDS, STREAM_MOVES, STREAM_RATED, STREAM_CROPS = range(4)
"""Which decision a random generator is for: one stream each, so that none moves another."""


@dataclass(frozen=True)
class Shard:
    """One whole shard: its tar, and how many samples it holds."""

    tar: Path
    samples: int


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


def read_dataset_info(folder: Path) -> DatasetInfo:
    """``dataset.json`` of a folder of shards; ``ValueError`` if it is missing or lacks a key."""
    path = folder / DATASET_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: is {folder} the output of `python -m pipeline shards`?"
        )
    content = _json_object(path)
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


def list_shards(folder: Path) -> list[Shard]:
    """The whole shards of a folder, by name.

    A shard is whole when its record (``shard-NNNNNN.json``) stands beside its tar: the record is
    written last. ``ValueError`` for a folder without one, and for a tar whose size is not the one
    its record says.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of shards")
    tars = sorted(folder.glob("shard-*.tar"))
    if not tars:
        raise ValueError(f"{folder}: no shards (shard-NNNNNN.tar); make some: python -m pipeline")
    whole = [tar for tar in tars if tar.with_suffix(".json").is_file()]
    if not whole:
        raise ValueError(
            f"{folder}: none of its {len(tars)} shards is whole (no shard-NNNNNN.json record "
            "beside the tar): let the pipeline finish, or run it again"
        )
    shards = [shard for tar in whole if (shard := _shard(tar)).samples]
    if not shards:
        raise ValueError(f"{folder}: none of its {len(whole)} whole shards holds a sample")
    return shards


def _shard(tar: Path) -> Shard:
    record_path = tar.with_suffix(".json")
    record = _json_object(record_path)
    expected, actual = record.get("tar_bytes"), tar.stat().st_size
    if not isinstance(expected, int):
        raise ValueError(f"{record_path}: no number 'tar_bytes'; make the shard again")
    if actual != expected:
        raise ValueError(
            f"{tar}: {actual} bytes, but its record says {expected}: it is truncated or changed; "
            f"delete {tar.name} and {record_path.name} and run the pipeline again"
        )
    samples = record.get("samples")
    return Shard(tar, samples if isinstance(samples, int) else len(shard_index(tar)))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def shard_index(tar: Path) -> list[Span]:
    """Where every sample of a tar lies, in file order; reads the headers only.

    ``ValueError`` naming the tar and the member: damaged, or a sample without audio or record.
    """
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, _, ending = member.name.partition(".")
                if not member.isfile() or ending not in ("flac", "json"):
                    raise ValueError(f"{tar}: unexpected member {member.name!r}")
                members.setdefault(key, {})[ending] = member
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{tar}: damaged: {error}; delete it and its record, make it again"
        ) from error
    return [_span(tar, key, found) for key, found in members.items()]


def _span(tar: Path, key: str, found: dict[str, tarfile.TarInfo]) -> Span:
    for ending, what in (("flac", "audio"), ("json", "label")):
        if ending not in found:
            raise ValueError(f"{tar}: sample {key} has no {what}: member {key}.{ending} is missing")
    audio, record = found["flac"], found["json"]
    return Span(key, audio.offset_data, audio.size, record.offset_data, record.size)


def _read_span(tar: Path, start: int, size: int, member: str) -> bytes:
    with tar.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{tar}: {member}: truncated ({len(data)} of {size} bytes)")
    return data


def read_record(tar: Path, span: Span) -> SampleRecord:
    """A sample's record; ``ValueError`` naming shard, member and field."""
    member = f"{span.key}.json"
    data = _read_span(tar, span.record_start, span.record_bytes, member)
    return parse_sample(data, f"{tar}: {member}")


def read_pcm(tar: Path, span: Span) -> Pcm:
    """A sample's audio, int16 (122880,); ``ValueError`` naming shard and member."""
    member = f"{span.key}.flac"
    data = _read_span(tar, span.audio_start, span.audio_bytes, member)
    try:
        pcm_T, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    except soundfile.SoundFileError as error:
        raise ValueError(f"{tar}: {member}: not readable as FLAC: {error}") from error
    if rate != SAMPLE_RATE or pcm_T.shape != (CROP_SAMPLES,):
        raise ValueError(
            f"{tar}: {member}: {rate} Hz, shape {pcm_T.shape}; need {SAMPLE_RATE} Hz, "
            f"({CROP_SAMPLES},)"
        )
    return np.asarray(pcm_T, np.int16)


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
        self._spans: dict[int, list[Span]] = {}
        self._cache = cache

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, number: int) -> tuple[Path, Span]:
        """The tar of sample ``number`` and its place there."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        spans, tar = self._indexed(shard), self.shards[shard].tar
        return tar, spans[number - int(self._starts[shard])]

    def _indexed(self, shard: int) -> list[Span]:
        if shard not in self._spans:
            spans, listed = shard_index(self.shards[shard].tar), self.shards[shard]
            if len(spans) != listed.samples:
                raise ValueError(
                    f"{listed.tar}: holds {len(spans)} samples, its record says {listed.samples}"
                )
            self._spans[shard] = spans
        return self._spans[shard]

    def read(self, number: int) -> tuple[Pcm, float]:
        """(audio int16 (122880,), teacher's MOS) of sample ``number``."""
        kept = self._cache.get(number) if self._cache else None
        if kept is not None:
            return kept
        tar, span = self.locate(number)
        pcm_T, mos = read_pcm(tar, span), read_record(tar, span).mos
        if self._cache:
            self._cache.put(number, pcm_T, mos)
        return pcm_T, mos


def rated_pcm(clip: RatedClip, crop: float) -> Pcm:
    """A rated clip as int16 (122880,), peak-normalised.

    Longer clips are cropped at ``crop`` (0: the start, 1: the end); shorter ones get zeros at
    the end, as published. ``ValueError`` naming the file if it cannot be read.
    """
    wave_T = to_16k(*read_mono(clip.path))
    start = round(crop * max(0, len(wave_T) - CROP_SAMPLES))
    wave_T = wave_T[start : start + CROP_SAMPLES]
    wave_T = wave_T / max(float(np.abs(wave_T).max()), 1e-8)
    pcm_T = np.zeros(CROP_SAMPLES, np.int16)
    pcm_T[: len(wave_T)] = np.round(wave_T * (PCM_SCALE - 1))
    return pcm_T


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batch ``step`` as (int16 (B, 122880), float32 MOS (B,)); indexed by step."""

    def __init__(
        self, samples: ShardSamples, order: Order, rated: Sequence[RatedClip] = ()
    ) -> None:
        self.samples, self.order, self.rated = samples, order, list(rated)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        read = [self._read(item) for item in self.order.items(step)]
        pcm_BT = torch.from_numpy(np.stack([pcm for pcm, _ in read]))
        return pcm_BT, torch.tensor([mos for _, mos in read], dtype=torch.float32)

    def _read(self, item: Item) -> tuple[Pcm, float]:
        if not item.rated:
            return self.samples.read(item.number)
        clip = self.rated[item.number]
        return rated_pcm(clip, item.crop), clip.mos


class _Steps(Sampler[int]):
    def __init__(self, first: int, last: int) -> None:
        self.steps = range(first, last)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def _start_worker(_: int) -> None:
    """Ctrl-C reaches the whole process group: the parent alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def loader(
    batches: Batches, first: int, last: int, workers: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches ``first`` to ``last`` (exclusive) in order, made by that many worker processes.

    Workers are forked, so that they share the decoded cache.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=_Steps(first, last),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,
    )


def to_waves(pcm_BT: Tensor, device: torch.device) -> Tensor:
    """int16 (B, T) to float32 (B, T) within -1 to 1, on the device."""
    return pcm_BT.to(device, non_blocking=True).float() / PCM_SCALE
