"""A job for drills: the engine, the commit and the ledger are the real ones, and every render is
logged. Run as a script, so that it can be killed.

Without ``--recipe`` a sample is a few kilobytes that depend on its index alone, and the teacher a
mean: a shard takes milliseconds, and a hundred kills some minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_specs.io.cli import end, run_command
from data_specs.io.options import add_options, options_of
from data_specs.recipe import load_recipe
from data_specs.sample import sample_key
from pipeline.corpora.manifest import SCHEMA, Manifest
from pipeline.dataset.description import open_folder
from pipeline.dataset.job import Job, Worker
from pipeline.dataset.prepare import prepare
from pipeline.engine.base import EngineOptions
from pipeline.engine.run import make
from pipeline.options import parse_roots
from pipeline.render.label import Row

TWICE = "TWICE"

PLAN = {"speech": {"corpus": "speech", "language": ""}, "noise": None, "room": None, "steps": []}
"""What a shard's record counts of a sample."""


class StubTeacher:
    name, weights_sha256 = "stub", "0" * 64

    def score(self, waves_BT: np.ndarray) -> tuple[np.ndarray, None]:
        return 3.0 + waves_BT.mean(axis=1, dtype=np.float64), None


class StubJob(Job):
    def load_teacher(self) -> Any:
        return StubTeacher()


def hold(log: Path) -> Path:
    """While this file is there, nothing is made: a drill's next step may take its time."""
    return log.with_suffix(".hold")


def note(log: Path, job: Job, rows: range) -> None:
    """One line for each group that is rendered, and whether its shard was committed before."""
    shard = rows.start // job.recipe.shard_samples
    line = f"{shard} {rows.start} {TWICE if job.is_whole(shard) else 'first'}\n"
    with open(log, "a") as file:
        file.write(line)
    while hold(log).exists():
        time.sleep(0.05)


class StubWorker:
    """Makes samples of 60 kB out of nothing but their index."""

    def __init__(self, job: Job, teacher: Any, *, log: Path, pause_s: float) -> None:
        self.job, self.log, self.pause_s = job, log, pause_s
        self.teacher = teacher or job.load_teacher()

    def groups(self, shard: int) -> Iterator[range]:
        return self.job.groups(shard)

    def make(self, rows: range) -> list[Row]:
        note(self.log, self.job, rows)
        time.sleep(self.pause_s)
        pcm = [np.random.default_rng(i).integers(-9999, 9999, 30_000, np.int16) for i in rows]
        scores, _ = self.teacher.score(np.stack(pcm).astype(np.float32) / 32768)
        return [self._row(*one) for one in zip(rows, pcm, scores, strict=True)]

    def _row(self, index: int, pcm: np.ndarray, mos: float) -> Row:
        digest = hashlib.sha256(pcm.tobytes()).hexdigest()
        key, mos = sample_key(index), round(float(mos), 4)
        record = {"key": key, "mos": mos, "pcm_sha256": digest, "plan": PLAN}
        return Row(sample_key(index), pcm.tobytes(), json.dumps(record).encode())


class LoggedWorker(Worker):
    """The real maker, which logs."""

    def __init__(self, job: Job, teacher: Any, *, log: Path, pause_s: float) -> None:
        super().__init__(job, teacher)
        self.log = log

    def make(self, rows: range) -> list[Row]:
        note(self.log, self.job, rows)
        return super().make(rows)


def stub_job(out: Path, samples: int) -> Job:
    recipe = load_recipe("demo").model_copy(update={"shard_samples": 4, "group_samples": 2})
    identity = {"recipe": recipe.model_dump(mode="json"), "splits": {}, "versions": {}}
    identity["teacher_sha256"] = StubTeacher.weights_sha256
    names = {source.corpus for source in recipe.sources.present().values()}
    manifests = {name: Manifest(name, SCHEMA.empty_table()) for name in sorted(names)}
    job = StubJob(recipe, identity, samples, out, {}, manifests=manifests)
    open_folder(job)
    return job


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--samples", type=int, default=40)
    found.add_argument("--log", type=Path, default=Path(os.devnull))
    found.add_argument("--pause", type=float, default=0.0, help="seconds for each group")
    found.add_argument("--recipe", default="")
    found.add_argument("--corpus", action="append", default=[])
    add_options(found, EngineOptions)
    return found


def main() -> int:
    options = parser().parse_args()
    if options.recipe:
        recipe = load_recipe(options.recipe)
        roots = parse_roots(options.corpus, recipe)
        job = prepare(recipe, roots, options.out, options.samples)
        kind: type[StubWorker | LoggedWorker] = LoggedWorker
    else:
        job, kind = stub_job(options.out, options.samples), StubWorker
    how = EngineOptions.model_validate(options_of(options, EngineOptions))
    how.check("cpu")
    factory = partial(kind, log=options.log, pause_s=options.pause)
    return make([job], how, factory)


if __name__ == "__main__":
    end(run_command(main))
