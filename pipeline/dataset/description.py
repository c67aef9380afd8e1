"""What a dataset folder says of itself: ``dataset.json``, and the manifests beside it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, Field

from data_specs.cluster.needs import EVERY, Part
from data_specs.io import storage
from data_specs.io.addresses import PathOrUrl, shown
from data_specs.io.errors import UserError
from data_specs.io.files import LOCK_FILE, one_at_a_time, only_writer, remove_leftovers
from data_specs.io.parse import json_object
from data_specs.recipe import Recipe
from data_specs.sample import DATASET_FILE
from data_specs.strict import checked, differences, digest
from pipeline.corpora.manifest import CorpusError, Manifest
from pipeline.dataset import shards
from pipeline.dataset.job import CLIP_HOURS, Job
from pipeline.dataset.shards import MOST_INFO_BYTES, ShardError, write_json
from pipeline.render.render import Roots

NOT_DATA = {"about", "max_dropped_share", "allow_noncommercial"}
"""Fields of a recipe that change no sample."""

DESCRIPTION_LOCK = f"{LOCK_FILE}.{DATASET_FILE}"
"""Held while a folder is looked at and described: of two recipes begun together one is refused."""

FIELDS = {
    **{"identity": dict, "recipe": dict, "recipe_hash": str, "samples": int},
    **{"manifests_sha256": dict, "teacher_calibration_sha256": str},
}
"""What every ``dataset.json`` has: the last two are of what its identity does not cover."""


Folder = storage.LocalFolder | storage.RemoteFolder


class WrongDataset(ShardError):
    """A folder holds another dataset than the one that is asked for."""


class Identity(BaseModel):
    """What is read of ``dataset.json``'s identity; whatever else it has counts in its hash."""

    splits: dict[str, str]
    teacher_sha256: str
    corpora: dict[str, str] = {}
    versions: dict[str, str] = {}
    assigned: dict[str, dict[str, str]] | None = None
    derived_from: dict[str, Any] | None = None


class Description(BaseModel):
    """What is read of ``dataset.json``."""

    recipe: Recipe
    identity: Identity
    samples: Annotated[int, Field(ge=1, lt=10**9, strict=True)]  # keys have nine digits
    teacher_calibration: dict[str, Any] | None = None


def read_dataset(out: PathOrUrl) -> dict[str, Any] | None:
    """Read ``dataset.json`` of a folder, or none. Raises ``ShardError`` where it is not one."""
    folder = storage.open_folder(out)
    path = folder.shown(DATASET_FILE)
    try:
        value = json_object(folder.read([DATASET_FILE], MOST_INFO_BYTES)[0], path)
    except storage.NotFound:
        return None
    for name, kind in FIELDS.items():
        if not isinstance(value.get(name), kind):
            raise ShardError(f"{path}: not a dataset description of this version: no {name!r}")
    return value


def require_dataset(out: PathOrUrl) -> dict[str, Any]:
    """As ``read_dataset``; ``ShardError`` where there is none."""
    found = read_dataset(out)
    if found is None:
        raise ShardError(f"{shown(out)}: no {DATASET_FILE}: not a dataset folder")
    return found


def reopen(out: PathOrUrl, roots: Roots, check: bool = True) -> Job:
    """Make the job of an existing dataset folder, from what the folder itself says.

    Raises ``UserError`` where it says nothing that can be used and, unless ``check`` is False,
    ``WrongDataset`` where a manifest is not the one that it was made from.
    """
    found, folder = require_dataset(out), storage.open_folder(out)
    described = checked(Description, found, folder.shown(DATASET_FILE))
    names = {source.corpus for source in described.recipe.sources.present().values()}
    manifests = {name: Manifest.load(name, folder, manifest_file(name)) for name in names}
    job = Job(described.recipe, found["identity"], described.samples, out, roots)
    job = replace(job, manifests=manifests, teacher_calibration=described.teacher_calibration)
    if check and (wrong := list(changed_manifests(job, found))):
        raise WrongDataset("\n".join(wrong))
    return job


def same_location(one: PathOrUrl, other: PathOrUrl) -> bool:
    """Whether two spellings are one folder."""
    if isinstance(one, str) or isinstance(other, str):
        return str(one).rstrip("/") == str(other).rstrip("/")
    return one.exists() and other.exists() and one.samefile(other)


def manifest_file(corpus: str) -> str:
    """Name the file of a corpus' manifest in a dataset's folder."""
    return f"manifests/{corpus}.parquet"


# --- what was changed -----------------------------------------------------------------------------


def description_problems(job: Job) -> Iterator[str]:
    """Say what is wrong with ``dataset.json`` and the manifests; ``job`` is ``reopen``'s."""
    where, found = job.folder.shown(DATASET_FILE), require_dataset(job.out)
    free = {key: value for key, value in found["recipe"].items() if key in NOT_DATA}
    expected = {"derived_from": None} | _description(job, found["manifests_sha256"])
    expected["recipe"] = free | job.identity["recipe"]
    expected["teacher"] = job.identity["recipe"]["teacher"]["name"]
    stated = {key: found.get(key) for key in expected}
    for line in differences(stated, expected, between=("there", "by what is hashed")):
        yield f"{where}: was changed: {line}"
    yield from changed_manifests(job, found)


def changed_manifests(job: Job, described: Mapping[str, Any]) -> Iterator[str]:
    """Say which of a reopened job's manifests are not the ones that its dataset was made from."""
    for name, manifest in sorted(job.manifests.items()):
        if _is_changed(job.folder, manifest, described):
            yield (
                f"{job.folder.shown(manifest_file(name))}: was changed: bring back the one that "
                "the dataset was made with, or run the command that made the dataset again"
            )


def _is_changed(folder: Folder, manifest: Manifest, described: Mapping[str, Any]) -> bool:
    """Whether a manifest's files, or its bytes, are others than those stated."""
    corpora = described["identity"].get("corpora")
    if corpora is not None and manifest.sha256 != corpora.get(manifest.name):
        return True
    return bool(_sha256(folder, manifest.name) != described["manifests_sha256"].get(manifest.name))


def _sha256(folder: Folder, corpus: str) -> str:
    with folder.open(manifest_file(corpus)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def known_manifests(out: PathOrUrl, described: Mapping[str, Any] | None) -> dict[str, Manifest]:
    """Load the manifests in a dataset's folder that are the ones which it was made from.

    Says of each other one that its corpus is scanned again.
    """
    found, folder = {}, storage.open_folder(out)
    for name in described["identity"].get("corpora", {}) if described else ():
        try:
            found[name] = Manifest.load(name, folder, manifest_file(name))
            if _is_changed(folder, found[name], described or {}):
                raise CorpusError(f"{folder.shown(manifest_file(name))}: was changed")
        except CorpusError as error:
            found.pop(name, None)
            print(f"warning: {error}; corpus {name!r} is scanned again", file=sys.stderr)
    return found


# --- writing --------------------------------------------------------------------------------------


def writing(out: PathOrUrl, part: Part = EVERY) -> AbstractContextManager[None]:
    """Hold a dataset's folder while a command makes the whole of it, or a part of it.

    Parts are made side by side; ``UserError`` where another command makes the same one. At an
    address nothing is held: there two make the same bytes twice.
    """
    folder = storage.open_folder(out)
    if not isinstance(folder, storage.LocalFolder):
        return nullcontext()
    name = LOCK_FILE if part == EVERY else f"{LOCK_FILE}.{part.index}-of-{part.count}"
    return only_writer(folder.path, name)


def open_folder(job: Job) -> None:
    """Make the output folder ready: the dataset's description and its manifests.

    Raises ``WrongDataset``, naming what differs, where it holds another dataset.
    """
    folder = job.folder
    folder.make()
    if isinstance(folder, storage.LocalFolder):
        remove_leftovers(folder.path)
        with one_at_a_time(folder.path / DESCRIPTION_LOCK):
            _describe(job)
    else:
        folder.remove_leftovers()
        _describe(job)
        require_ours(job)  # a store has no locks: of two that began together, one finds out


def _describe(job: Job) -> None:
    """Write what the folder holds, where it holds nothing else: ``dataset.json`` last."""
    folder, before = job.folder, read_dataset(job.out)
    if before is None and shards.find_shards(job.out):
        before = read_dataset(job.out)  # another part may have come first
        if before is None:
            raise WrongDataset(
                f"{folder.shown()}: has shards but no {DATASET_FILE}; give an empty one"
            )
    if before is not None and before["identity"] != job.identity:
        raise WrongDataset(
            f"{folder.shown()}: holds another dataset; what differs: "
            + "; ".join(differences(before["identity"], job.identity))
            + ". Give another --out, or ask for the same data"
        )
    if before is not None and job.samples < before["samples"]:
        raise UserError(
            f"--samples {job.samples}: {folder.shown()} has {before['samples']} already; --samples "
            "is how many it shall have in all"
        )
    hashes = (before or {}).get("manifests_sha256", {})
    stored = {name: _store(job, name, hashes.get(name)) for name in sorted(job.manifests)}
    write_json(job.out, DATASET_FILE, _description(job, stored))


def _store(job: Job, name: str, stated: str | None) -> str:
    """Write a manifest, unless it is there as it was ``stated``; the hash of its file."""
    folder, manifest = job.folder, job.manifests[name]
    with suppress(CorpusError):
        stored = Manifest.load(name, folder, manifest_file(name)).table
        if stored.equals(manifest.table, check_metadata=True):
            found = _sha256(folder, name)
            if stated in (found, None):
                return found
    with folder.writing(manifest_file(name)) as file:
        manifest.write(file)
    return _sha256(folder, name)


def _description(job: Job, manifests_sha256: Mapping[str, str]) -> dict[str, Any]:
    """What ``dataset.json`` says of a job."""
    return {
        "format": shards.FORMAT,
        "recipe": job.recipe.model_dump(mode="json"),
        "recipe_hash": job.dataset_hash,
        "teacher": job.recipe.teacher.name,
        "teacher_calibration": job.teacher_calibration,
        "teacher_calibration_sha256": digest(job.teacher_calibration),
        "splits": job.identity["splits"],
        "samples": job.samples,
        "hours": round(job.samples * CLIP_HOURS, 3),
        "corpora": {name: manifest.summary() for name, manifest in job.manifests.items()},
        "manifests_sha256": dict(manifests_sha256),
        "identity": job.identity,
    } | ({"derived_from": derived} if (derived := job.identity.get("derived_from")) else {})


def require_ours(job: Job) -> None:
    """Raise ``WrongDataset`` where the folder was removed, or became another dataset's, since it
    was opened."""
    found = read_dataset(job.out)
    if found is None:
        raise WrongDataset(
            f"{job.folder.shown(DATASET_FILE)} was removed under this run: run the same command "
            "again, it makes what is missing"
        )
    if found["identity"] != job.identity:
        raise WrongDataset(
            f"{job.folder.shown()}: another run wrote another dataset there meanwhile; what "
            f"differs: {'; '.join(differences(found['identity'], job.identity))}. Remove the "
            "folder, and make each in a folder of its own"
        )
