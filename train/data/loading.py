"""Batches made ahead by worker processes, in order; anything made ahead by a thread."""

from __future__ import annotations

import mmap
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_specs.io.cli import STOPPED, signals_wait
from data_specs.io.errors import UserError
from data_specs.sample import CROP_SAMPLES
from train.data.stream import Batch, Batches, batch_of
from train.data.tars import Pcm

T = TypeVar("T")

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


class _Failed(NamedTuple):
    """What a worker sends instead: a user's error or one of the system, as it is.

    An exception itself would arrive as another, its words those of a traceback.
    """

    error: Exception


class _Ring(Dataset[_Filled | _Failed]):
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

    def __getitem__(self, step: int) -> _Filled | _Failed:
        place = step % len(self._pcm)
        try:
            return _Filled(id(self), place, *self._batches.read_into(step, self._pcm[place]))
        except (UserError, OSError) as error:
            return _Failed(_plain(error))

    def rows(self, place: int) -> Tensor:
        """A place's audio, int16 (size, 122880); not a copy."""
        return torch.from_numpy(self._pcm[place])


def _plain(error: Exception) -> Exception:
    """The same error without what may not be sent to another process."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    return OSError(str(error)) if isinstance(error, OSError) else UserError(str(error))


def _start_worker(_: int) -> None:
    """Signals reach the whole process group: the parent alone decides what they mean."""
    for number in STOPPED:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextmanager
def worker_deaths_named() -> Iterator[None]:
    """Name what may have killed a worker: PyTorch tells of it anywhere, by a ``RuntimeError``."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"{error}: was memory short? Lower --workers, --cache-gb or --batch; the same command "
            "goes on"
        ) from error


def loader(
    batches: Batches, first: int, last: int, workers: int, pin: bool = False
) -> Generator[Batch, None, None]:
    """Batches ``first`` to ``last`` (exclusive) in order, made by that many worker processes.

    Workers are forked, so that they share memory; to close the generator ends them. ``pin`` puts
    batches into pinned memory, from which a GPU copies them while it computes.
    """
    if workers:
        yield from _from_workers(batches, range(first, last), workers, pin)
        return
    for step in range(first, last):
        batch = batches[step]
        yield Batch(*(part.pin_memory() for part in batch)) if pin else batch


def _from_workers(batches: Batches, steps: range, workers: int, pin: bool) -> Iterator[Batch]:
    made: DataLoader[_Filled | _Failed] = DataLoader(
        _Ring(batches, workers * PREFETCH + 1),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork",
        pin_memory=pin,
        generator=torch.Generator(),  # else it draws from the one that a checkpoint holds
    )
    with signals_wait():  # a worker is born with the parent's answer to signals
        feed: Any = iter(made)
    try:
        yield from map(_received, feed)
    finally:
        with signals_wait():
            _end(feed)


def _received(sent: Batch | _Filled | _Failed) -> Batch:
    if isinstance(sent, _Failed):
        raise sent.error
    return sent if isinstance(sent, Batch) else sent.copied()


def _end(feed: Any) -> None:
    """End the workers: at a garbage collection after an error it would take 5 s."""
    feed._shutdown_workers()
    for worker in feed._workers:  # one that hangs takes no SIGTERM
        if worker.is_alive():
            worker.kill()


def ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items in their order, made by a thread up to ``depth`` ahead; its errors are raised here.

    The thread stops when the iterator is closed.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1, "ahead")
    ask: Callable[[], Any] = partial(pool.submit, next, iterator, end)  # type: ignore[arg-type]
    try:
        waiting = deque(ask() for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(ask())
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
