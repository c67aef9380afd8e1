"""Attempts at a dataset, and its tally: what a folder says of itself, no tar being opened.

Records (``shard-NNNNNN.json``) say what is whole. Beside them every driver keeps one small file in
``attempts/``, written anew every ``HEARTBEAT_S``: what it has in flight, what failed and why, how
fast it is. A driver that died is known by its silence. No shard depends on any of these: lost, or
in a folder that cannot be written, only what they say is missing.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from pydantic import Field

from data_specs.io.addresses import PathOrUrl
from data_specs.io.storage import NotFound, open_folder
from data_specs.strict import Strict
from pipeline.dataset import shards
from pipeline.dataset.job import Job
from pipeline.dataset.shards import MOS_BINS, ShardRecord

ATTEMPTS = "attempts"
"""Folder of the drivers' files."""

HEARTBEAT_S = 30.0
LOST_AFTER = 4
"""Heartbeats of silence after which a driver counts as dead; clocks may differ by some."""

MOST_FAILURES = 10_000
"""Failed shards that a driver's file lists; a job with more has one cause, not ten thousand."""


class Attempts(Strict):
    """One driver's file. Times are seconds since 1970; ``running`` gives each shard in flight the
    time when its attempt began, ``rate`` is of samples a second over the last minutes."""

    format: int = 1
    run: str
    began: float
    updated: float
    ended: str = ""
    engine: str
    workers: int
    shards: int
    made: int = 0
    samples: int = 0
    rate: float = 0.0
    retries: int = 0
    running: dict[int, float] = Field(default_factory=dict)
    failed: dict[int, str] = Field(default_factory=dict)

    def alive(self, now: float) -> bool:
        """Whether the driver runs, as far as its file says."""
        return not self.ended and now - self.updated < LOST_AFTER * HEARTBEAT_S


def new_run(now: float | None = None) -> str:
    """A name for a driver's run: sorted by time, never twice."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now if now is not None else time.time()))
    return f"{stamp}-{secrets.token_hex(4)}"


def write_attempts(out: PathOrUrl, attempts: Attempts) -> None:
    """Write a driver's file, whole or not at all. Raises ``OSError`` where that cannot be."""
    shards.write_json(out, f"{ATTEMPTS}/{attempts.run}.json", attempts.model_dump(mode="json"))


def read_attempts(out: PathOrUrl) -> list[Attempts]:
    """Every driver's file, oldest first; one that is not readable as such is left out."""
    folder = open_folder(out).below(ATTEMPTS)
    try:
        names = sorted(name for name in folder.sizes() if name.endswith(".json"))
        files = folder.read(names, shards.MOST_INFO_BYTES)
    except NotFound:
        return []
    found = []
    for data in files:
        with suppress(ValueError):  # another version's
            found.append(Attempts.model_validate_json(data))
    return found


@dataclass
class Tally:
    """The records of a dataset, added up: memory grows with its shards, not with its samples."""

    whole: dict[int, int] = field(default_factory=dict)
    """Samples of each shard that is whole."""
    planned: int = 0
    tar_bytes: int = 0
    wrong: dict[int, str] = field(default_factory=dict)
    """Shards that are not whole though something of them is there, and why."""
    dropped: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    corpora: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    processors: Counter[str] = field(default_factory=Counter)
    mos: list[int] = field(default_factory=lambda: [0] * MOS_BINS)
    mos_sum: float = 0.0

    @property
    def samples(self) -> int:
        return sum(self.whole.values())

    def add(self, record: ShardRecord) -> None:
        self.whole[record.shard] = record.samples
        self.planned += record.planned
        self.tar_bytes += record.tar_bytes
        self.dropped.update(drop["reason"] for drop in record.dropped)
        self.licences.update(record.licences)
        self.corpora.update(record.summary.corpora)
        self.languages.update(record.summary.languages)
        self.processors.update(record.summary.processors)
        self.mos = [a + b for a, b in zip(self.mos, record.summary.mos, strict=True)]
        self.mos_sum += record.summary.mos_sum


def load(out: PathOrUrl, dataset_hash: str, planned: Iterable[int]) -> Tally:
    """Read all records of a folder, each held to this dataset, to its tar's size and to the samples
    that are ``planned`` for its shard (shard k's at position k)."""
    found, tally, expected = shards.read_ledger(out), Tally(), list(planned)
    for shard in found.numbers:
        wanted = expected[shard] if shard < len(expected) else 0
        if problem := found.problem(shard, dataset_hash, wanted):
            tally.wrong[shard] = problem
        else:
            tally.add(found.records[shard])
    return tally


# --- made again ----------------------------------------------------------------------------------


def again(job: Job) -> Job:
    """The same job, but only its shards with dropped samples or a failed attempt, made again.

    Tars without a record, and what drivers that are gone had in flight, are failed attempts too.
    """
    ledger = shards.read_ledger(job.out)
    dropped = {number for number, record in ledger.records.items() if record.dropped}
    whole = {shard for shard in range(job.shard_count) if job.is_whole(shard, ledger)}
    gone = [run for run in read_attempts(job.out) if not run.alive(time.time())]
    cut_short = {shard for run in gone for shard in (*run.running, *run.failed)}
    attempts = (cut_short | set(ledger.uncommitted) | set(ledger.wrong)) - whole
    chosen = frozenset((dropped | attempts) & set(range(job.shard_count)))
    print(f"{len(dropped)} shards with dropped samples, {len(attempts)} with failed attempts")
    return replace(job, again=chosen, only=chosen if job.only is None else chosen & job.only)
