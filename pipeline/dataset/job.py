"""A dataset folder and what is still to be made in it; and the worker that makes it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, Field, ValidationError

from data_specs.cluster.needs import EVERY, Part
from data_specs.corpus import find_corpus
from data_specs.io import storage
from data_specs.io.addresses import Place, shown
from data_specs.io.errors import UserError
from data_specs.io.files import LOCK_FILE, one_at_a_time, only_writer, remove_leftovers
from data_specs.io.parse import json_object
from data_specs.recipe import Recipe
from data_specs.sample import CROP_SAMPLES, DATASET_FILE, SAMPLE_RATE
from data_specs.strict import describe, digest, unknown
from data_specs.teacher import packages_of
from pipeline.corpora.manifest import CorpusError, Manifest, exceptions, scan, split_again, split_of
from pipeline.dataset import shards
from pipeline.dataset.shards import MOST_INFO_BYTES, Row, ShardError, write_json
from pipeline.render import label
from pipeline.render.guard import TIME_LIMIT_S, Guard
from pipeline.render.plan import PLAN_VERSION, SamplePlan, Table, make_table, plan_range
from pipeline.render.processors import self_check, versions, weights_sha256
from pipeline.render.processors.runtime import Runtime
from pipeline.render.render import RENDER_VERSION, Roots, render_group

NOT_DATA = {"about", "max_dropped_share", "allow_noncommercial"}
"""Fields of a recipe that change no sample."""

LABEL_PACKAGES = ("numpy", "torch")
"""Of the packages whose versions a dataset states, those that compute every teacher's labels."""

DESCRIPTION_LOCK = f"{LOCK_FILE}.{DATASET_FILE}"
"""Held while a folder is looked at and described: of two recipes begun together one is refused."""

CLIP_HOURS = CROP_SAMPLES / SAMPLE_RATE / 3600


class WrongDataset(ShardError):
    """A folder holds another dataset than the one that is asked for."""


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs: picklable, small, no audio and no teacher in it.

    ``identity`` is what the dataset hash is made of; folders of corpora, workers and devices are
    not part of it. ``out`` is a folder's path or its address. ``device`` is where the processors
    run and, where ``teacher_device`` is empty, the teacher too. ``again`` are shards to be made
    whether or not they are whole, ``only`` (all where it is None) those that may be made at all.
    """

    recipe: Recipe
    identity: dict[str, Any]
    samples: int
    out: Place
    roots: Roots
    device: str = "cpu"
    time_limit_s: float = TIME_LIMIT_S
    manifests: dict[str, Manifest] = field(default_factory=dict, repr=False)
    teacher_device: str = ""
    teacher_calibration: dict[str, Any] | None = field(default=None, repr=False)
    again: frozenset[int] = frozenset()
    only: frozenset[int] | None = None

    @property
    def folder(self) -> storage.LocalFolder | storage.RemoteFolder:
        """``out``, to be read and written."""
        return storage.open_folder(self.out)

    @cached_property
    def dataset_hash(self) -> str:
        """What a record must state to count as ours."""
        return digest(self.identity)

    @cached_property
    def tables(self) -> dict[str, Table]:
        """The files that each role may draw from."""
        splits = self.identity["splits"]
        if lacks := self.recipe.sources.present().keys() - splits.keys():
            raise ShardError(f"{self.folder.shown(DATASET_FILE)}: no split of {', '.join(lacks)}")
        return {
            role: make_table(
                self.manifests[source.corpus],
                source,
                role,
                splits[role],
                self.assigned(role),
            )
            for role, source in self.recipe.sources.present().items()
        }

    def assigned(self, role: str) -> dict[str, str]:
        """The split of every group of a role's corpus, as this dataset was made with it."""
        source = getattr(self.recipe.sources, role)
        groups, kept = self.manifests[source.corpus].groups(), self.identity.get("assigned")
        if kept is None:  # made before they were kept, from a corpus that was new
            return split_of(groups, source.holdout)
        return split_again(groups, source.holdout, kept.get(role, {}))

    @property
    def shard_count(self) -> int:
        """Shards of the whole dataset."""
        return -(-self.samples // self.recipe.shard_samples)

    def shard_range(self, shard: int) -> range:
        """Plan rows of a shard; the last one may be short."""
        size = self.recipe.shard_samples
        return range(shard * size, min((shard + 1) * size, self.samples))

    @property
    def label_device(self) -> str:
        """Where the teacher runs."""
        return self.teacher_device or self.device

    def groups(self, shard: int, size: int = 0) -> Iterator[range]:
        """Plan rows of each group (``size`` or the recipe's); none crosses a shard's end."""
        rows, size = self.shard_range(shard), size or self.recipe.group_samples
        for first in range(rows.start, rows.stop, size):
            yield range(first, min(first + size, rows.stop))

    def todo(self) -> list[int]:
        """Shards that are to be made: not whole yet, or wanted again."""
        ledger, numbers = shards.read_ledger(self.out), range(self.shard_count)
        return [
            shard
            for shard in (numbers if self.only is None else sorted(self.only & set(numbers)))
            if shard in self.again or not self.is_whole(shard, ledger)
        ]

    def missing(self) -> list[int]:
        """Shards that are not whole, whichever this run is to make."""
        return replace(self, again=frozenset(), only=None).todo()

    def is_whole(self, shard: int, ledger: shards.Ledger | None = None) -> bool:
        """Whether a shard is done, as a ledger says that was read for many, or as it is now."""
        planned = len(self.shard_range(shard))
        if ledger is None:
            return shards.is_whole(self.out, shard, self.dataset_hash, planned)
        return ledger.is_whole(shard, self.dataset_hash, planned)

    def plans(self, rows: range) -> list[SamplePlan]:
        """The plans of some rows."""
        return list(plan_range(self.recipe, self.tables, rows.start, rows.stop))

    def load_teacher(self) -> label.Teacher:
        """Load the teacher where it shall run, with torch pinned to one thread.

        Raises ``ShardError`` where this machine would give other labels than the dataset's: another
        version of a package, other weights under the same name.
        """
        use_one_thread()
        self.require_label_packages()
        teacher = label.load(self.recipe.teacher, self.label_device)
        if teacher.weights_sha256 != self.identity["teacher_sha256"]:
            raise ShardError(_other_weights(teacher, self.identity["teacher_sha256"]))
        return teacher

    def require_label_packages(self) -> None:
        """Raise ``ShardError`` where labels made here would not be the dataset's."""
        stated = self.identity["versions"]
        names = (*LABEL_PACKAGES, *sorted(packages_of(self.recipe.teacher.name)))
        require_same_packages(
            {name: stated.get(name) for name in names},
            {name: importlib.metadata.version(name) for name in names},
        )

    def commit(self, shard: int, rows: Sequence[Row]) -> shards.ShardRecord:
        """Write a finished shard."""
        return shards.commit(
            self.out,
            shard,
            rows,
            self.dataset_hash,
            self.recipe.max_dropped_share,
            self.identity["versions"],
        )


def use_one_thread() -> None:
    """Pin torch, so that the numbers do not depend on how many cores a machine has."""
    import torch

    torch.set_num_threads(1)


def require_same_packages(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ``ShardError`` where this machine's packages are not those that a dataset states."""
    if here != there:
        differ = "; ".join(differences(there, here))
        raise ShardError(f"this machine has other packages than the dataset: {differ}")


def _other_weights(teacher: label.Teacher, stated: str) -> str:
    return (
        f"teacher {teacher.name!r} has other weights on this machine "
        f"({teacher.weights_sha256[:12]}) than the dataset's ({stated[:12]}): bring those here"
    )


def prepare(
    recipe: Recipe,
    roots: Roots,
    out: Place,
    samples: int,
    splits: dict[str, str] | None = None,
    device: str = "cpu",
    progress: bool = True,
    time_limit_s: float = TIME_LIMIT_S,
    teacher_device: str = "",
    derived_from: dict[str, Any] | None = None,
    manifests: dict[str, Manifest] | None = None,
    assigned: Mapping[str, Mapping[str, str]] | None = None,
) -> Job:
    """Check everything that can be checked before work starts, and open the output folder.

    Raises ``ValueError`` (and kin) for a corpus without folder, a processor or teacher that cannot
    run, an output folder that holds another dataset, and ``OSError`` for one that cannot be
    written. ``derived_from`` says whose samples come first (``growth``); it is part of the hash.
    ``manifests`` are given where the corpora were scanned already, and ``assigned`` are the splits
    of groups, by role, that stay where they are.
    """
    require_samples(samples)
    check_processors(recipe, device, time_limit_s)
    before = read_dataset(out)
    if manifests is None:
        manifests = scan_all(recipe, roots, progress, known_manifests(out, before))
    teacher = label.identify(recipe.teacher, teacher_device or device)
    identity = _identity(recipe, manifests, splits or {}, teacher.weights_sha256)
    if before is None or "assigned" in before["identity"]:  # an older folder's are found anew
        identity["assigned"] = _assigned(recipe, manifests, assigned or {})
    job = Job(
        recipe,
        identity | ({"derived_from": derived_from} if derived_from else {}),
        samples,
        out,
        roots,
        device,
        time_limit_s,
        manifests,
        teacher_device=teacher_device,
        teacher_calibration=label.calibration(teacher),
    )
    _ = job.tables  # an empty split is refused now, not by a worker
    open_folder(job)
    return job


def beside(job: Job, out: Place, samples: int, splits: dict[str, str]) -> Job:
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
    with Guard(Runtime(_device_here(device), recipe.precision), time_limit_s) as guard:
        self_check(recipe, guard.run)


def _device_here(device: str) -> str:
    """A machine that only drives a cluster may have no GPU: there the check runs on its CPU."""
    import torch

    return device if device == "cpu" or torch.cuda.is_available() else "cpu"


def first_own_sample(identity: dict[str, Any]) -> int:
    """Index from which on a dataset's samples are drawn from its own corpora.

    Those before, in a dataset that was derived from another (``growth``), are that one's.
    """
    return int((identity.get("derived_from") or {}).get("samples", 0))


def require_samples(samples: int) -> None:
    """Raise ``ValueError`` for fewer than one sample."""
    if samples < 1:
        raise UserError(f"--samples must be at least 1, not {samples}")


def scan_all(
    recipe: Recipe,
    roots: Roots,
    progress: bool = True,
    known: Mapping[str, Manifest] | None = None,
) -> dict[str, Manifest]:
    """The manifests of the recipe's corpora. Raises ``CorpusError`` for a missing folder.

    Files that are as they are in ``known`` are not opened again.
    """
    names = {source.corpus for source in recipe.sources.present().values()}
    for given in roots:
        if given not in names:
            name = shown(given)
            raise CorpusError(f"--corpus {name}: {unknown('corpus', name, names)}")
    where = f"recipe {recipe.name!r}"
    return {
        name: scan(
            name,
            find_corpus(name, where),
            roots.get(name, []),
            progress,
            known.get(name) if known else None,
        )
        for name in sorted(names)
    }


def known_manifests(out: Place, description: dict[str, Any] | None) -> dict[str, Manifest]:
    """The manifests in a dataset's folder, those that are the ones which it was made from."""
    found, folder = {}, storage.open_folder(out)
    for name, stated in (description or {"identity": {}})["identity"].get("corpora", {}).items():
        try:
            manifest = Manifest.load(name, folder, f"manifests/{name}.parquet")
            if manifest.sha256() != stated:
                raise CorpusError(f"{folder.shown(f'manifests/{name}.parquet')}: was changed")
            found[name] = manifest
        except CorpusError as error:
            print(f"warning: {error}; corpus {name!r} is scanned again", file=sys.stderr)
    return found


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


def _identity(
    recipe: Recipe, manifests: dict[str, Manifest], splits: dict[str, str], teacher_sha256: str
) -> dict[str, Any]:
    return {
        "format": shards.FORMAT,
        "plan_version": PLAN_VERSION,
        "render_version": RENDER_VERSION,
        "recipe": recipe.model_dump(mode="json", exclude=NOT_DATA),
        "corpora": {name: manifest.sha256() for name, manifest in manifests.items()},
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
    """Write what the folder holds, where it holds nothing else."""
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
    write_description(job)


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


@contextmanager
def writing(out: Place, part: Part = EVERY) -> Iterator[None]:
    """Hold a dataset's folder while a command makes the whole of it, or a part of it.

    Parts are made side by side; ``UserError`` where another command makes the same one. At an
    address nothing is held: there two make the same bytes twice.
    """
    folder = storage.open_folder(out)
    if not isinstance(folder, storage.LocalFolder):
        yield
        return
    name = LOCK_FILE if part == EVERY else f"{LOCK_FILE}.{part.index}-of-{part.count}"
    with only_writer(folder.path, name):
        yield


def write_description(job: Job) -> None:
    """Write what a folder holds: manifests, unless they are there, and last ``dataset.json``."""
    for name, manifest in job.manifests.items():
        if not _is_stored(job.folder, name, manifest):
            with job.folder.writing(f"manifests/{name}.parquet") as file:
                manifest.write(file)
    write_json(job.out, DATASET_FILE, describe_dataset(job))


def _is_stored(
    folder: storage.LocalFolder | storage.RemoteFolder, name: str, manifest: Manifest
) -> bool:
    with suppress(CorpusError):
        stored = Manifest.load(name, folder, f"manifests/{name}.parquet").table
        return bool(stored.equals(manifest.table, check_metadata=True))
    return False


def describe_dataset(job: Job) -> dict[str, Any]:
    """What ``dataset.json`` says of a job."""
    return {
        "format": shards.FORMAT,
        "recipe": job.recipe.model_dump(mode="json"),
        "recipe_hash": job.dataset_hash,
        "teacher": job.recipe.teacher.name,
        "teacher_calibration": job.teacher_calibration,
        "splits": job.identity["splits"],
        "samples": job.samples,
        "hours": round(job.samples * CLIP_HOURS, 3),
        "corpora": {name: manifest.summary() for name, manifest in job.manifests.items()},
        "identity": job.identity,
    } | ({"derived_from": derived} if (derived := job.identity.get("derived_from")) else {})


FIELDS = {"identity": dict, "recipe": dict, "recipe_hash": str, "samples": int}
"""What every ``dataset.json`` has."""


def read_dataset(out: Place) -> dict[str, Any] | None:
    """``dataset.json`` of a folder, or none. ``ShardError`` where it is not one."""
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


def differences(
    before: Any, now: Any, path: str = "", between: tuple[str, str] = ("there", "asked for")
) -> Iterator[str]:
    """Where two JSON-able values differ, as lines with the path of the field."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            where = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key), now.get(key), where, between)
    elif before != now:
        yield f"{path}: {_short(before)} {between[0]}, {_short(now)} {between[1]}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


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


def reopen(out: Place, roots: Roots) -> Job:
    """The job of an existing dataset folder, from what the folder itself says."""
    found, folder = read_dataset(out), storage.open_folder(out)
    if found is None:
        raise ShardError(f"{folder.shown()}: no {DATASET_FILE}: not a dataset folder")
    try:
        described = Description.model_validate(found)
    except ValidationError as error:
        raise ShardError(describe(error, found, folder.shown(DATASET_FILE))) from error
    names = {source.corpus for source in described.recipe.sources.present().values()}
    manifests = {name: Manifest.load(name, folder, f"manifests/{name}.parquet") for name in names}
    return Job(
        described.recipe,
        found["identity"],
        described.samples,
        out,
        roots,
        manifests=manifests,
        teacher_calibration=found.get("teacher_calibration"),
    )


def changed_manifests(job: Job) -> Iterator[str]:
    """Which of a reopened job's manifests are not the ones that its dataset was made from."""
    for name, manifest in sorted(job.manifests.items()):
        if manifest.sha256() != job.identity.get("corpora", {}).get(name):
            where = job.folder.shown(f"manifests/{name}.parquet")
            yield f"{where}: was changed: bring back the one that the dataset was made with"


def description_problems(job: Job) -> Iterator[str]:
    """What is wrong with a folder's ``dataset.json`` and manifests; ``job`` is ``reopen``'s."""
    where, found = job.folder.shown(DATASET_FILE), read_dataset(job.out) or {}
    free = {key: value for key, value in found["recipe"].items() if key in NOT_DATA}
    expected = {
        "format": shards.FORMAT,
        "recipe_hash": job.dataset_hash,
        "recipe": free | job.identity["recipe"],
        "teacher": job.identity["recipe"]["teacher"]["name"],
        "splits": job.identity["splits"],
        "hours": round(job.samples * CLIP_HOURS, 3),
        "corpora": {name: manifest.summary() for name, manifest in job.manifests.items()},
        "derived_from": job.identity.get("derived_from"),
    }
    stated = {key: found.get(key) for key in expected}
    for line in differences(stated, expected, between=("there", "by what is hashed")):
        yield f"{where}: was changed: {line}"
    yield from changed_manifests(job)


class ShardWorker(Protocol):
    """What an engine drives, one to a process: makes a job's shards, group by group.

    An engine sets ``job`` where it goes on to another split of the same recipe.
    """

    job: Job

    def groups(self, shard: int) -> Iterator[range]: ...

    def make(self, rows: range) -> list[Row]: ...


WorkerFactory = Callable[[Job, label.Teacher | None], ShardWorker]
"""Gives a worker for a job, with the teacher that others share or, for None, one of its own."""


class Worker:
    """Makes new samples: renders and labels."""

    def __init__(self, job: Job, teacher: label.Teacher | None = None) -> None:
        require_same_packages(job.identity["versions"], versions(job.recipe))
        self.job = job
        # Started first: it imports its libraries while the teacher is loaded here.
        self.guard = Guard(Runtime(job.device, job.recipe.precision), job.time_limit_s)
        self.teacher = teacher or job.load_teacher()

    def groups(self, shard: int) -> Iterator[range]:
        """What is rendered, and scored, at once."""
        return self.job.groups(shard)

    def make(self, rows: range) -> list[Row]:
        """Render and label a group."""
        rendered = render_group(self.job.plans(rows), self.job.roots, self.guard.run)
        return label.label_group(self.teacher, rendered)
