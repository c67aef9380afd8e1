"""What all engines share: what they are asked for, what they say, and how one shard is made."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_specs.cluster.needs import ONE_CORE, Stage
from data_specs.io.errors import UserError
from data_specs.io.storage import patiently
from pipeline.dataset.job import Job, ShardWorker, WorkerFactory
from pipeline.dataset.shards import ShardError
from pipeline.engine.watch import Watch
from pipeline.render.row import Row

WHOLE_ALREADY = "whole already"
"""What an engine says of a shard that another made meanwhile."""

Said = Iterator[int | str]
"""Of a shard in the making: 0 as it begins, the samples of each group that is done, and at last an
empty string or the reason why it failed."""


class Task(NamedTuple):
    """A shard of one of the jobs of a run; ``job`` is that one's position."""

    job: int
    shard: int


@dataclass
class Outcome:
    """What a run did for a dataset, and in what time.

    ``failed`` are shards whose attempt failed, with the reason.
    """

    made: list[int] = field(default_factory=list)
    skipped: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, shard: int, error: str) -> None:
        """Count a shard that ended."""
        if error == WHOLE_ALREADY:
            self.skipped += 1
        elif error:
            self.failed[shard] = error
        else:
            self.made.append(shard)


@dataclass(frozen=True)
class TeacherActors:
    """Teachers that all of Ray's workers share: how many, and how many of them to one GPU.

    On a CPU each takes a core. Where ``count`` is 0 every worker has a teacher of its own.
    """

    count: int = 0
    per_gpu: int = 1
    needs: Stage = ONE_CORE

    def options(self, on_gpu: bool) -> dict[str, Any]:
        """What Ray reserves for one of them; on a GPU it takes no core unless that was said."""
        said = self.needs.model_fields_set
        options = self.needs.options(1 / self.per_gpu if on_gpu else 0.0)
        return options | ({"num_cpus": 0} if on_gpu and "cores" not in said else {})

    def check(self, engine: str, device: str) -> None:
        """Raise ``UserError`` for what cannot be had, before any work is done."""
        if self.count < 0 or self.per_gpu < 1:
            raise UserError("--teacher-actors must be at least 0, --teachers-per-gpu at least 1")
        if self.count and engine != "ray":
            raise UserError(
                f"--teacher-actors needs --engine ray, not {engine}; without it, every "
                "worker has a teacher of its own"
            )
        if self.count and ":" in device:
            raise UserError(
                f"teacher on {device!r}: with --teacher-actors Ray chooses the GPU; write "
                f"{device.partition(':')[0]}"
            )


@dataclass(frozen=True)
class Machines:
    """Where Ray's workers are: a cluster's ``address`` (empty: one is started here), and what each
    of them needs there."""

    address: str = ""
    worker: Stage = ONE_CORE


OWN_TEACHERS = TeacherActors()
HERE = Machines()

Finished = Generator[tuple[Task, str], None, None]
"""Shards as they end, with an empty string or the reason why they failed."""

Engine = Callable[[WorkerFactory, Sequence[Job], list[Task], int, Sequence[Watch]], Finished]
"""Makes the shards of some jobs, each watched by its own, with at most so many workers."""


def make_shard(worker: ShardWorker, job: Job, shard: int) -> Said:
    """Make and commit one shard.

    A shard may be whole by now: another part or another job may have made it, or a worker that
    died before it could say so. One that is wanted again is made nonetheless. Raises ``OSError``
    where the output cannot be written.
    """
    worker.job, rows = job, list[Row]()
    yield 0
    try:
        if shard not in job.again and job.is_whole(shard):
            yield len(job.shard_range(shard))
            yield WHOLE_ALREADY
            return
        for group in worker.groups(shard):
            rows += patiently(partial(worker.make, group))
            yield len(group)
    except Exception as error:  # the shard boundary: whatever it is, the other shards go on
        yield failure(error)
        return
    try:
        patiently(lambda: job.commit(shard, rows))
    except ShardError as error:
        yield failure(error)
        return
    yield ""


def reported(said: Said, report: Callable[[int], None]) -> str:
    """Report the samples of a shard in the making. Returns the reason why it failed, or ""."""
    for one in said:
        if isinstance(one, str):
            return one
        report(one)
    return ""


def failure(error: Exception) -> str:
    """An error in one line; one that is no user's with the place where it was raised."""
    if isinstance(error, UserError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
