"""Make samples again from their own records: ``python -m pipeline replay``."""

from __future__ import annotations

import argparse
import re

from data_specs.io.addresses import path_here, path_or_url
from data_specs.io.errors import UserError
from data_specs.io.files import whole_file
from data_specs.io.storage import NotFound
from data_specs.sample import SampleRecord, parse_sample
from data_specs.strict import checked
from pipeline.audio import encode_flac, pcm_sha256
from pipeline.dataset import description, shards
from pipeline.dataset import job as jobs
from pipeline.options import corpus_option, outside_option, parse_roots
from pipeline.render.plan import SamplePlan
from pipeline.render.processors import runtime
from pipeline.render.processors.runtime import Runtime
from pipeline.render.render import Rendered, Roots, render_group, require_below


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("keys", nargs="+", metavar="KEY")
    parser.add_argument("--dataset", type=path_or_url, required=True)
    parser.add_argument(
        "--out", type=path_here, help="folder for the audio (default: compare only)"
    )
    outside_option(parser)
    corpus_option(parser)


def run(options: argparse.Namespace) -> int:
    """Make samples again from their records and compare the audio, bit for bit."""
    job = description.reopen(options.dataset, {})
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
    if plan.index < (since := job.first_own_sample):
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
