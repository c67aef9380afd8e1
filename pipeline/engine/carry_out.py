"""Make what is missing of a dataset, write its card, and tell what was done."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

from data_specs.cluster.needs import (
    EVERY,
    Part,
)
from data_specs.io.addresses import shown
from data_specs.io.storage import NotFound
from data_specs.sample import shard_name
from pipeline.dataset import description, shards
from pipeline.dataset import job as jobs
from pipeline.dataset import retry as failures
from pipeline.dataset.card import write_card
from pipeline.engine import run


def make(
    job: jobs.Job,
    options: argparse.Namespace,
    actors: run.TeacherActors,
    part: Part,
    at: run.Machines,
) -> int:
    """Make what is to be made of a job, and tell of it; exit status of ``finish``."""

    def work() -> run.Outcome:
        outcome = run.run(
            job, options.engine, options.workers, actors=actors, part=part, machines=at
        )
        failures.note(job, outcome)
        return outcome

    return carry_out(job, part, work)


def carry_out(job: jobs.Job, part: Part, work: Callable[[], run.Outcome]) -> int:
    """Do the work on a dataset as its only writer; exit status of ``finish``, and 1 where the
    folder was removed under it."""
    began = time.monotonic()
    with description.writing(job.out, part):
        try:
            outcome = work()
            return finish(job, outcome, time.monotonic() - began, part)
        except (FileNotFoundError, NotFound, description.WrongDataset):
            try:
                description.require_ours(job)
            except description.WrongDataset as gone:
                print(f"error: {gone}", file=sys.stderr)
                return 1
            raise


def finish(job: jobs.Job, outcome: run.Outcome, seconds: float, part: Part = EVERY) -> int:
    """Write the dataset's card and tell what a run did. Exit status 1 where a shard failed.

    Of several parts the last one to end writes the card: two that end at once write the same.
    """
    description.require_ours(job)
    missing = job.missing()
    rest = [] if part == EVERY else missing
    if not rest:
        write_card(job)
    _tell(job, outcome.made, outcome.skipped, seconds)
    for shard, reason in sorted(outcome.failed.items()):
        print(f"failed: {shard_name(shard)}: {reason}")
    if rest:
        print(f"part {part}: {len(rest)} shards of the whole dataset are still to be made")
    if lost := sorted(set(outcome.made) & set(missing)):
        print(f"{len(lost)} shards that were made are gone, such as {shard_name(lost[0])}")
    return 1 if outcome.failed or lost else 0


def _tell(job: jobs.Job, made: Sequence[int], skipped: int, seconds: float) -> None:
    records = list(shards.read_ledger(job.out, made).records.values())
    samples = sum(record.samples for record in records)
    dropped = Counter(drop["reason"] for record in records for drop in record.dropped)
    hours = samples * jobs.CLIP_HOURS
    print(
        f"{shown(job.out)}: {len(made)} shards made ({samples} samples, {hours:.2f} h of audio, "
        f"{seconds:.0f} s, {hours * 3600 / max(seconds, 1e-9):.0f} x real time), "
        f"{skipped} were whole already"
    )
    for reason, count in dropped.most_common():
        print(f"dropped: {count} {reason}")
