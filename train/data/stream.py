"""Samples of shards, and rated clips, as batches; samples are read out of the tars in place.

Workers take whole batches of the order (``train.data.order``) in turn; of ``world`` training
processes, ``rank`` reads entries ``rank``, ``rank + world``, ... of every batch. So the sequence is
the same for any number of workers and processes, a run resumes at batch ``k`` without decoding what
came before, and each sample is read once an epoch, whatever the shards' number and sizes.
"""

from __future__ import annotations

import math
import mmap
import os
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data_specs.io.cache import CACHE_REMEDY, Descriptor, ReadAhead, RemoteFile
from data_specs.io.errors import UserError
from data_specs.io.tars import Span, audio_of, index_of
from data_specs.io.waves import Padding, Resampler, audible_samples, filled
from data_specs.rated import RatedClip
from data_specs.sample import CROP_SAMPLES, SampleRecord
from train.audio import Wave, read_mono, to_16k
from train.data.order import Item, Order
from train.data.shards import Shard
from train.data.tars import Pcm, decode, record_of, require_sha256

PCM_SCALE = 32768.0

OPEN_SHARDS = 64
"""Tars that a process keeps open."""

READ_AHEAD_SAMPLES = 2048
"""How far ahead remote shards are fetched: some shards of 250, a few seconds of training."""


class DecodedCache:
    """Decoded audio of all samples, in memory that worker processes share; filled as it is read.

    An anonymous shared mapping, not /dev/shm: that is often only 64 MB in a container.
    """

    ROW = np.dtype([("pcm", np.int16, CROP_SAMPLES), ("mos", np.float32), ("there", np.int16)])

    def __init__(self, samples: int) -> None:
        self._rows = np.frombuffer(mmap.mmap(-1, samples * self.ROW.itemsize), self.ROW)

    def get(self, number: int) -> tuple[Pcm, float] | None:
        """Sample ``number`` if it was put before."""
        row = self._rows[number]
        return (row["pcm"], float(row["mos"])) if row["there"] else None

    def put(self, number: int, pcm_T: Pcm, mos: float) -> None:
        """Keep a sample. The flag goes last: a reader never sees a half-written row."""
        row = self._rows[number]
        row["pcm"], row["mos"] = pcm_T, mos
        row["there"] = 1


class ShardSamples:
    """Samples of a list of shards by number (all shards' samples counted end to end)."""

    def __init__(self, shards: Sequence[Shard], cache: DecodedCache | None = None) -> None:
        self.shards = list(shards)
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self._files: OrderedDict[int, Descriptor] = OrderedDict()
        self._indices: dict[int, tuple[NDArray[np.str_], NDArray[np.int64]]] = {}
        self._cache = cache
        self._ahead = ReadAhead()
        # Size and time of the tars that had the right hash, for all processes that are forked.
        memory = mmap.mmap(-1, 16 * max(len(shards), 1))
        self._checked = np.frombuffer(memory, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def remote(self) -> list[RemoteFile]:
        """Those of the shards that are not on this machine."""
        return [shard.remote for shard in self.shards if shard.remote]

    def record(self, number: int) -> SampleRecord:
        shard = self._shard(number)
        return record_of(self._file(shard), self.shards[shard].where, self._span(shard, number))

    def flac(self, number: int) -> bytes:
        """The audio of sample ``number`` as it is stored."""
        shard = self._shard(number)
        return audio_of(
            self._file(shard).number, self.shards[shard].where, self._span(shard, number)
        )

    def read(self, number: int) -> tuple[Pcm, float]:
        """(audio int16 (122880,), teacher's MOS) of sample ``number``."""
        pcm_T = np.empty(CROP_SAMPLES, np.int16)
        return pcm_T, self.read_into(number, pcm_T)

    def read_into(self, number: int, pcm_T: Pcm) -> float:
        """Write a sample's audio to ``pcm_T``, int16 (122880,); its teacher's MOS."""
        kept = self._cache.get(number) if self._cache else None
        if kept is not None:
            pcm_T[:] = kept[0]
            return kept[1]
        shard = self._shard(number)
        where = self.shards[shard].where
        try:
            file, span = self._file(shard), self._span(shard, number)
            mos = record_of(file, where, span).mos
            decode(file, where, span, pcm_T)
        except OSError as error:  # reads by descriptor name no file
            if error.errno is None:
                raise
            raise OSError(error.errno, error.strerror, error.filename or where) from error
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
        opened = self.shards[shard].open()
        self._require_unchanged(shard, opened)
        self._files[shard] = opened
        return opened

    def _require_unchanged(self, shard: int, file: Descriptor) -> None:
        """Hold a local tar to its record's hash when a run first reads it, or it changed since."""
        listed, status = self.shards[shard], os.fstat(file.number)
        stamp = (status.st_size, status.st_mtime_ns)
        if listed.sha256 and tuple(self._checked[shard].tolist()) != stamp:
            require_sha256(file, listed.where, listed.sha256)
            self._checked[shard] = stamp

    def _span(self, shard: int, number: int) -> Span:
        if shard not in self._indices:
            self._indices[shard] = self._read_index(shard)
        keys, places = self._indices[shard]
        place = number - int(self._starts[shard])
        return Span(str(keys[place]), *places[place].tolist())

    def _read_index(self, shard: int) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
        """Keys, and places (samples, 4): as arrays a tenth of the memory of tuples."""
        listed = self.shards[shard]
        spans = index_of(self._file(shard).number, listed.where)
        if len(spans) != listed.samples:
            raise UserError(
                f"{listed.where}: holds {len(spans)} samples, its record says {listed.samples}"
            )
        return np.array([span.key for span in spans]), np.array([span[1:] for span in spans])


def rated_pcm(clip: RatedClip, resampler: Resampler = "soft") -> tuple[Pcm, int]:
    """The middle of a rated clip, as ``cropped`` gives it; ``ValueError`` naming a bad file."""
    return cropped(to_16k(*read_mono(clip.path), resampler), 0.5)


def cropped(wave_T: Wave, crop: float) -> tuple[Pcm, int]:
    """A wave at 16 kHz as int16 (122880,), peak-normalised, and how many samples are its own.

    Longer ones are cropped at ``crop`` (0: the start, 1: the end); shorter ones get zeros at the
    end, as published.
    """
    start = round(crop * max(0, len(wave_T) - CROP_SAMPLES))
    wave_T = wave_T[start : start + CROP_SAMPLES]
    wave_T = wave_T / max(float(np.abs(wave_T).max()), 1e-8)
    pcm_T = np.zeros(CROP_SAMPLES, np.int16)
    pcm_T[: len(wave_T)] = np.round(wave_T * (PCM_SCALE - 1))
    return pcm_T, len(wave_T)


RATED_BYTES = 256 << 20
"""Decoded rated clips that each worker keeps: to decode and resample one takes longer than a small
student takes to learn from it. There is no order in which to drop some: an epoch reads all."""


Read = Callable[[], Wave]
"""Gives a wave (T,) at 16 kHz."""


@dataclass
class Waves:
    """Clips at 16 kHz, kept in memory as far as there is room."""

    limit_bytes: float
    readers: Mapping[Path, Read] = field(default_factory=dict)
    """Of clips that are no files of their own."""
    resampler: Resampler = "soft"
    _kept: dict[Path, Wave] = field(default_factory=dict)
    _bytes: int = 0

    def read(self, path: Path) -> Wave:
        """A clip's first channel (T,). ``UserError`` naming a file that cannot be read."""
        if path in self._kept:
            return self._kept[path]
        read = self.readers.get(path, lambda: to_16k(*read_mono(path), self.resampler))
        wave_T = read()
        if self._bytes + wave_T.nbytes <= self.limit_bytes:
            self._kept[path] = wave_T
            self._bytes += wave_T.nbytes
        return wave_T


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
        resampler: Resampler = "soft",
    ) -> None:
        if order.batch % world:  # a world larger than the batch, too
            raise UserError(
                f"a batch of {order.batch} cannot be shared by {world} processes: give a --batch "
                f"that is a multiple of {world}, or another number of processes"
            )
        _require_cache(samples, order)
        self.samples, self.order, self.rated = samples, order, list(rated)
        self.rank, self.world = rank, world
        self._waves = Waves(RATED_BYTES, resampler=resampler)
        self._ahead = math.ceil(READ_AHEAD_SAMPLES / order.batch) if samples.remote else 0

    @property
    def size(self) -> int:
        """Clips in a batch, of this rank."""
        return self.order.batch // self.world

    def __getitem__(self, step: int) -> Batch:
        pcm_BT = np.empty((self.size, CROP_SAMPLES), np.int16)
        return batch_of(torch.from_numpy(pcm_BT), *self.read_into(step, pcm_BT))

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
            return self.samples.read_into(item.number, pcm_T), audible_samples(pcm_T)
        clip = self.rated[item.number]
        pcm_T[:], length = cropped(self._waves.read(clip.path), item.crop)
        return clip.mos, length


def _require_cache(samples: ShardSamples, order: Order) -> None:
    """``ValueError`` if the cache would drop remote shards that are still being read."""
    remote = samples.remote
    if not remote:
        return
    places = order.buffer + READ_AHEAD_SAMPLES + order.batch
    live = 2 + _shards_for(places, sorted(shard.samples for shard in samples.shards))
    needed = sum(sorted((file.size for file in remote), reverse=True)[:live])
    limit = remote[0].cache.limit_bytes
    if needed > limit:
        raise UserError(
            f"{remote[0].cache.folder}: may hold {limit / 1e9:.2f} GB, but a shuffle over "
            f"{order.buffer} samples reads from up to {min(live, len(remote))} shards at a time, "
            f"{needed / 1e9:.2f} GB: {CACHE_REMEDY}, or lower --buffer"
        )


def _shards_for(places: int, ascending: list[int]) -> int:
    """From how many shards so many samples come at most: the smallest ones."""
    held = list(accumulate(ascending))
    return min(bisect_left(held, places) + 1, len(held))


def batch_of(pcm_BT: Tensor, mos: list[float], lengths: list[int]) -> Batch:
    """A batch of plain numbers and audio."""
    return Batch(pcm_BT, torch.tensor(mos, dtype=torch.float32), torch.tensor(lengths))


def padded(pcm_BT: Tensor, padding: Padding, device: torch.device) -> Tensor:
    """``to_waves`` of clips with silence behind short ones; with what is wanted there instead."""
    if padding == "zero":
        return to_waves(pcm_BT, device)
    waves = (pcm_BT.float() / PCM_SCALE).numpy()
    filled_BT = np.stack([filled(wave_T[: audible_samples(wave_T)], padding) for wave_T in waves])
    return torch.from_numpy(filled_BT).to(device)


def to_waves(pcm_BT: Tensor, device: torch.device) -> Tensor:
    """int16 (B, T) to float32 (B, T) within -1 to 1, on the device."""
    return pcm_BT.to(device, non_blocking=True).float() / PCM_SCALE
