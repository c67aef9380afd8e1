"""Batches made ahead by worker processes, in order."""

from __future__ import annotations

import mmap
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_specs.sample import CROP_SAMPLES
from train.stream import Batch, Batches, batch_of
from train.tars import Pcm

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
        return batch_of(RINGS[self.ring].rows(self.place), self.mos, self.lengths)


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
