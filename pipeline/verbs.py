"""Offline data generation: folders of audio to pseudo-labelled WebDataset shards."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_specs.cluster.needs import (
    EVERY,
    Part,
    parse_address,
    parse_part,
    parse_stage,
    require_everywhere,
)
from data_specs.io.addresses import Place, place, shown
from data_specs.io.cli import cancelled_early
from data_specs.io.errors import UserError
from data_specs.io.files import whole_file
from data_specs.io.hardware import cpus, require_device
from data_specs.io.names import visible
from data_specs.io.storage import NotFound
from data_specs.io.walk import first_of_each_kind
from data_specs.recipe import Recipe, load_recipe
from data_specs.sample import SampleRecord, parse_sample
from data_specs.strict import checked
from pipeline.audio import encode_flac
from pipeline.dataset import job as jobs
from pipeline.dataset import retry as failures
from pipeline.dataset import shards
from pipeline.dataset.card import CARD, write_card
from pipeline.engine import run
from pipeline.render import label
from pipeline.render.plan import BLOCK, Block, SamplePlan, plan_block
from pipeline.render.processors import runtime
from pipeline.render.processors.runtime import Runtime
from pipeline.render.render import Rendered, Roots, pcm_sha256, render_group, require_below

SPLITS = ("train", "validation", "test", "all")


def parse_roots(options: Sequence[str], recipe: Recipe) -> Roots:
    """Corpus folders from ``NAME=DIR`` options, else from ``CORPUS_NAME`` in the environment.

    A folder is a path or an address.
    """
    roots: Roots = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals or not folder:
            raise UserError(f"--corpus {shown(option)}: write NAME=DIR")
        roots.setdefault(name, []).append(place(folder))
    for name in {source.corpus for source in recipe.sources.present().values()} - set(roots):
        value = os.environ.get(f"CORPUS_{name.upper()}", "")
        if value:
            # Between folders, not behind an address' protocol nor before its port.
            parts = re.split(r":(?!//|\d+(?:/|$))", value)
            roots[name] = [place(folder) for folder in parts]
    return roots


def parse_splits(options: Sequence[str], roles: Sequence[str]) -> dict[str, str]:
    """Split of each role from ``SPLIT`` (all roles) and ``ROLE=SPLIT`` options."""
    splits: dict[str, str] = {}
    for option in sorted(options, key=lambda text: "=" in text):
        role, equals, split = option.rpartition("=")
        if split not in SPLITS:
            raise UserError(f"--split {option}: must be one of {', '.join(SPLITS)}")
        splits.update({role: split} if equals else dict.fromkeys(roles, split))
    return splits


def manifest(options: argparse.Namespace) -> int:
    """Scan the corpora of a recipe and write their manifests."""
    recipe = load_recipe(options.recipe)
    found = jobs.scan_all(recipe, parse_roots(options.corpus, recipe))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, corpus in found.items():
        corpus.save(options.out / f"{name}.parquet")
        print(corpus.summary())
        for line in first_of_each_kind(corpus.left_out()):
            print(visible(line))
    print(f"written to {options.out}")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Plan samples and write the plans as parquet, block by block: memory stays flat."""
    recipe = load_recipe(options.recipe)
    jobs.require_samples(options.samples)
    roots = parse_roots(options.corpus, recipe)
    splits = parse_splits(options.split, list(recipe.sources.present()))
    identity = {"splits": jobs.resolve_splits(recipe, splits)}
    manifests = jobs.scan_all(recipe, roots)
    job = jobs.Job(recipe, identity, options.samples, options.out, roots, manifests=manifests)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with whole_file(options.out) as file:
        write_plans(job, file)
    seconds = time.monotonic() - began
    print(f"{options.samples} samples planned in {seconds:.1f} s: {options.out}")
    return 0


def write_plans(job: jobs.Job, file: IO[bytes]) -> None:
    """The plans of a job's samples as parquet, block by block."""
    writer = None
    for first in range(0, job.samples, BLOCK):
        count = min(BLOCK, job.samples - first)
        block = plan_block(job.recipe, job.tables, first, count)
        table = pa.table({name: _named(job, block, name) for name in block})
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def _named(job: jobs.Job, block: Block, name: str) -> pa.Array:
    """A column of a plan with paths and kinds by name, and null where a step does not happen."""
    column = block[name]
    stages = {f"stage.{stage.stage}": stage for stage in job.recipe.all_stages()}
    if name in stages:
        return _dictionary(column, [option.use.kind for option in stages[name].choices])
    role = {"room.file": "rooms", "noise.file": "noise"}.get(name)
    if role:
        return _dictionary(column, job.tables[role].path if role in job.tables else [])
    if name == "speech.file":
        spoken, voices = job.tables["speech"].path, job.tables.get("voices")
        index = column + np.where(block["voice"], len(spoken), 0)
        return _dictionary(index, np.concatenate([spoken, voices.path]) if voices else spoken)
    return pa.array(column)


def _dictionary(index: np.ndarray, names: Sequence[str] | np.ndarray) -> pa.Array:
    """Names by their index. Only those that occur are written: a corpus of a million files would
    otherwise be written out with every block."""
    mask = index < 0
    used, place = np.unique(np.where(mask, 0, index), return_inverse=True)
    indices = pa.array(place.astype(np.int32), mask=mask)
    occurring = [names[i] for i in used] if len(names) else []
    return pa.DictionaryArray.from_arrays(indices, pa.array(occurring, pa.string()))


def make_shards(options: argparse.Namespace) -> int:
    """Make a dataset; done shards are kept, so that running it again goes on."""
    actors = teacher_actors(options, options.teacher_device or options.device)
    part, recipe = parse_part(options.part), load_recipe(options.recipe)
    splits = parse_splits(options.split, list(recipe.sources.present()))
    roots = parse_roots(options.corpus, recipe)
    at = machines(options, [("--out", options.out), *corpus_places(roots)])
    job = jobs.prepare(
        recipe,
        roots,
        options.out,
        options.samples,
        splits,
        options.device,
        time_limit_s=options.time_limit,
        teacher_device=options.teacher_device,
    )
    for manifest in job.manifests.values():
        print(manifest.summary())
    if warning := label.slow_precision(recipe.teacher, job.label_device):
        print(warning)
    if options.retry_failed:
        job = failures.again(job)
    return make(job, options, actors, part, at)


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
    with jobs.writing(job.out, part):
        try:
            outcome = work()
            return finish(job, outcome, time.monotonic() - began, part)
        except (FileNotFoundError, NotFound, jobs.WrongDataset):
            try:
                jobs.require_ours(job)
            except jobs.WrongDataset as gone:
                print(f"error: {gone}", file=sys.stderr)
                return 1
            raise


def engine_options(verb: argparse.ArgumentParser) -> None:
    """How and by how many shards are made: nothing that is data."""
    verb.add_argument("--engine", choices=("ray", "local"), default="ray")
    verb.add_argument("--workers", type=int, default=cpus())
    verb.add_argument(
        "--teacher-actors",
        type=int,
        default=0,
        metavar="N",
        help="N teachers that all of Ray's workers share, such as one for each GPU "
        "(default: every worker loads its own)",
    )
    verb.add_argument(
        "--teachers-per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="how many of them share a GPU (default %(default)s)",
    )
    verb.add_argument(
        "--ray-address",
        default="",
        metavar="auto|HOST:PORT",
        help="of a running Ray cluster (default: RAY_ADDRESS, or a Ray of its own)",
    )
    for stage in ("worker", "teacher"):
        verb.add_argument(
            f"--{stage}-needs",
            default="",
            metavar="cores=N,memory_gb=N,gpus=N",
            help=f"what Ray reserves for a {stage} (default: a core; where it computes on cuda, "
            "its share of the GPUs)",
        )
    verb.add_argument(
        "--part",
        default=str(EVERY),
        metavar="I/N",
        help="make only the I-th of N parts (from 1), beside other jobs that make the others",
    )


def teacher_actors(options: argparse.Namespace, device: str) -> run.TeacherActors:
    """What ``engine_options`` say of teachers; ``ValueError`` where it cannot be."""
    needs = parse_stage(options.teacher_needs, "--teacher-needs")
    actors = run.TeacherActors(options.teacher_actors, options.teachers_per_gpu, needs)
    actors.check(options.engine, device)
    return actors


def machines(options: argparse.Namespace, places: Sequence[tuple[str, Place]]) -> run.Machines:
    """What ``engine_options`` say of machines; ``ValueError`` where it cannot be.

    ``places`` are (flag, path) of what every machine must find under the same name.
    """
    address = parse_address(options.ray_address)
    if address and options.engine != "ray":
        raise UserError(f"--ray-address needs --engine ray, not {options.engine}")
    if options.engine == "ray" and (address or os.environ.get("RAY_ADDRESS")):
        require_everywhere([(flag, str(place)) for flag, place in places])
    else:  # the workers are here
        require_device(options.device, "--device")
        require_device(getattr(options, "teacher_device", ""), "--teacher-device")
    return run.Machines(address, parse_stage(options.worker_needs, "--worker-needs"))


def corpus_places(roots: Roots) -> list[tuple[str, Place]]:
    """Corpus folders, each with the flag that gives it."""
    return [(f"--corpus {name}", folder) for name, given in roots.items() for folder in given]


def finish(job: jobs.Job, outcome: run.Outcome, seconds: float, part: Part = EVERY) -> int:
    """Write the dataset's card and tell what a run did. Exit status 1 where a shard failed.

    Of several parts the last one to end writes the card: two that end at once write the same.
    """
    jobs.require_ours(job)
    missing = job.missing()
    rest = [] if part == EVERY else missing
    if not rest:
        write_card(job)
    _tell(job, outcome.made, outcome.skipped, seconds)
    for shard, reason in sorted(outcome.failed.items()):
        print(f"failed: {shards.shard_name(shard)}: {reason}")
    if rest:
        print(f"part {part}: {len(rest)} shards of the whole dataset are still to be made")
    if lost := sorted(set(outcome.made) & set(missing)):
        print(f"{len(lost)} shards that were made are gone, such as {shards.shard_name(lost[0])}")
    return 1 if outcome.failed or lost else 0


def finish_parts(options: argparse.Namespace) -> int:
    """Write what belongs to the whole dataset; exit status 1 where a shard is still missing."""
    job = jobs.reopen(options.dataset, {})
    rest = job.todo()
    if not rest:
        write_card(job)
        card = job.folder.shown(CARD)
        print(f"{shown(options.dataset)}: all {job.shard_count} shards are whole: {card}")
        return 0
    names = ", ".join(shards.shard_name(shard) for shard in rest[:5])
    print(
        f"{shown(options.dataset)}: {len(rest)} of {job.shard_count} shards are not whole: {names}"
    )
    if options.parts:
        behind = sorted({shard % options.parts + 1 for shard in rest})
        print(f"run these parts of {options.parts} again: {','.join(map(str, behind))}")
    return 1


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


def verify(options: argparse.Namespace) -> int:
    """Hold every shard to its record, ``--deep`` the description too; exit status 1 where anything
    is wrong."""
    job = jobs.reopen(options.dataset, {})
    count = wrong = 0
    with closing(_verified(job, options)) as checked:
        for lines in checked:
            count += 1
            wrong += bool(lines)
            for line in lines:
                print(line)
    print(f"{shown(options.dataset)}: {count - wrong} of {count} shards are whole")
    more = list(jobs.description_problems(job)) if options.deep else []
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
    numbers = sorted({*range(job.shard_count), *shards.find_shards(job.out)})
    rows = [job.shard_range(shard) for shard in numbers]
    check = partial(_verify_one, job.out, dataset_hash=job.dataset_hash, deep=options.deep)
    if options.workers < 2 or len(numbers) < 2:
        yield from map(check, numbers, rows)
        return
    # Threads: reading, hashing and decoding leave the interpreter free, and nothing is loaded anew.
    with cancelled_early(ThreadPoolExecutor(min(options.workers, len(numbers)))) as pool:
        yield from pool.map(check, numbers, rows)


def _verify_one(folder: Place, shard: int, rows: range, dataset_hash: str, deep: bool) -> list[str]:
    return shards.verify_shard(folder, shard, dataset_hash, rows, deep)


def _shared(job: jobs.Job, other: Place) -> list[str]:
    """What the samples of two datasets have in common, as lines; says so where it is nothing."""
    ours, theirs = sources(job), sources(jobs.reopen(other, {}))
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


def replay(options: argparse.Namespace) -> int:
    """Make samples again from their records and compare the audio, bit for bit."""
    job = jobs.reopen(options.dataset, {})
    roots = parse_roots(options.corpus, job.recipe)
    differ = 0
    for key in options.keys:
        record = find_sample(job, key)
        plan = checked(SamplePlan, record.plan, f"{key}.json: plan")
        rendered = _again(job, plan, roots, options.allow_outside)
        if rendered.pcm is None:
            raise UserError(f"{key}: {rendered.reason}: {rendered.detail}")
        same = pcm_sha256(rendered.pcm) == record.pcm_sha256
        differ += not same
        print(f"{key}: {'the same audio' if same else 'DIFFERENT audio'}, mos {record.mos:.3f}")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            with whole_file(options.out / f"{key}.flac") as file:
                file.write(encode_flac(rendered.pcm))
    return 1 if differ else 0


def _again(job: jobs.Job, plan: SamplePlan, roots: Roots, outside: bool) -> Rendered:
    """Make a sample again beside those of its group: a batch's size may move a network's output in
    its last bits."""
    if plan.index < (since := jobs.first_own_sample(job.identity)):
        raise UserError(
            f"{plan.key}: samples before {since} are of the dataset that this one was derived "
            "from, and its corpora: replay it there"
        )
    runtime.use(Runtime("cpu", job.recipe.precision))
    shard = plan.index // job.recipe.shard_samples
    if plan.index >= job.samples:
        raise UserError(f"{plan.key}: the dataset has {job.samples} samples: its record is damaged")
    group = next(rows for rows in job.groups(shard) if plan.index in rows)
    plans = [plan if p.index == plan.index else p for p in job.plans(group)]
    if not outside:
        require_below(plans, roots)
    return render_group(plans, roots)[plans.index(plan)]


def find_sample(job: jobs.Job, key: str) -> SampleRecord:
    """The record of a sample, looked up in its shard. ``ShardError`` where it is not there."""
    if not re.fullmatch("[0-9]{1,9}", key):
        raise UserError(f"{key!r} is no sample key; keys are numbers such as 000000123")
    shard = int(key) // job.recipe.shard_samples
    tar = shards.shown_tar(job.out, shard)
    try:
        for found, _, data in shards.samples_of(job.out, shard):
            if int(found) == int(key):
                return parse_sample(data, f"{tar}: {found}.json")
    except NotFound:
        raise shards.ShardError(f"{tar}: no such shard; sample {key} would be in it") from None
    raise shards.ShardError(f"{tar}: sample {key} is not in it; it may have been dropped")


def delegate(verb: str, argv: Sequence[str]) -> int:
    """Run a verb that has its own options, imported only when asked for."""
    return int(importlib.import_module(OWN_OPTIONS[verb]).main(argv) or 0)


OWN_OPTIONS = {
    "status": "pipeline.engine.status",
    "estimate": "pipeline.cluster.estimate",
    "card": "pipeline.dataset.card",
    "relabel": "pipeline.dataset.relabel",
    "extend": "pipeline.dataset.extend",
    "merge": "pipeline.dataset.merge",
    "preview": "pipeline.dataset.preview",
    "corpora": "pipeline.corpora.synthetic",
    "speak": "pipeline.corpora.speak",
    "rooms": "pipeline.corpora.rooms",
    "weights": "pipeline.corpora.weights",
    "submit": "pipeline.cluster.submit",
}
"""Verbs with a parser of their own, and where it is."""


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "manifest": manifest,
    "plan": plan,
    "shards": make_shards,
    "verify": verify,
    "finish": finish_parts,
    "replay": replay,
}
