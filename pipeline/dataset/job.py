"""A dataset that is to be made: its identity, its plans, which shards are missing; and the worker
that makes them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from data_specs.io import storage
from data_specs.io.addresses import PathOrUrl
from data_specs.recipe import Recipe
from data_specs.sample import CROP_SAMPLES, DATASET_FILE, SAMPLE_RATE
from data_specs.strict import differences, digest
from data_specs.teacher import packages_of
from pipeline.corpora.manifest import Manifest, split_again, split_of
from pipeline.dataset import shards
from pipeline.dataset.shards import ShardError
from pipeline.render import label
from pipeline.render.guard import TIME_LIMIT_S, Guard
from pipeline.render.label import Row
from pipeline.render.plan import SamplePlan, Table, make_table, plan_range
from pipeline.render.processors import versions
from pipeline.render.processors.runtime import Runtime
from pipeline.render.render import Roots, render_group

LABEL_PACKAGES = ("numpy", "torch")
"""Of the packages whose versions a dataset states, those that compute every teacher's labels."""

CLIP_HOURS = CROP_SAMPLES / SAMPLE_RATE / 3600


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
    out: PathOrUrl
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
                self.manifests[source.corpus], source, role, splits[role], self.assigned(role)
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
    def first_own_sample(self) -> int:
        """Index from which on samples are drawn from the dataset's own corpora.

        Those before, in a dataset that was derived from another (``extend``), are that one's.
        """
        return int((self.identity.get("derived_from") or {}).get("samples", 0))

    @property
    def shard_count(self) -> int:
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

    def require_whole(self) -> None:
        """Raise ``ShardError`` naming the first shard that is missing or not this dataset's."""
        if unfinished := self.todo():
            first, rows = unfinished[0], self.shard_range(unfinished[0])
            wrong = shards.verify_shard(self.out, first, self.dataset_hash, rows)
            raise ShardError(
                f"{self.folder.shown()}: {len(unfinished)} of {self.shard_count} shards are not "
                f"whole; first: {'; '.join(wrong)}. Run the command that made it again: python -m "
                f"pipeline shards ... --out {self.folder.shown()}"
            )

    def is_whole(self, shard: int, ledger: shards.Ledger | None = None) -> bool:
        """Whether a shard is done, as a ledger says that was read for many, or as it is now."""
        ledger = ledger or shards.one_shard(self.out, shard)
        return not ledger.problem(shard, self.dataset_hash, len(self.shard_range(shard)))

    def plans(self, rows: range) -> list[SamplePlan]:
        return list(plan_range(self.recipe, self.tables, rows.start, rows.stop))

    def load_teacher(self) -> label.Teacher:
        """Load the teacher where it shall run, with torch pinned to one thread.

        Raises ``ShardError`` where this machine would give other labels than the dataset's: another
        version of a package, other weights under the same name.
        """
        use_one_thread()
        self.require_label_packages()
        teacher = label.load(self.recipe.teacher, self.label_device)
        if teacher.weights_sha256 != (stated := self.identity["teacher_sha256"]):
            raise ShardError(
                f"teacher {teacher.name!r} has other weights on this machine "
                f"({teacher.weights_sha256[:12]}) than the dataset's ({stated[:12]}): bring those "
                "here"
            )
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
        most, versions = self.recipe.max_dropped_share, self.identity["versions"]
        return shards.commit(self.out, shard, rows, self.dataset_hash, most, versions)


def use_one_thread() -> None:
    """Pin torch, so that the numbers do not depend on how many cores a machine has."""
    import torch

    torch.set_num_threads(1)


def require_same_packages(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ``ShardError`` where this machine's packages are not those that a dataset states."""
    if here != there:
        differ = "; ".join(differences(there, here))
        raise ShardError(f"this machine has other packages than the dataset: {differ}")


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
        rendered = render_group(self.job.plans(rows), self.job.roots, self.guard.run)
        return label.label_group(self.teacher, rendered)
