"""Estimate time, size and cost of a dataset: ``python -m pipeline estimate RECIPE ...``.

Some of the recipe's own samples are made on this machine, on all cores at once, with a clock around
each stage; or --rates FILE gives what another machine measured (--save wrote it, and an editor can
change it). The rest is multiplication: its assumptions are printed below the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.hardware import cpus, require_device
from data_specs.io.options import add_options, options_of
from data_specs.recipe import Recipe, load_recipe
from data_specs.strict import Strict, checked
from pipeline.cluster import rates as rate_files
from pipeline.cluster.rates import Estimate, Rates, predict
from pipeline.dataset import shards
from pipeline.dataset.job import CLIP_HOURS, Job, Worker
from pipeline.dataset.prepare import prepare, require_samples
from pipeline.options import parse_roots, recipe_option
from pipeline.render import label
from pipeline.render.label import Row
from pipeline.render.processors.interface import Params, Waves
from pipeline.render.render import Roots, render_group

HOUR_S = 3600.0
GIGABIT = 1e9 / 8
CLIP_S = CLIP_HOURS * HOUR_S
TEACHER = "teacher"

Price = Annotated[float, Field(ge=0)]


class Setup(Strict):
    """What is measured, machines and prices: the defaults and the help of their options."""

    measure: int = Field(100, ge=1, description="samples that each worker makes")
    workers: int = Field(default_factory=cpus, ge=1, description="that measure at once")
    device: str = Field("cpu", description="where the processors' networks are measured")
    teacher_device: str = Field("cpu", description="where the teacher is measured")
    nodes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 10, 100), description="how many machines; each number is a row of the table"
    )
    cores: int = Field(default_factory=cpus, ge=1, description="of a machine, a worker each")
    gpus: int = Field(0, ge=0, description="of a machine, for a teacher that was measured on one")
    store_gbit: float = Field(
        0.0, ge=0, description="what the store takes, Gbit/s (none: no limit)"
    )
    price_core_hour: Price | None = Field(None, description="of a core for an hour")
    price_gpu_hour: Price | None = Field(None, description="of a GPU for an hour")
    price_gb_month: Price = Field(0.0, description="of a GB stored for a month")

    def cost(self, nodes: int, found: Estimate) -> float | None:
        """What a job costs, its first month of storage counted in; None without prices."""
        if self.price_core_hour is None or (self.gpus and self.price_gpu_hour is None):
            return None
        node = self.cores * self.price_core_hour + self.gpus * (self.price_gpu_hour or 0.0)
        return (
            nodes * node * found.seconds / HOUR_S + found.written_bytes / 1e9 * self.price_gb_month
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    recipe_option(parser)
    parser.add_argument(
        "--samples", type=int, default=4_000_000, help="of the dataset (default: the paper's)"
    )
    add_options(parser, Setup)
    parser.add_argument(
        "--rates", type=path_here, metavar="FILE", help="measure nothing: use these"
    )
    parser.add_argument("--save", type=path_here, metavar="FILE", help="keep what was measured")
    parser.add_argument("--json", action="store_true", help="everything, for machines")


def run(options: argparse.Namespace) -> int:
    """Measure or read rates, then print the estimate."""
    require_samples(options.samples)
    setup = checked(Setup, options_of(options, Setup), "estimate")
    recipe = load_recipe(options.recipe)
    if options.rates:
        rates = rate_files.read(options.rates, recipe)
    else:
        require_device(setup.device)
        require_device(setup.teacher_device, "--teacher-device")
        rates = measure(recipe, parse_roots(options.corpus, recipe), setup)
    if options.save:
        rate_files.save(rates, options.save)
    of = partial(predict, rates, options.samples, recipe.shard_samples)
    limit = setup.store_gbit * GIGABIT
    found = [of(n * setup.cores, n * setup.gpus, limit) for n in setup.nodes]
    if options.json:
        rows = [
            {"nodes": nodes, **asdict(each), "cost": setup.cost(nodes, each)}
            for nodes, each in zip(setup.nodes, found, strict=True)
        ]
        told = {"rates": rates.model_dump(mode="json"), "estimates": rows}
        print(json.dumps(told, indent=1))
    else:
        print("\n".join(lines(recipe, options.samples, rates, setup, found)))
    return 0


# --- measured -------------------------------------------------------------------------------------


def measure(recipe: Recipe, roots: Roots, setup: Setup) -> Rates:
    """Make some samples of a recipe in several processes and time the stages.

    In all of them at once, because memory and clock rates are shared.
    """
    each, workers = setup.measure, setup.workers
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(
            recipe,
            roots,
            Path(folder) / "out",
            each * workers,
            device=setup.device,
            teacher_device=setup.teacher_device,
        )
        parts = [range(i * each, (i + 1) * each) for i in range(workers)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context) as pool:
            found = list(pool.map(partial(_measure_part, job, time.time()), parts))
    names = sorted({name for stages, _, _ in found for name in stages})
    stage_s = {
        name: float(np.mean([stages.get(name, 0) for stages, _, _ in found])) for name in names
    }
    gpu_s = {TEACHER: stage_s.pop(TEACHER)} if setup.teacher_device != "cpu" else {}
    return Rates(
        about=f"{platform.machine()}, {workers} workers at once, {each * workers} samples",
        recipe=recipe.name,
        recipe_sha256=rate_files.cost_sha256(recipe),
        start_s=float(np.mean([start_s for _, start_s, _ in found])),
        core_s=stage_s,
        gpu_s=gpu_s,
        sample_bytes=float(np.mean([sample_bytes for _, _, sample_bytes in found])),
    )


class TimedWorker(Worker):
    """A worker that stands between itself and its teacher and processors, so that they are timed.

    ``seconds`` are those of each stage.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.seconds = defaultdict[str, float](float)
        self.name, self.weights_sha256 = self.teacher.name, self.teacher.weights_sha256

    @contextmanager
    def timed(self, stage: str, within: str = "") -> Iterator[None]:
        """Add the block's seconds to a stage, and take them from the one that it is ``within``."""
        began = time.perf_counter()
        try:
            yield
        finally:  # a dropped sample is an exception
            seconds = time.perf_counter() - began
            self.seconds[stage] += seconds
            if within:
                self.seconds[within] -= seconds

    def run(self, kind: str, waves_BT: Waves, params: Sequence[Params]) -> Waves:
        with self.timed(kind, within="read and mix"):
            return self.guard.run(kind, waves_BT, params)

    def score(self, waves_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        with self.timed(TEACHER, within="encode"):
            return self.teacher.score(waves_BT)

    def make(self, rows: range) -> list[Row]:
        with self.timed("read and mix"):
            rendered = render_group(self.job.plans(rows), self.job.roots, self.run)
        with self.timed("encode"):
            return label.label_group(self, rendered)

    def commit(self, rows: Sequence[Row]) -> int:
        """Write a shard that nobody keeps; bytes of its tar."""
        with tempfile.TemporaryDirectory() as folder, self.timed("commit"):
            record = shards.commit(Path(folder), 0, rows, self.job.dataset_hash, 1.0)
        if not record.samples:
            raise UserError("every sample that was measured was dropped; see what `shards` says")
        return record.tar_bytes


def _measure_part(job: Job, began: float, rows: range) -> tuple[dict[str, float], float, float]:
    """Seconds a sample by stage, seconds from ``began`` to the first sample, bytes a sample."""
    worker, size = TimedWorker(job), job.recipe.group_samples
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    with worker.guard:
        worker.make(groups[0])  # loads what is loaded when it is first used
        start_s = time.time() - began
        worker.seconds.clear()
        tar_bytes = worker.commit([row for group in groups for row in worker.make(group)])
    each = {stage: max(seconds, 0.0) / len(rows) for stage, seconds in worker.seconds.items()}
    return each, start_s, tar_bytes / len(rows)


# --- shown ----------------------------------------------------------------------------------------


def lines(
    recipe: Recipe, samples: int, rates: Rates, setup: Setup, found: Sequence[Estimate]
) -> Iterator[str]:
    """The estimate as tables, and what it assumes."""
    shard_count = -(-samples // recipe.shard_samples)
    yield (
        f"{recipe.name}: {samples} samples ({samples * CLIP_HOURS:.0f} h) in {shard_count} shards "
        f"of {recipe.shard_samples}, {found[0].written_bytes / 1e9:.1f} GB"
    )
    yield f"rates: {rates.about or 'of an unnamed machine'}"
    yield from ("", *_stages(rates), "")
    yield (
        f"{'nodes':>6}{'cores':>8}{'GPUs':>6}{'x real time':>13}{'hours':>10}{'core-hours':>12}"
        f"{'GPU-hours':>11}{'cost':>11}  bottleneck"
    )
    for nodes, each in zip(setup.nodes, found, strict=True):
        cores, gpus, hours = nodes * setup.cores, nodes * setup.gpus, each.seconds / HOUR_S
        cost = setup.cost(nodes, each)
        yield (
            f"{nodes:>6}{cores:>8}{gpus:>6}{samples * CLIP_HOURS / hours:>13.0f}{hours:>10.2f}"
            f"{cores * hours:>12.0f}{gpus * hours:>11.0f}"
            f"{'?' if cost is None else f'{cost:.0f}':>11}  {each.bottleneck}"
        )
    yield ""
    yield "assumed: one worker a core, everything as fast as what was measured, nothing fails;"
    yield "cores, GPUs and the store work at the same time, and the slowest decides"
    if setup.price_core_hour is None:
        yield "cost needs prices: --price-core-hour, --price-gpu-hour, --price-gb-month"


def _stages(rates: Rates) -> Iterator[str]:
    whole = sum(rates.core_s.values())
    yield f"{'stage':18}{'core-s/sample':>15}{'share':>8}{'x real time':>13}"
    for name, seconds in {**rates.core_s, "a core": whole}.items():
        share, speed = _ratio(seconds, whole), _ratio(CLIP_S, seconds)
        yield f"{name:18}{seconds:>15.4f}{share:>8.1%}{speed:>13.1f}"
    for name, seconds in rates.gpu_s.items():
        yield f"{name:13} GPU{seconds:>16.4f}{'':>8}{_ratio(CLIP_S, seconds):>13.1f}"


def _ratio(amount: float, of: float) -> float:
    return amount / of if of else math.inf
