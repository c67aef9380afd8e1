"""Several outputs of one recipe as one dataset. ``python -m pipeline merge A B --out C``.

Outputs of one recipe have the same hash and the same shards by number: parts of a job that wrote to
different folders, or ranges of it. Their tars are linked where they lie on one disk, copied by the
store where they are in one, else copied through here and held to their record's hash. Nothing is
made: what no input has is named. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from data_specs.io.addresses import PathOrUrl, path_or_url, shown
from data_specs.io.errors import UserError
from data_specs.io.storage import LocalFolder, RemoteFolder, copy, open_folder
from data_specs.sample import shard_name
from data_specs.strict import differences
from pipeline.dataset import description, shards
from pipeline.dataset import job as jobs
from pipeline.dataset.card import write_card
from pipeline.dataset.shards import Ledger, ShardError


def merge(inputs: Sequence[PathOrUrl], out: PathOrUrl) -> jobs.Job:
    """Put every whole shard of ``inputs`` into ``out``.

    Raises ``WrongDataset`` naming what differs where they are not of one recipe, ``ShardError``
    where two have different content under one number.
    """
    if any(description.same_location(out, one) for one in inputs):
        raise UserError(f"--out {shown(out)} is one of the inputs: give another folder")
    found = [description.reopen(one, {}) for one in inputs]
    job = replace(found[0], out=out, samples=max(one.samples for one in found))
    for other in found[1:]:
        if other.identity != job.identity:
            differ = differences(job.identity, other.identity, between=("in the first", "here"))
            raise description.WrongDataset(
                f"{shown(other.out)} is not of the recipe of {shown(inputs[0])}; what differs: "
                + "; ".join(differ)
            )
    description.open_folder(job)
    with description.writing(out):
        ledgers = [shards.read_ledger(one.out) for one in found]
        there, target = shards.read_ledger(out), job.folder
        for shard, source in sorted(_chosen(job, found, ledgers).items()):
            if not job.is_whole(shard, there):
                _take(shard, open_folder(found[source].out), ledgers[source], target)
        description.require_ours(job)
        write_card(job)
    return job


def _chosen(job: jobs.Job, found: Sequence[jobs.Job], ledgers: Sequence[Ledger]) -> dict[int, int]:
    """Which input each shard is taken from: the one that has most of it."""
    chosen: dict[int, int] = {}
    for source, ledger in enumerate(ledgers):
        for shard, record in ledger.records.items():
            if ledger.problem(shard, job.dataset_hash, record.planned):
                continue
            best = chosen.setdefault(shard, source)
            other = ledgers[best].records[shard]
            if other.planned == record.planned and other.tar_sha256 != record.tar_sha256:
                raise ShardError(
                    f"{shard_name(shard)}: {shown(found[best].out)} and {shown(found[source].out)} "
                    "have different content; run `verify --deep` on both, and remove the record of "
                    "the one that is not to be taken"
                )
            if record.planned > other.planned:
                chosen[shard] = source
    return chosen


def _take(
    shard: int,
    source: LocalFolder | RemoteFolder,
    ledger: Ledger,
    target: LocalFolder | RemoteFolder,
) -> None:
    """A shard's tar, and only then its record."""
    name, record = shard_name(shard), ledger.records[shard]
    target.remove(f"{name}.json")
    if isinstance(source, LocalFolder) == isinstance(target, LocalFolder):
        copy(f"{name}.tar", source, target)
    else:
        with source.open(f"{name}.tar") as file, target.writing(f"{name}.tar") as new:
            hashing = shards.HashingFile(new)
            while block := file.read(1 << 20):
                hashing.write(block)
            if hashing.digest.hexdigest() != record.tar_sha256:
                where = source.shown(f"{name}.tar")
                raise ShardError(f"{where}: content differs from its record's hash: corrupted")
    copy(f"{name}.json", source, target)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("inputs", nargs="+", type=path_or_url, metavar="DATASET")
    parser.add_argument("--out", type=path_or_url, required=True, metavar="DIR")


def run(options: argparse.Namespace) -> int:
    """``python -m pipeline merge A B --out C``. Exit status 1 where a shard is in no input."""
    job = merge(options.inputs, options.out)
    missing = job.todo()
    print(f"{shown(job.out)}: {job.shard_count - len(missing)} of {job.shard_count} shards merged")
    if missing:
        print(
            f"{len(missing)} shards are whole in no input, such as {shard_name(missing[0])}: run "
            f"`python -m pipeline shards ... --samples {job.samples} --out {shown(job.out)}`"
        )
    return 1 if missing else 0
