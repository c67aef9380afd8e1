"""Which shards failed, so that they and no others can be made again (``--retry-failed``).

A dropped sample stands in its shard's record. Of an attempt that was not committed there is no
record: ``failed-NNNNNN.json`` beside the shards keeps the reason until the shard is made. A driver
that was killed wrote none: what its file in ``attempts/`` had in flight or had seen fail, and tars
without a record, are attempts that failed too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.dataset import shards
from pipeline.dataset.attempts import read_attempts
from pipeline.dataset.job import Job


def name_of(shard: int) -> str:
    """The file that keeps why a shard's last attempt failed."""
    return f"failed-{shard:06d}.json"


def note(job: Job, made: Sequence[int], failed: Mapping[int, str]) -> None:
    """Keep the reasons of a run's failed attempts, and remove those of shards that it made."""
    for shard, reason in failed.items():
        shards.write_json(job.out, name_of(shard), {"shard": shard, "reason": reason})
    if made:
        for shard in noted(job) & set(made):
            job.folder.remove(name_of(shard))


def noted(job: Job) -> set[int]:
    """Shards whose last attempt failed."""
    matches = (re.fullmatch(r"failed-(\d+)\.json", name) for name in job.folder.sizes())
    return {int(match[1]) for match in matches if match}


def _cut_short(job: Job) -> set[int]:
    """What drivers that are gone had in flight, or had seen fail."""
    gone = [run for run in read_attempts(job.out) if not run.alive(time.time())]
    return {shard for run in gone for shard in (*run.running, *run.failed)}


def again(job: Job) -> Job:
    """The same job, but only its shards with dropped samples or a failed attempt, made again."""
    ledger = shards.read_ledger(job.out)
    dropped = {number for number, record in ledger.records.items() if record.dropped}
    whole = {shard for shard in range(job.shard_count) if job.is_whole(shard, ledger)}
    attempts = (noted(job) | set(ledger.uncommitted) | set(ledger.wrong) | _cut_short(job)) - whole
    chosen = frozenset((dropped | attempts) & set(range(job.shard_count)))
    print(f"{len(dropped)} shards with dropped samples, {len(attempts)} with failed attempts")
    return replace(job, again=chosen, only=chosen if job.only is None else chosen & job.only)
