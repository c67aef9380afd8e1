"""Offline data generation: folders of audio to pseudo-labelled WebDataset shards."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_specs.cluster.needs import (
    parse_part,
)
from data_specs.io.files import whole_file
from data_specs.io.names import visible
from data_specs.io.walk import first_of_each_kind
from data_specs.recipe import load_recipe
from pipeline.dataset import job as jobs
from pipeline.dataset import replay, verify
from pipeline.dataset import retry as failures
from pipeline.engine.carry_out import finish_parts, make
from pipeline.options import (
    corpus_places,
    machines,
    parse_beside,
    parse_roots,
    parse_splits,
    teacher_actors,
)
from pipeline.render import label
from pipeline.render.plan import BLOCK, Block, plan_block


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
    """Make a dataset, or several splits; done shards are kept, so that running it again goes on."""
    actors = teacher_actors(options, options.teacher_device or options.device)
    part, recipe = parse_part(options.part), load_recipe(options.recipe)
    splits = parse_splits(options.split, list(recipe.sources.present()))
    roots, further = parse_roots(options.corpus, recipe), parse_beside(options.beside)
    outs = [("--out", options.out), *(("--and", one.out) for one in further)]
    at = machines(options, [*outs, *corpus_places(roots)])
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
    roles = list(recipe.sources.present())
    wanted = [
        job,
        *(
            jobs.beside(job, one.out, one.samples, dict.fromkeys(roles, one.split))
            for one in further
        ),
    ]
    if options.retry_failed:
        wanted = [failures.again(one) for one in wanted]
    return make(wanted, options, actors, part, at)


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
    "verify": verify.verify,
    "finish": finish_parts,
    "replay": replay.replay,
}
