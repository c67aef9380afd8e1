"""The order in which samples are trained on: pure functions.

The whole run is one endless list of batches that follows from (seed, dataset, batch size, rated
share): batch ``k`` is known without making the batches before it.

Order of an epoch: the shards are permuted, laid end to end, and every sample is then moved by
a random distance of at most ``buffer`` places (what a shuffle buffer does, but known in advance);
reads so stay near each other on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STREAM_SHARDS, STREAM_MOVES, STREAM_RATED, STREAM_CROPS = range(4)
"""Which decision a random generator is for: one stream each, so that none moves another."""


def generator(*numbers: int) -> np.random.Generator:
    """Make a generator that follows from these numbers alone: a seed, a decision, a step."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def epoch_order(counts: Sequence[int], seed: int, epoch: int, buffer: int) -> NDArray[np.int64]:
    """The order of an epoch: every sample's number once (shards' samples counted end to end).

    A pure function of its arguments. ``counts`` are samples per shard; ``buffer`` is how many
    places a sample may move within the permuted shards (1: not at all).
    """
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    shards = generator(seed, STREAM_SHARDS, epoch).permutation(len(counts))
    laid_out = np.concatenate([np.arange(counts[s]) + starts[s] for s in shards])
    moves = generator(seed, STREAM_MOVES, epoch).random(len(laid_out)) * buffer
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

    def _consumed(self, step: int) -> tuple[int, int]:
        """(samples of the shards, rated clips) in the batches before batch ``step``."""
        rated = int(step * self.batch * self.rated_share + 1e-9)
        return step * self.batch - rated, rated

    def items(self, step: int) -> list[Item]:
        """The entries of batch ``step``, samples of the shards first."""
        (first, first_rated), (last, last_rated) = map(self._consumed, (step, step + 1))
        samples = [Item(False, self._sample(k)) for k in range(first, last)]
        return samples + [self._rated(k) for k in range(first_rated, last_rated)]

    def _sample(self, position: int) -> int:
        epoch, place = divmod(position, sum(self.counts))
        return int(self._epoch("samples", epoch)[place])

    def _rated(self, position: int) -> Item:
        epoch, place = divmod(position, self.rated_clips)
        crop = float(generator(self.seed, STREAM_CROPS, position).random())
        return Item(True, int(self._epoch("rated", epoch)[place]), crop)

    def _epoch(self, kind: str, epoch: int) -> NDArray[np.int64]:
        if (kind, epoch) not in self._cache:
            for stale in [key for key in self._cache if key[0] == kind and key[1] < epoch - 1]:
                del self._cache[stale]
            self._cache[kind, epoch] = (
                epoch_order(self.counts, self.seed, epoch, self.buffer)
                if kind == "samples"
                else generator(self.seed, STREAM_RATED, epoch).permutation(self.rated_clips)
            )
        return self._cache[kind, epoch]
