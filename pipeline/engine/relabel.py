"""Labels a dataset's samples again by another teacher. ``python -m pipeline relabel SOURCE``.

No audio is made: a sample's FLAC is copied as it is and of its record only what the teacher says is
new. Byte for byte, the result is the dataset that ``shards`` would have made with that teacher in
its recipe. Interrupted, it goes on where it was: run the same command again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from data_specs.io.addresses import PathOrUrl, path_or_url, shown
from data_specs.io.errors import UserError
from data_specs.io.options import add_options
from data_specs.recipe import Teacher as TeacherSpec
from data_specs.sample import SampleRecord, parse_sample, sample_key, shard_name
from data_specs.strict import checked
from data_specs.teacher import packages_of
from pipeline.audio import decode_flac, pcm_sha256
from pipeline.dataset import shards
from pipeline.dataset.description import open_folder, reopen, same_location
from pipeline.dataset.job import Job
from pipeline.dataset.shards import ShardError
from pipeline.engine.base import EngineOptions
from pipeline.engine.run import make
from pipeline.options import engine_options
from pipeline.render import label
from pipeline.render.label import Row
from pipeline.render.processors import audio_packages

PRECISIONS = get_args(TeacherSpec.model_fields["precision"].annotation)


def prepare(source: Job, out: PathOrUrl, spec: TeacherSpec, device: str = "cpu") -> Job:
    """The job that labels ``source`` again: its counterpart with another teacher. Opens ``out``.

    Raises ``ValueError`` (and kin) for a source that is not whole, a teacher that cannot run, an
    ``out`` that is the source or holds another dataset; ``OSError`` for one that cannot be written.
    """
    if same_location(out, source.out):
        raise UserError(
            f"--out {shown(out)} is the source itself, whose labels stay: give another folder"
        )
    source.require_whole()
    teacher = label.identify(spec, device)
    recipe = source.identity["recipe"] | {"teacher": spec.model_dump(mode="json")}
    changed = {"teacher_sha256": teacher.weights_sha256, "versions": _versions(source, spec)}
    job = replace(
        source,
        recipe=source.recipe.model_copy(update={"teacher": spec}),
        identity=source.identity | changed | {"recipe": recipe},
        out=out,
        device=device,
        teacher_calibration=label.calibration(teacher),
    )
    job.require_label_packages()
    open_folder(job)
    return job


def _versions(source: Job, spec: TeacherSpec) -> dict[str, str]:
    """The audio's packages as the source states them, and the new teacher's as they are here."""
    gone = packages_of(source.recipe.teacher.name) - audio_packages(source.recipe)
    kept = {n: v for n, v in source.identity["versions"].items() if n not in gone}
    return {name: importlib.metadata.version(name) for name in packages_of(spec.name)} | kept


@dataclass(frozen=True)
class SourceShard:
    """A shard of the source in memory: FLAC and record of each sample, and what was dropped."""

    shard: int
    tar: str
    samples: dict[str, tuple[bytes, SampleRecord]]
    dropped: dict[str, Row]

    def pcm(self, key: str) -> NDArray[np.int16]:
        """What a student will read, held to the record's hash before it gets a label."""
        flac, record = self.samples[key]
        try:
            pcm = decode_flac(flac)
        except UserError as error:
            raise ShardError(f"{self.tar}: {key}.flac: {error}") from error
        if pcm_sha256(pcm) != record.pcm_sha256:
            raise ShardError(f"{self.tar}: {key}.flac: audio differs from the hash in its record")
        return pcm


class Relabeller:
    """Makes (``job.ShardWorker``) an old dataset's samples with new labels."""

    def __init__(
        self, job: Job, teacher: label.Teacher | None = None, *, source: Job, batch: int = 0
    ) -> None:
        self.job, self.source, self.batch = job, source, batch
        self.teacher = teacher or job.load_teacher()
        self._kept: SourceShard | None = None

    def groups(self, shard: int) -> Iterator[range]:
        """What is scored at once: as ``shards`` does it, unless a ``batch`` is given."""
        return self.job.groups(shard, self.batch)

    def make(self, rows: range) -> list[Row]:
        """Label a group; what the source dropped stays dropped."""
        kept = self._shard(rows.start // self.job.recipe.shard_samples)
        keys = [sample_key(index) for index in rows]
        clips = {key: kept.pcm(key) for key in keys if key in kept.samples}
        found = label.labels(self.teacher, clips)
        return [
            _row(*kept.samples[key], found[key]) if key in found else kept.dropped[key]
            for key in keys
        ]

    def _shard(self, shard: int) -> SourceShard:
        if self._kept is None or self._kept.shard != shard:
            self._kept = None  # first let go of the last one: some 75 MB
            self._kept = _read(self.source, shard)
        return self._kept


def _row(flac: bytes, old: SampleRecord, found: dict[str, Any]) -> Row:
    record = SampleRecord(**(dict(old) | found))
    return Row(old.key, flac, record.model_dump_json().encode())


def _read(source: Job, shard: int) -> SourceShard:
    """A shard, held to its record. Raises ``ShardError`` naming what is damaged."""
    name, rows = shard_name(shard), source.shard_range(shard)
    verify = partial(shards.verify_shard, source.out, shard, source.dataset_hash, rows)
    if verify():
        raise ShardError(  # only now is all audio decoded, to name the damaged member
            f"{'; '.join(verify(deep=True))}. Remove {name}.json there, run the command that made "
            "the source again, and then this one"
        )
    record, tar = shards.read_record(source.out, shard), shards.shown_tar(source.out, shard)
    found = shards.samples_of(source.out, shard)
    samples = {k: (flac, parse_sample(data, f"{tar}: {k}.json")) for k, flac, data in found}
    drops = record.dropped if record else ()
    dropped = {d["key"]: Row(d["key"], None, None, d["reason"], d["detail"]) for d in drops}
    return SourceShard(shard, tar, samples, dropped)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "source", type=path_or_url, metavar="SOURCE", help="folder of a whole dataset"
    )
    parser.add_argument("--teacher", required=True, metavar="NAME", help="as in a recipe")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the teacher")
    parser.add_argument(
        "--out", type=path_or_url, required=True, metavar="DIR", help="the new dataset"
    )
    parser.add_argument(
        "--device",
        "--teacher-device",
        default="cpu",
        help="of the teacher: cpu (default) or cuda",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=0,
        metavar="N",
        help="clips scored at once, where the recipe's groups are too small for a GPU; with a "
        "teacher whose scores depend on the batch, labels then differ from the recipe's in their "
        "last bits",
    )
    add_options(parser, EngineOptions)


def run(options: argparse.Namespace) -> int:
    """``python -m pipeline relabel SOURCE --teacher NAME --out DIR``; exit status as ``shards``."""
    places = [("SOURCE", options.source), ("--out", options.out)]
    how = engine_options(options, options.device, places)
    if options.batch < 0:
        raise UserError(f"--batch must be at least 1, not {options.batch}")
    asked = {"name": options.teacher, "precision": options.precision}
    spec = checked(TeacherSpec, asked, "--teacher, --precision")
    source = reopen(options.source, {})
    job = prepare(source, options.out, spec, options.device)
    if warning := label.slow_precision(job.recipe.teacher, options.device):
        print(warning)
    factory = partial(Relabeller, source=replace(source, manifests={}), batch=options.batch)
    return make([job], how, factory, planned=False)
