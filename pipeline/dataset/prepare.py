"""Prepare a job: check everything that can be checked before work starts, and open its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_specs.corpus import find_corpus
from data_specs.io.addresses import PathOrUrl, shown
from data_specs.io.errors import UserError
from data_specs.recipe import Recipe
from data_specs.strict import unknown
from pipeline.corpora.manifest import CorpusError, Manifest, exceptions, scan, split_of
from pipeline.dataset import shards
from pipeline.dataset.description import NOT_DATA, known_manifests, open_folder, read_dataset
from pipeline.dataset.job import Job
from pipeline.render import label
from pipeline.render.guard import TIME_LIMIT_S, Guard
from pipeline.render.plan import PLAN_VERSION
from pipeline.render.processors import self_check, versions, weights_sha256
from pipeline.render.processors.runtime import Runtime
from pipeline.render.render import RENDER_VERSION, Roots


def prepare(
    recipe: Recipe,
    roots: Roots,
    out: PathOrUrl,
    samples: int,
    splits: dict[str, str] | None = None,
    device: str = "cpu",
    time_limit_s: float = TIME_LIMIT_S,
    teacher_device: str = "",
    derived_from: dict[str, Any] | None = None,
    manifests: dict[str, Manifest] | None = None,
    assigned: Mapping[str, Mapping[str, str]] | None = None,
) -> Job:
    """Check everything that can be checked before work starts, and open the output folder.

    Raises ``ValueError`` (and kin) for a corpus without folder, a processor or teacher that cannot
    run, an output folder that holds another dataset, and ``OSError`` for one that cannot be
    written. ``derived_from`` says whose samples come first (``extend``); it is part of the hash.
    ``manifests`` are given where the corpora were scanned already, and ``assigned`` are the splits
    of groups, by role, that stay where they are.
    """
    require_samples(samples)
    check_processors(recipe, device, time_limit_s)
    before = read_dataset(out)
    if manifests is None:
        manifests = scan_all(recipe, roots, known_manifests(out, before))
    teacher = label.identify(recipe.teacher, teacher_device or device)
    identity = identity_of(recipe, manifests, splits or {}, teacher.weights_sha256)
    if before is None or "assigned" in before["identity"]:  # an older folder's are found anew
        identity["assigned"] = _assigned(recipe, manifests, assigned or {})
    if derived_from:
        identity["derived_from"] = derived_from
    calibration = label.calibration(teacher)
    job = Job(recipe, identity, samples, out, roots, device, time_limit_s, manifests)
    job = replace(job, teacher_device=teacher_device, teacher_calibration=calibration)
    _ = job.tables  # an empty split is refused now, not by a worker
    open_folder(job)
    return job


def beside(job: Job, out: PathOrUrl, samples: int, splits: dict[str, str]) -> Job:
    """The job of another split of the same recipe and corpora, in a folder of its own.

    It is what ``prepare`` gives for it, but nothing is checked or scanned again. Raises as that.
    """
    require_samples(samples)
    identity = job.identity | {"splits": resolve_splits(job.recipe, splits)}
    before = read_dataset(out)
    if before is not None and "assigned" not in before["identity"]:  # an older folder
        identity.pop("assigned", None)
    other = replace(job, identity=identity, samples=samples, out=out)
    _ = other.tables  # an empty split is refused now, not by a worker
    open_folder(other)
    return other


def check_processors(recipe: Recipe, device: str, time_limit_s: float = TIME_LIMIT_S) -> None:
    """Run the recipe's processors once as a worker will, in a child that is closed afterwards.

    Raises ``SelfCheckError`` naming each that cannot run, also where it crashes or hangs.
    """
    import torch

    # A machine that only drives a cluster may have no GPU: there the check runs on its CPU.
    here = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    with Guard(Runtime(here, recipe.precision), time_limit_s) as guard:
        self_check(recipe, guard.run)


def require_samples(samples: int) -> None:
    """Raise ``ValueError`` for fewer than one sample."""
    if samples < 1:
        raise UserError(f"--samples must be at least 1, not {samples}")


def scan_all(
    recipe: Recipe,
    roots: Roots,
    known: Mapping[str, Manifest] | None = None,
) -> dict[str, Manifest]:
    """The manifests of the recipe's corpora. Raises ``CorpusError`` for a missing folder.

    Files that are as they are in ``known`` are not opened again.
    """
    names = {source.corpus for source in recipe.sources.present().values()}
    for given in map(shown, sorted(roots.keys() - names)):
        raise CorpusError(f"--corpus {given}: {unknown('corpus', given, names)}")
    known, where = known or {}, f"recipe {recipe.name!r}"
    return {
        name: scan(name, find_corpus(name, where), roots.get(name, []), known.get(name))
        for name in sorted(names)
    }


def _assigned(
    recipe: Recipe, manifests: Mapping[str, Manifest], stay: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """By role, the groups that are not in the split of their hash: kept, they never move."""
    found = {}
    for role, source in recipe.sources.present().items():
        groups = manifests[source.corpus].groups()
        split = split_of(groups, source.holdout, stay.get(role))
        found[role] = exceptions(split, source.holdout)
    return found


def identity_of(
    recipe: Recipe, manifests: dict[str, Manifest], splits: dict[str, str], teacher_sha256: str
) -> dict[str, Any]:
    """What a dataset's hash is made of: everything that changes a sample."""
    return {
        "format": shards.FORMAT,
        "plan_version": PLAN_VERSION,
        "render_version": RENDER_VERSION,
        "recipe": recipe.model_dump(mode="json", exclude=NOT_DATA),
        "corpora": {name: manifest.sha256 for name, manifest in manifests.items()},
        "splits": resolve_splits(recipe, splits),
        "teacher_sha256": teacher_sha256,
        "processors_sha256": weights_sha256(recipe),
        "versions": versions(recipe),
    }


def resolve_splits(recipe: Recipe, splits: dict[str, str]) -> dict[str, str]:
    """The split of every role, train where none was asked for. ``ValueError`` for no such role."""
    roles = recipe.sources.present()
    for role in splits:
        if role not in roles:
            raise UserError(f"--split {role}: {unknown('role', role, roles)}")
    return {role: splits.get(role, "train") for role in roles}
