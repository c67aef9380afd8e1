"""Jobs whose samples cost nothing: noise for audio, a score by formula; all around them is real."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_specs.sample import CROP_SAMPLES
from pipeline.audio import encode_flac, pcm_sha256
from pipeline.corpora.manifest import SCHEMA, Manifest
from pipeline.dataset import description, prepare
from pipeline.dataset.job import Job
from pipeline.engine.base import make_shard
from pipeline.render.label import Row
from pipeline.render.plan import SamplePlan
from tests.conftest import small_recipe

SAMPLES = 10  # two shards of four and one of two


def manifest(name: str, files: int, root: int = 0) -> Manifest:
    same = {
        **{"root": root, "sample_rate_hz": 16_000, "channels": 1, "size_bytes": 1000},
        **{"language": "en", "licence": "CC0", "rejected": "", "stamp": ""},
    }
    rows = [
        same | {"path": f"{name}{i:03d}.wav", "frames": 160_000 + i, "speaker": f"{name}{i}"}
        for i in range(files)
    ]
    return Manifest(name, pa.Table.from_pylist(rows, schema=SCHEMA))


def manifests(more_speech: int = 0) -> dict[str, Manifest]:
    found = {name: manifest(name, 12) for name in ("speech", "noise", "rooms")}
    if more_speech:
        tables = [found["speech"].table, manifest("speech", more_speech, root=1).table]
        found["speech"] = Manifest("speech", pa.concat_tables(tables))
    return found


def sketch_job(out: Path | str, samples: int = SAMPLES, **changes: Any) -> Job:
    """A job of an empty chain, opened."""
    plain = {"speech_stages": [], "stages": [], "shard_samples": 4, "group_samples": 2}
    recipe = small_recipe(**plain | changes)
    found = manifests()
    identity = prepare.identity_of(recipe, found, {}, "a" * 64)
    job = Job(recipe, identity, samples, out, {}, manifests=found)
    description.open_folder(job)
    return job


class Sketcher:
    """A worker (``job.ShardWorker``). ``dropped`` are indices of samples that cannot be made."""

    def __init__(self, job: Job, dropped: frozenset[int] = frozenset()) -> None:
        self.job, self.dropped = job, dropped
        self.made: list[int] = []

    def groups(self, shard: int) -> Iterator[range]:
        self.made.append(shard)
        return self.job.groups(shard)

    def make(self, rows: range) -> list[Row]:
        return [self._row(plan) for plan in self.job.plans(rows)]

    def _row(self, plan: SamplePlan) -> Row:
        if plan.index in self.dropped:
            return Row(plan.key, None, None, "processor_timeout", "x: no answer within 1 s")
        digest = hashlib.sha256(plan.model_dump_json().encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        pcm = rng.integers(-300, 300, CROP_SAMPLES).astype(np.int16)
        record = {
            "key": plan.key,
            "mos": 1 + digest[0] / 64,
            "logit": None,
            "teacher": "sketch",
            "teacher_sha256": "a" * 64,
            "pcm_sha256": pcm_sha256(pcm),
            "plan": plan.model_dump(mode="json"),
        }
        return Row(plan.key, encode_flac(pcm), json.dumps(record).encode())


def make_all(job: Job, dropped: frozenset[int] = frozenset()) -> list[int]:
    """Make what is to be made; the shards that were."""
    maker = Sketcher(job, dropped)
    for shard in job.todo():
        *_, why = make_shard(maker, job, shard)
        if why:
            raise RuntimeError(why)
    return maker.made


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
