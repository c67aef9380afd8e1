"""Hold a dataset to its records: ``python -m pipeline verify``."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from data_specs.io.addresses import PathOrUrl, path_or_url, shown
from data_specs.io.cli import cancelled_early
from data_specs.sample import parse_sample
from pipeline.dataset import description, shards
from pipeline.dataset import job as jobs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("dataset", type=path_or_url, help="a folder, or its address")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--deep", action="store_true", help="decode all audio and compare hashes")
    how.add_argument(
        "--quick", action="store_true", help="only the listing and the records: no tar is read"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="shards at a time (default 1)"
    )
    parser.add_argument(
        "--apart-from",
        type=path_or_url,
        metavar="DATASET",
        help="also check that the two share no speaker, recording, noise or room",
    )


def run(options: argparse.Namespace) -> int:
    """Hold every shard to its record, ``--deep`` the description too; exit status 1 where anything
    is wrong."""
    job = description.reopen(options.dataset, {}, check=False)
    count = wrong = 0
    with closing(_verified(job, options)) as checked:
        for lines in checked:
            count += 1
            wrong += bool(lines)
            for line in lines:
                print(line)
    print(f"{shown(options.dataset)}: {count - wrong} of {count} shards are whole")
    more = list(description.description_problems(job)) if options.deep else []
    more += _shared(job, options.apart_from) if options.apart_from else []
    for line in more:
        print(line)
    return 1 if wrong or more else 0


def _verified(job: jobs.Job, options: argparse.Namespace) -> Generator[list[str], None, None]:
    """What is wrong with each shard, in their order: that there is, or that there should be."""
    if options.quick:
        ledger = shards.read_ledger(job.out)
        for shard in sorted({*range(job.shard_count), *ledger.numbers}):
            planned = len(job.shard_range(shard))
            yield shards.ledger_problems(job.out, ledger, shard, job.dataset_hash, planned)
        return

    def check(shard: int) -> list[str]:
        rows = job.shard_range(shard)
        return shards.verify_shard(job.out, shard, job.dataset_hash, rows, options.deep)

    # Threads: reading, hashing and decoding leave the interpreter free, and nothing is loaded anew.
    with cancelled_early(ThreadPoolExecutor(max(1, options.workers))) as pool:
        yield from pool.map(check, sorted({*range(job.shard_count), *shards.find_shards(job.out)}))


def _shared(job: jobs.Job, other: PathOrUrl) -> list[str]:
    """What the samples of two datasets have in common, as lines; says so where it is nothing."""
    ours, theirs = sources(job), sources(description.reopen(other, {}))
    lines = []
    for what, used in ours.items():
        both = sorted(used & theirs[what])
        there = f"{len(theirs[what])} in {shown(other)}"
        print(f"{what}: {len(used)} here, {there}, {len(both)} in both")
        lines += [f"in both: {what} {name}" for name in both[:5]]
    return lines


def sources(job: jobs.Job) -> dict[str, set[str]]:
    """Speakers, recordings, noises and rooms that a dataset's samples were made of.

    A file is its path, length and size, so that equal names in different folders are two files.
    """
    headers = {
        (name, row["root"], row["path"]): f"{row['path']} ({row['frames']}, {row['size_bytes']})"
        for name, manifest in job.manifests.items()
        for row in manifest.usable.to_pylist()
    }
    found: dict[str, set[str]] = {"speaker": set(), "speech": set(), "noise": set(), "room": set()}
    for shard in shards.find_shards(job.out):
        tar = shards.shown_tar(job.out, shard)
        for key, _, data in shards.samples_of(job.out, shard):
            plan = parse_sample(data, f"{tar}: {key}.json").plan
            found["speaker"].add(plan["speech"]["speaker"])
            for part in ("speech", "noise", "room"):
                if plan[part]:
                    file = plan[part]
                    found[part].add(headers[file["corpus"], file["root"], file["path"]])
    return found
