"""Runs jobs by an engine. What happens to a group and a shard is plain functions, which every
engine calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from data_specs.cluster.needs import EVERY, Part
from pipeline.dataset.job import Job, Worker, WorkerFactory
from pipeline.engine.base import (
    HERE,
    OWN_TEACHERS,
    WHOLE_ALREADY,
    Engine,
    Machines,
    Outcome,
    Task,
    TeacherActors,
)
from pipeline.engine.local import run_local
from pipeline.engine.ray_engine import run_ray
from pipeline.engine.watch import Watch


def run(job: Job, engine: str, workers: int, **how: Any) -> Outcome:
    """Make every shard of a job that is not whole yet; the rest is as for ``run_all``."""
    return run_all([job], engine, workers, **how)[0]


def run_all(
    jobs: Sequence[Job],
    engine: str,
    workers: int,
    progress: bool = True,
    factory: WorkerFactory = Worker,
    actors: TeacherActors = OWN_TEACHERS,
    part: Part = EVERY,
    machines: Machines = HERE,
) -> list[Outcome]:
    """Make every shard of a part of some jobs that is not whole yet, one job after the other.

    The jobs have one recipe: workers keep their models from one to the next. A shard's trouble (too
    many drops, a source that cannot be opened, an error that is no sample's own) is kept in
    ``failed`` and the others go on; a full or unwritable output stops the run (``OSError``).
    """
    actors.check(engine, jobs[0].label_device)
    todo = [part.own(job.todo()) for job in jobs]
    outcomes = [
        Outcome(skipped=left_whole(job, part, own)) for job, own in zip(jobs, todo, strict=True)
    ]
    wanted = [number for number, own in enumerate(todo) if own]
    if not wanted:
        return outcomes
    ray_engine = partial(run_ray, actors=actors, machines=machines)
    engines: dict[str, Engine] = {"local": run_local, "ray": ray_engine}
    with ExitStack() as stack:
        watches = [
            Watch(jobs[k], todo[k], engine, workers, outcomes[k].skipped, progress, waits=at > 0)
            for at, k in enumerate(wanted)
        ]
        for watch in watches:
            stack.enter_context(watch)
        tasks = [Task(at, shard) for at, k in enumerate(wanted) for shard in todo[k]]
        finished = engines[engine](factory, [jobs[k] for k in wanted], tasks, workers, watches)
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
