"""Runs jobs by an engine, writes their cards, and prints what was done."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from data_specs.cluster.needs import EVERY, Part
from data_specs.io.addresses import shown
from data_specs.io.storage import NotFound
from data_specs.sample import shard_name
from pipeline.dataset import shards
from pipeline.dataset.card import write_card
from pipeline.dataset.description import WrongDataset, require_ours, writing
from pipeline.dataset.job import CLIP_HOURS, Job, Worker, WorkerFactory
from pipeline.engine.base import WHOLE_ALREADY, Engine, EngineOptions, Outcome, Task
from pipeline.engine.local import run_local
from pipeline.engine.ray_engine import run_ray
from pipeline.engine.watch import Watch


def run_all(
    jobs: Sequence[Job], how: EngineOptions, factory: WorkerFactory = Worker
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
    tasks = [Task(number, shard) for number, own in enumerate(todo) for shard in own]
    if not tasks:
        return outcomes
    engine: Engine = run_ray if how.engine == "ray" else run_local
    with ExitStack() as stack:
        watches: dict[int, Watch] = {}
        for number, own in enumerate(todo):
            if own:
                whole, waits = outcomes[number].skipped, bool(watches)
                watch = Watch(jobs[number], own, how.engine, how.workers, whole, waits=waits)
                watches[number] = stack.enter_context(watch)
        since = time.monotonic()
        finished = stack.enter_context(closing(engine(factory, jobs, tasks, how, watches)))
        for task, error in finished:
            outcome, now = outcomes[task.job], time.monotonic()
            watches[task.job].ended(task.shard, "" if error == WHOLE_ALREADY else error)
            outcome.add(task.shard, error)
            outcome.seconds, since = outcome.seconds + now - since, now
    return outcomes


def left_whole(job: Job, part: Part, todo: Sequence[int]) -> int:
    """How many shards are whole and stay so. Where only some are asked for, the others may lack."""
    lacking = [] if job.only is None else part.own(job.missing())
    return len(part.own(range(job.shard_count))) - len({*todo, *lacking})


def make(
    jobs: Sequence[Job], how: EngineOptions, factory: WorkerFactory = Worker, planned: bool = True
) -> int:
    """Make what is to be made of some jobs in one run, as their folders' only writer.

    Exit status of ``finish``, and 1 where a folder was removed under it. Where nothing is
    ``planned`` workers get no manifests.
    """
    given = jobs if planned else [replace(job, manifests={}) for job in jobs]
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(writing(job.out, how.own))
        try:
            outcomes = zip(jobs, run_all(given, how, factory), strict=True)
            return max([finish(job, outcome, how.own) for job, outcome in outcomes])
        except (FileNotFoundError, NotFound, WrongDataset):
            try:
                for job in jobs:
                    require_ours(job)
            except WrongDataset as gone:
                print(f"error: {gone}", file=sys.stderr)
                return 1
            raise


def finish(job: Job, outcome: Outcome, part: Part) -> int:
    """Write the dataset's card and print what a run did. Exit status 1 where a shard failed.

    Of several parts the last one to end writes the card: two that end at once write the same.
    """
    require_ours(job)
    missing = job.missing()
    rest = [] if part == EVERY else missing
    if not rest:
        write_card(job)
    print_summary(job, outcome)
    for shard, reason in sorted(outcome.failed.items()):
        print(f"failed: {shard_name(shard)}: {reason}")
    if rest:
        print(f"part {part}: {len(rest)} shards of the whole dataset are still to be made")
    if lost := sorted(set(outcome.made) & set(missing)):
        print(f"{len(lost)} shards that were made are gone, such as {shard_name(lost[0])}")
    return 1 if outcome.failed or lost else 0


def print_summary(job: Job, outcome: Outcome) -> None:
    """Print how much a run made, in what time, and what was dropped."""
    records = list(shards.read_ledger(job.out, outcome.made).records.values())
    samples = sum(record.samples for record in records)
    dropped = Counter(drop["reason"] for record in records for drop in record.dropped)
    hours, seconds = samples * CLIP_HOURS, outcome.seconds
    print(
        f"{shown(job.out)}: {len(outcome.made)} shards made ({samples} samples, {hours:.2f} h of "
        f"audio, {seconds:.0f} s, {hours * 3600 / max(seconds, 1e-9):.0f} x real time), "
        f"{outcome.skipped} were whole already"
    )
    for reason, count in dropped.most_common():
        print(f"dropped: {count} {reason}")
