"""``python -m tests.bench loader``: how fast shards become batches.

Compared with reading and decoding alone, in as many processes, of the same samples: no shuffling,
no batches, nothing handed to another process. What is missing to 1.00 is what the loader costs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from data_specs.io.errors import UserError
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.data.loading import loader
from train.data.order import Order
from train.data.shards import Shard, list_shards
from train.data.stream import Batches, ShardSamples

CLIP_SECONDS = CROP_SAMPLES / SAMPLE_RATE


def first_shards(shards: Sequence[Shard], clips: int) -> list[Shard]:
    """The first shards that hold ``clips`` samples, or all: both ways then read the same files."""
    taken: list[Shard] = []
    for shard in shards:
        if sum(before.samples for before in taken) >= clips:
            break
        taken.append(shard)
    return taken


def decode(shards: Sequence[Shard], numbers: Sequence[int]) -> None:
    """Read, check and decode samples one after the other into the same place."""
    samples, pcm_T = ShardSamples(shards), np.empty(CROP_SAMPLES, np.int16)
    for number in numbers:
        samples.read_into(number, pcm_T)


def decode_alone(shards: Sequence[Shard], clips: int, processes: int) -> None:
    """The clips in that many processes, each with its part of the shards in file order."""
    total = sum(shard.samples for shard in shards)
    parts = np.array_split(np.arange(clips) % total, processes)
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=decode, args=(shards, part.tolist())) for part in parts]
    for process in running:
        process.start()
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise RuntimeError("a reading process failed: what it says stands above")


def load(shards: Sequence[Shard], clips: int, workers: int, batch: int) -> None:
    """The clips out of the loader, with a fresh index and nothing decoded kept."""
    order = Order(tuple(shard.samples for shard in shards), 0, seed=0, batch=batch)
    batches = Batches(ShardSamples(shards), order)
    loaded = sum(len(found.mos_B) for found in loader(batches, 0, clips // batch, workers))
    if loaded != clips:
        raise RuntimeError(f"the loader gave {loaded} clips, not {clips}")


class Rate(NamedTuple):
    """Clips a second, and milliseconds of CPU time a clip in all processes.

    The second hardly depends on what else runs on the machine.
    """

    clips_per_s: float
    cpu_ms: float


def measure(work: Callable[[], None], clips: int) -> Rate:
    """How fast ``work`` deals with that many clips."""
    began, cpu_s = time.perf_counter(), sum(os.times()[:4])
    work()
    seconds, cpu_s = time.perf_counter() - began, sum(os.times()[:4]) - cpu_s
    return Rate(clips / seconds, 1000 * cpu_s / clips)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench loader``."""
    parser.add_argument("--shards", required=True, help="folder of shards, or its address")
    parser.add_argument("--clips", type=int, default=4000, help="a repetition; in whole batches")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3, help="times that both ways alternate")


def run(args: argparse.Namespace) -> int:
    """``python -m tests.bench loader``; returns the exit code."""
    for name in ("clips", "workers", "batch", "repeat"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    clips = args.batch * -(-args.clips // args.batch)
    shards = first_shards(list_shards(args.shards), clips)
    ways: dict[str, Callable[[], None]] = {
        "reading and decoding alone": lambda: decode_alone(shards, clips, args.workers),
        "the loader": lambda: load(shards, clips, args.workers, args.batch),
    }
    rates: dict[str, list[Rate]] = {name: [] for name in ways}
    for _ in range(args.repeat):
        for name, work in ways.items():
            rates[name].append(measure(work, clips))
    samples = sum(shard.samples for shard in shards)
    print(
        f"{len(shards)} shards, {samples} samples; {clips} clips in batches of {args.batch}, "
        f"{args.workers} processes, median of {args.repeat}"
    )
    _tell(rates)
    return 0


def _tell(rates: dict[str, list[Rate]]) -> None:
    base: float | None = None
    for name, found in rates.items():
        speeds = [rate.clips_per_s for rate in found]
        middle = median(speeds)
        base = base or middle
        print(
            f"  {name:28}{middle:6.0f} clips/s ({min(speeds):.0f} to {max(speeds):.0f}), "
            f"{middle / base:.2f}; {middle * CLIP_SECONDS:.0f} times real time; "
            f"{median(rate.cpu_ms for rate in found):.2f} ms of CPU a clip"
        )
