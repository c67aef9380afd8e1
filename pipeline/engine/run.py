"""Runs jobs by an engine. What happens to a group and a shard is plain functions, which every
engine calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

from data_specs.cluster.needs import Part
from pipeline.dataset.job import Job, Worker, WorkerFactory
from pipeline.engine.base import WHOLE_ALREADY, Engine, EngineOptions, Outcome, Task
from pipeline.engine.local import run_local
from pipeline.engine.ray_engine import run_ray
from pipeline.engine.watch import Watch


def run(
    job: Job,
    engine: str,
    workers: int,
    progress: bool = True,
    factory: WorkerFactory = Worker,
    **how: Any,
) -> Outcome:
    """``run_all`` of one job, by these fields of ``EngineOptions``."""
    options = EngineOptions(engine=engine, workers=workers, **how)  # type: ignore[arg-type]
    return run_all([job], options, progress, factory)[0]


def run_all(
    jobs: Sequence[Job],
    how: EngineOptions,
    progress: bool = True,
    factory: WorkerFactory = Worker,
) -> list[Outcome]:
    """Make every shard of a part of some jobs that is not whole yet, one job after the other.

    The jobs have one recipe: workers keep their models from one to the next. A shard's trouble (too
    many drops, a source that cannot be opened, an error that is no sample's own) is kept in
    ``failed`` and the others go on; a full or unwritable output stops the run (``OSError``).
    """
    part = how.own
    todo = [part.own(job.todo()) for job in jobs]
    outcomes = [
        Outcome(skipped=left_whole(job, part, own)) for job, own in zip(jobs, todo, strict=True)
    ]
    wanted = [number for number, own in enumerate(todo) if own]
    if not wanted:
        return outcomes
    engine: Engine = run_ray if how.engine == "ray" else run_local
    with ExitStack() as stack:
        watches = [
            Watch(
                *(jobs[k], todo[k], how.engine, how.workers, outcomes[k].skipped, progress),
                waits=at > 0,
            )
            for at, k in enumerate(wanted)
        ]
        for watch in watches:
            stack.enter_context(watch)
        tasks = [Task(at, shard) for at, k in enumerate(wanted) for shard in todo[k]]
        finished = engine(factory, [jobs[k] for k in wanted], tasks, how, watches)
        since = time.monotonic()
        for task, error in stack.enter_context(closing(finished)):
            outcome, now = outcomes[wanted[task.job]], time.monotonic()
            watches[task.job].ended(task.shard, "" if error == WHOLE_ALREADY else error)
            outcome.add(task.shard, error)
            outcome.seconds, since = outcome.seconds + now - since, now
    return outcomes


def left_whole(job: Job, part: Part, todo: Sequence[int]) -> int:
    """How many shards are whole and stay so. Where only some are asked for, the others may lack."""
    lacking = [] if job.only is None else part.own(job.missing())
    return len(part.own(range(job.shard_count))) - len({*todo, *lacking})
