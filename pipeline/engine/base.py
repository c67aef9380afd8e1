"""What all engines share: what they are asked for, what they say, and how one shard is made."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field

from data_specs.cluster.needs import EVERY, Part, Stage, parse_address, parse_part, parse_stage
from data_specs.io.errors import UserError
from data_specs.io.hardware import cpus
from data_specs.io.storage import patiently
from pipeline.dataset.job import Job, ShardWorker, WorkerFactory
from pipeline.dataset.shards import ShardError
from pipeline.engine.watch import Watch
from pipeline.render.label import Row

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
        if error == WHOLE_ALREADY:
            self.skipped += 1
        elif error:
            self.failed[shard] = error
        else:
            self.made.append(shard)


class EngineOptions(BaseModel):
    """Where, how and by how many processes shards are made: nothing that is data."""

    engine: Literal["ray", "local"] = Field("ray", description="what runs the workers")
    workers: int = Field(default_factory=cpus, description="processes that make shards")
    teacher_actors: int = Field(
        0,
        description="N teachers that all of Ray's workers share, such as one for each GPU "
        "(default: every worker loads its own)",
    )
    teachers_per_gpu: int = Field(1, description="how many of them share a GPU")
    ray_address: str = Field(
        "",
        description="auto or HOST:PORT of a running Ray cluster (default: RAY_ADDRESS, or a Ray "
        "of its own)",
    )
    worker_needs: str = Field(
        "",
        description="cores=N,memory_gb=N,gpus=N: what Ray reserves for a worker (default: a core; "
        "where it computes on cuda, its share of the GPUs)",
    )
    teacher_needs: str = Field("", description="the same for a teacher")
    part: str = Field(
        str(EVERY),
        description="I/N: make only the I-th of N parts, beside other jobs that make the others",
    )

    @property
    def own(self) -> Part:
        return parse_part(self.part)

    @property
    def worker(self) -> Stage:
        return parse_stage(self.worker_needs, "--worker-needs")

    def teacher(self, on_gpu: bool) -> dict[str, Any]:
        """What Ray reserves for a shared teacher; on a GPU no core, unless that was said."""
        needs = parse_stage(self.teacher_needs, "--teacher-needs")
        no_core = {"num_cpus": 0} if on_gpu and "cores" not in needs.model_fields_set else {}
        return needs.options(1 / self.teachers_per_gpu if on_gpu else 0.0) | no_core

    def check(self, device: str) -> None:
        """Raise ``UserError`` for what cannot be had; ``device`` is the teacher's."""
        if self.teacher_actors < 0 or self.teachers_per_gpu < 1:
            raise UserError("--teacher-actors must be at least 0, --teachers-per-gpu at least 1")
        if self.teacher_actors and self.engine != "ray":
            raise UserError(
                f"--teacher-actors needs --engine ray, not {self.engine}; without it, every "
                "worker has a teacher of its own"
            )
        if self.teacher_actors and ":" in device:
            raise UserError(
                f"teacher on {device!r}: with --teacher-actors Ray chooses the GPU; write "
                f"{device.partition(':')[0]}"
            )
        if parse_address(self.ray_address) and self.engine != "ray":
            raise UserError(f"--ray-address needs --engine ray, not {self.engine}")
        _ = self.own, self.worker, self.teacher(on_gpu=False)  # each can be parsed


Finished = Generator[tuple[Task, str], None, None]
"""Shards as they end, with an empty string or the reason why they failed."""

Engine = Callable[
    [WorkerFactory, Sequence[Job], list[Task], EngineOptions, Mapping[int, Watch]], Finished
]
"""Makes the shards of some jobs, each watched by its own."""


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
