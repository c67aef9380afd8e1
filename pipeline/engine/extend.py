"""A dataset grows: by more samples, or by more recordings. ``python -m pipeline extend DATASET``.

With the dataset's own corpora, samples are added to it under the next indices: byte for byte what
one run of the larger number makes (a last shard that was short is made again). With more
recordings, and ``--out``, a new version is made: its own hash, the old shards as they are, and from
the next shard on samples drawn from the larger corpora. Interrupted, it goes on where it was: run
the same command again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from data_specs.io.addresses import PathOrUrl, path_or_url, shown
from data_specs.io.errors import UserError
from data_specs.io.options import add_options
from data_specs.io.storage import copy, open_folder
from data_specs.sample import shard_name
from pipeline import options as verb_options
from pipeline.corpora.manifest import Manifest
from pipeline.dataset import description, prepare, shards
from pipeline.dataset import job as jobs
from pipeline.engine.base import EngineOptions
from pipeline.engine.run import make


def extended(dataset: PathOrUrl, options: argparse.Namespace) -> jobs.Job:
    """The job that makes what a dataset lacks of ``--samples``, or its new version.

    Raises ``ValueError`` (and kin) where there is nothing to add, or the corpora are others and no
    ``--out`` is given.
    """
    old = description.reopen(dataset, {})
    old = replace(old, roots=verb_options.parse_roots(options.corpus, old.recipe))
    if options.samples < old.samples:
        raise UserError(
            f"--samples {options.samples}: {shown(dataset)} has {old.samples} already; --samples "
            "is how many it shall have in all"
        )
    found = prepare.scan_all(old.recipe, old.roots, old.manifests)
    changed = [n for n, m in found.items() if m.sha256 != old.identity["corpora"].get(n)]
    out = options.out or dataset
    if not changed and description.same_location(out, dataset):
        _require_adopted(old)
        return _prepared(old, found, dataset, options, old.identity.get("derived_from"))
    if description.same_location(out, dataset):
        raise description.WrongDataset(
            f"{shown(dataset)}: corpus {', '.join(changed)} is not the one that it was made from, "
            "and a dataset grows by samples of its own; for a new version with more recordings "
            "give --out NEW"
        )
    if not changed:
        raise UserError(f"--out {shown(out)}: no corpus has anything new; leave --out away")
    return _version(old, found, out, options)


def _version(
    old: jobs.Job, found: dict[str, Manifest], out: PathOrUrl, options: argparse.Namespace
) -> jobs.Job:
    """Open ``out`` as a dataset that begins with the shards of ``old``, and put them there."""
    if old.samples % old.recipe.shard_samples:
        full = -(-old.samples // old.recipe.shard_samples) * old.recipe.shard_samples
        raise UserError(
            f"{shown(old.out)}: its last shard is short; fill it first: python -m pipeline extend "
            f"{shown(old.out)} --samples {full}"
        )
    if options.samples <= old.samples:
        raise UserError(f"--samples {options.samples}: must be more than the {old.samples} there")
    for name, manifest in found.items():
        _require_superset(name, old.manifests[name], manifest)
    old.require_whole()
    origin = {
        "dataset_hash": old.dataset_hash,
        "samples": old.samples,
        "corpora": old.identity["corpora"],
    }
    if earlier := old.identity.get("derived_from"):
        origin["derived_from"] = earlier
    job = _prepared(old, found, out, options, origin)
    adopt(old, job)
    return job


def _require_adopted(job: jobs.Job) -> None:
    """Shards that came from an earlier version were drawn from its recordings: made here they would
    be others."""
    of_earlier = job.first_own_sample // job.recipe.shard_samples
    if lost := [shard for shard in job.missing() if shard < of_earlier]:
        names = ", ".join(shard_name(shard) for shard in lost[:5])
        raise description.WrongDataset(
            f"{shown(job.out)}: {len(lost)} shards of the version that it came from are missing "
            f"({names}); bring them back first: python -m pipeline extend EARLIER --out "
            f"{shown(job.out)} --samples {job.samples} --corpus ..."
        )


def _require_superset(name: str, before: Manifest, now: Manifest) -> None:
    """Old samples name their recordings by folder number and path: those must stay."""
    columns = ["root", "path", "frames", "size_bytes"]
    old, new = (
        {tuple(row.values()) for row in manifest.usable.select(columns).to_pylist()}
        for manifest in (before, now)
    )
    if gone := sorted(old - new):
        raise UserError(
            f"corpus {name!r}: {len(gone)} recordings of the dataset are not there, such as "
            f"{gone[0][1]}: a version only adds; give its folders first, in their order, and the "
            "new ones behind"
        )


def _prepared(
    old: jobs.Job,
    found: dict[str, Manifest],
    out: PathOrUrl,
    options: argparse.Namespace,
    origin: dict[str, Any] | None,
) -> jobs.Job:
    return prepare.prepare(
        old.recipe,
        old.roots,
        out,
        options.samples,
        old.identity["splits"],
        options.device,
        time_limit_s=options.time_limit,
        teacher_device=options.teacher_device,
        derived_from=origin,
        manifests=found,
        assigned={role: old.assigned(role) for role in old.recipe.sources.present()},
    )


def adopt(old: jobs.Job, job: jobs.Job) -> None:
    """Put the shards of ``old`` into ``job``'s folder: their tars as they are, linked or copied,
    and then each a record that says whose it is now."""
    there, ledger = shards.read_ledger(job.out), shards.read_ledger(old.out)
    source, target = open_folder(old.out), job.folder
    for shard in range(old.shard_count):
        if not job.is_whole(shard, there):
            name = shard_name(shard)
            copy(f"{name}.tar", source, target)
            record = ledger.records[shard].model_copy(update={"dataset_hash": job.dataset_hash})
            shards.write_json(job.out, f"{name}.json", record.model_dump(mode="json"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("dataset", type=path_or_url, help="a folder, or its address")
    parser.add_argument("--samples", type=int, required=True, help="how many it shall have in all")
    parser.add_argument(
        "--out", type=path_or_url, metavar="DIR", help="the new version, with more recordings"
    )
    verb_options.corpus_option(parser)
    add_options(parser, EngineOptions)
    add_options(parser, verb_options.WorkerOptions)


def run(options: argparse.Namespace) -> int:
    """``python -m pipeline extend DATASET --samples N [--out NEW]``; exit status as ``shards``."""
    device = options.teacher_device or options.device
    how = verb_options.engine_options(options, device, _places(options))
    return make([extended(options.dataset, options)], how)


def _places(options: argparse.Namespace) -> list[tuple[str, PathOrUrl]]:
    """What every machine of a cluster must find under the same name."""
    recipe = description.reopen(options.dataset, {}).recipe
    out = [("--out", options.out)] if options.out else []
    corpora = verb_options.corpus_places(verb_options.parse_roots(options.corpus, recipe))
    return [("DATASET", options.dataset), *out, *corpora]
