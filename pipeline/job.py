"""A dataset folder and what is still to be made in it; and the worker that makes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data_specs.corpus import find_corpus
from data_specs.recipe import Recipe
from data_specs.sample import CROP_SAMPLES, DATASET_FILE, SAMPLE_RATE
from data_specs.strict import digest, unknown
from pipeline import label, shards
from pipeline.degrade import self_check, versions, weights_sha256
from pipeline.degrade.runtime import Runtime
from pipeline.guard import TIME_LIMIT_S, Guard
from pipeline.manifest import CorpusError, Manifest, scan
from pipeline.plan import PLAN_VERSION, SamplePlan, Table, make_table, plan_range
from pipeline.render import RENDER_VERSION, Roots, render_group
from pipeline.shards import Row, ShardError, write_json

NOT_DATA = {"about", "max_dropped_share", "allow_noncommercial"}
"""Fields of a recipe that change no sample."""

CLIP_HOURS = CROP_SAMPLES / SAMPLE_RATE / 3600


class WrongDataset(ShardError):
    """A folder holds another dataset than the one that is asked for."""


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs: picklable, small, no audio and no teacher in it.

    ``identity`` is what the dataset hash is made of; folders of corpora, workers and devices are
    not part of it.
    """

    recipe: Recipe
    identity: dict[str, Any]
    samples: int
    out: Path
    roots: Roots
    device: str = "cpu"
    time_limit_s: float = TIME_LIMIT_S
    manifests: dict[str, Manifest] = field(default_factory=dict, repr=False)

    @cached_property
    def dataset_hash(self) -> str:
        """What a record must state to count as ours."""
        return digest(self.identity)

    @cached_property
    def tables(self) -> dict[str, Table]:
        """The files that each role may draw from."""
        return {
            role: make_table(
                self.manifests[source.corpus], source, role, self.identity["splits"][role]
            )
            for role, source in self.recipe.sources.present().items()
        }

    @property
    def shard_count(self) -> int:
        """Shards of the whole dataset."""
        return -(-self.samples // self.recipe.shard_samples)

    def shard_range(self, shard: int) -> range:
        """Plan rows of a shard; the last one may be short."""
        size = self.recipe.shard_samples
        return range(shard * size, min((shard + 1) * size, self.samples))

    def groups(self, shard: int) -> Iterator[range]:
        """Plan rows of each group of a shard; a group never crosses a shard's end."""
        rows, size = self.shard_range(shard), self.recipe.group_samples
        for first in range(rows.start, rows.stop, size):
            yield range(first, min(first + size, rows.stop))

    def todo(self) -> list[int]:
        """Shards that are not whole yet."""
        return [
            shard
            for shard in range(self.shard_count)
            if not shards.is_whole(self.out, shard, self.dataset_hash, len(self.shard_range(shard)))
        ]

    def plans(self, rows: range) -> list[SamplePlan]:
        """The plans of some rows."""
        return list(plan_range(self.recipe, self.tables, rows.start, rows.stop))

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


def prepare(
    recipe: Recipe,
    roots: Roots,
    out: Path,
    samples: int,
    splits: dict[str, str] | None = None,
    device: str = "cpu",
    progress: bool = True,
    time_limit_s: float = TIME_LIMIT_S,
) -> Job:
    """Check everything that can be checked before work starts, and open the output folder.

    Raises ``ValueError`` (and kin) for a corpus without folder, a processor or teacher that cannot
    run, an output folder that holds another dataset, and ``OSError`` for one that cannot be
    written.
    """
    require_samples(samples)
    self_check(recipe)
    manifests = scan_all(recipe, roots, progress)
    identity = _identity(recipe, manifests, splits or {})
    job = Job(recipe, identity, samples, out, roots, device, time_limit_s, manifests)
    _ = job.tables  # an empty split is told now, not by a worker
    _open_folder(job)
    return job


def require_samples(samples: int) -> None:
    """Raise ``ValueError`` for fewer than one sample."""
    if samples < 1:
        raise ValueError(f"--samples must be at least 1, not {samples}")


def scan_all(recipe: Recipe, roots: Roots, progress: bool = True) -> dict[str, Manifest]:
    """The manifests of the recipe's corpora. Raises ``CorpusError`` for a missing folder."""
    names = {source.corpus for source in recipe.sources.present().values()}
    for given in roots:
        if given not in names:
            raise CorpusError(f"--corpus {given}: {unknown('corpus', given, names)}")
    where = f"recipe {recipe.name!r}"
    return {
        name: scan(name, find_corpus(name, where), roots.get(name, []), progress)
        for name in sorted(names)
    }


def _identity(
    recipe: Recipe, manifests: dict[str, Manifest], splits: dict[str, str]
) -> dict[str, Any]:
    teacher = label.load(recipe.teacher)
    return {
        "format": shards.FORMAT,
        "plan_version": PLAN_VERSION,
        "render_version": RENDER_VERSION,
        "recipe": recipe.model_dump(mode="json", exclude=NOT_DATA),
        "corpora": {name: manifest.sha256() for name, manifest in manifests.items()},
        "splits": resolve_splits(recipe, splits),
        "teacher_sha256": teacher.weights_sha256,
        "processors_sha256": weights_sha256(recipe),
        "versions": versions(recipe),
    }


def resolve_splits(recipe: Recipe, splits: dict[str, str]) -> dict[str, str]:
    """The split of every role, train where none was asked for. ``ValueError`` for no such role."""
    roles = recipe.sources.present()
    for role in splits:
        if role not in roles:
            raise ValueError(f"--split {role}: {unknown('role', role, roles)}")
    return {role: splits.get(role, "train") for role in roles}


def _open_folder(job: Job) -> None:
    job.out.mkdir(parents=True, exist_ok=True)
    shards.remove_leftovers(job.out)
    path = job.out / DATASET_FILE
    before = _read_dataset(path)
    if before is None and shards.find_shards(job.out):
        raise WrongDataset(f"{job.out}: has shards but no {DATASET_FILE}; give an empty folder")
    if before is not None and before["identity"] != job.identity:
        raise WrongDataset(
            f"{job.out}: holds another dataset; what differs: "
            + "; ".join(_differences(before["identity"], job.identity))
            + ". Give another --out, or ask for the same data"
        )
    (job.out / "manifests").mkdir(exist_ok=True)
    for name, manifest in job.manifests.items():
        manifest.save(job.out / "manifests" / f"{name}.parquet")
    write_json(path, _dataset_json(job, before))


def _dataset_json(job: Job, before: dict[str, Any] | None) -> dict[str, Any]:
    samples = max(job.samples, before["samples"] if before else 0)
    return {
        "format": shards.FORMAT,
        "recipe": job.recipe.model_dump(mode="json"),
        "recipe_hash": job.dataset_hash,
        "teacher": job.recipe.teacher.name,
        "splits": job.identity["splits"],
        "samples": samples,
        "hours": round(samples * CLIP_HOURS, 3),
        "corpora": {name: manifest.summary() for name, manifest in job.manifests.items()},
        "identity": job.identity,
    }


def _read_dataset(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ShardError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("identity"), dict):
        raise ShardError(f"{path}: not a dataset description of this version")
    return value


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            where = f"{path}.{key}" if path else str(key)
            yield from _differences(before.get(key), now.get(key), where)
    elif before != now:
        yield f"{path}: {_short(before)} there, {_short(now)} asked for"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def reopen(out: Path, roots: Roots) -> Job:
    """The job of an existing dataset folder, from what the folder itself says."""
    found = _read_dataset(out / DATASET_FILE)
    if found is None:
        raise ShardError(f"{out}: no {DATASET_FILE}: not a dataset folder")
    recipe = Recipe.model_validate(found["recipe"])
    names = {source.corpus for source in recipe.sources.present().values()}
    manifests = {name: Manifest.read(name, out / "manifests" / f"{name}.parquet") for name in names}
    return Job(recipe, found["identity"], found["samples"], out, roots, manifests=manifests)


class Worker:
    """Makes groups of samples; one to a process. Pins torch to one thread, so that the numbers do
    not depend on how many cores a machine has."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(1)
        here, there = versions(job.recipe), job.identity["versions"]
        if here != there:
            differ = "; ".join(_differences(there, here))
            raise ShardError(f"this machine has other packages than the dataset: {differ}")
        self.job = job
        # Started first: it imports its libraries while the teacher is loaded here.
        self.guard = Guard(Runtime(job.device, job.recipe.precision), job.time_limit_s)
        self.teacher = label.load(job.recipe.teacher, job.device)

    def make(self, rows: range) -> list[Row]:
        """Render and label a group."""
        rendered = render_group(self.job.plans(rows), self.job.roots, self.guard.run)
        return label.label_group(self.teacher, rendered)
