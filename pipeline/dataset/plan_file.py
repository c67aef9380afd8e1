"""Plan samples without making audio, as parquet: ``python -m pipeline plan``.

Written block by block, so that memory stays flat.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_specs.io.addresses import path_here
from data_specs.io.files import whole_file
from data_specs.recipe import load_recipe
from pipeline.dataset import job as jobs
from pipeline.dataset import prepare
from pipeline.options import parse_roots, parse_splits, recipe_option, sample_options
from pipeline.render.plan import BLOCK, Block, plan_block


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    recipe_option(parser)
    parser.add_argument("--out", type=path_here, required=True)
    sample_options(parser)


def run(options: argparse.Namespace) -> int:
    """Plan, write, and say how long it took."""
    recipe = load_recipe(options.recipe)
    prepare.require_samples(options.samples)
    roots = parse_roots(options.corpus, recipe)
    splits = parse_splits(options.split, list(recipe.sources.present()))
    identity = {"splits": prepare.resolve_splits(recipe, splits)}
    manifests = prepare.scan_all(recipe, roots)
    for manifest in manifests.values():
        print(manifest.summary())
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
        return names_by_index(column, [option.use.kind for option in stages[name].choices])
    role = {"room.file": "rooms", "noise.file": "noise"}.get(name)
    if role:
        return names_by_index(column, job.tables[role].path if role in job.tables else [])
    if name == "speech.file":
        spoken = job.tables["speech"].path
        voices = job.tables["voices"].path if "voices" in job.tables else ()
        index = column + np.where(block["voice"], len(spoken), 0)
        return names_by_index(index, [*spoken, *voices])
    return pa.array(column)


def names_by_index(index: np.ndarray, names: Sequence[str] | np.ndarray) -> pa.Array:
    """Names by their index, of -1 null. Only those that occur are written: a corpus of a million
    files would otherwise be written out with every block."""
    named = np.array([*names, None], dtype=object)[index]
    return pa.array(named, pa.string()).dictionary_encode()
