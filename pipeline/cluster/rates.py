"""The calibration: what each stage costs on this machine, measured on the recipe's own samples.

Groups are rendered, scored and committed by the functions that a worker calls, processors in their
child process as there; a clock stands between the stages. Alone first, then in as many processes
at once as the machine has cores, for memory and clock rates are shared.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from data_specs.io.errors import UserError
from data_specs.io.files import whole_file
from data_specs.recipe import Recipe
from data_specs.strict import load, unknown
from pipeline.cluster.throughput import CLIP_S, TEACHER, Rates, uses
from pipeline.dataset import shards
from pipeline.dataset.job import Job, use_one_thread
from pipeline.dataset.shards import Row
from pipeline.render import label
from pipeline.render.guard import Guard
from pipeline.render.plan import SamplePlan
from pipeline.render.processors.interface import Params, Waves
from pipeline.render.processors.runtime import Runtime
from pipeline.render.render import render_group

LEAST_SAMPLES = 8
"""Of a processor that few samples meet: as many are timed at least, or its rate is luck."""


@dataclass
class Clock:
    """Seconds and samples by stage."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    samples: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def timing(self, name: str, samples: int) -> Iterator[None]:
        """Add what the block takes."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began
        self.samples[name] += samples

    def each(self, name: str) -> float:
        """Seconds of one sample."""
        return self.seconds[name] / max(self.samples[name], 1)


class Bench:
    """A worker with a clock, and its own teacher (``label.Teacher``) so that scores are timed.
    ``clock`` is begun anew once everything is loaded."""

    def __init__(self, job: Job) -> None:
        began = time.perf_counter()
        self.job, self.clock = job, Clock()
        self.guard = Guard(Runtime(job.device, job.recipe.precision), job.time_limit_s)
        use_one_thread()
        self.teacher = label.load(job.recipe.teacher, job.label_device)
        self.name, self.weights_sha256 = self.teacher.name, self.teacher.weights_sha256
        self.rows: list[Row] = []
        self.inside_s = 0.0
        self.loaded_s = time.perf_counter() - began

    def run(self, kind: str, waves_BT: Waves, params: Sequence[Params]) -> Waves:
        """A processor over a group, timed."""
        began = time.perf_counter()
        with self.clock.timing(kind, len(waves_BT)):
            waves_BT = self.guard.run(kind, waves_BT, params)
        self.inside_s += time.perf_counter() - began
        return waves_BT

    def score(self, waves_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The teacher's scores, timed."""
        with self.clock.timing(TEACHER, len(waves_BT)):
            return self.teacher.score(waves_BT)

    def make(self, rows: range) -> None:
        """Render and label a group, as ``job.Worker`` does."""
        with self.clock.timing("render", len(rows)):
            rendered = render_group(self.job.plans(rows), self.job.roots, self.run)
        with self.clock.timing("label", len(rows)):
            self.rows += label.label_group(self, rendered)

    def rare(self, plans: Sequence[SamplePlan]) -> None:
        """Time the processors that too few samples have met, on those among ``plans`` that do."""
        kinds = {step.kind for plan in plans for step in plan.steps}
        for kind in sorted(kind for kind in kinds if self.clock.samples[kind] < LEAST_SAMPLES):
            params = [s.params for plan in plans for s in plan.steps if s.kind == kind]
            wave = np.sin(np.arange(int(CLIP_S * 16_000)) * 0.3).astype(np.float32) * 0.1
            self.run(kind, np.stack([wave] * len(params[:LEAST_SAMPLES])), params[:LEAST_SAMPLES])

    def commit(self) -> tuple[float, float]:
        """Seconds of a whole shard's commit, and the bytes of a sample in it."""
        good = [row for row in self.rows if not row.reason]
        if not good:
            raise UserError("calibration: every sample was dropped; see what `shards` says")
        size = self.job.recipe.shard_samples
        rows = [good[i % len(good)] for i in range(size)]
        with tempfile.TemporaryDirectory(dir=self.job.out) as folder:
            began = time.perf_counter()
            record = shards.commit(Path(folder), 0, rows, self.job.dataset_hash, 1.0)
            return time.perf_counter() - began, record.tar_bytes / size


def measure(job: Job, seconds: float) -> Rates:
    """Rates of one worker alone, from about so many seconds of work."""
    bench = Bench(job)
    try:
        groups = _groups(job)
        began = time.perf_counter()
        bench.make(next(groups))  # loads what is loaded when it is first used
        first_s = time.perf_counter() - began
        bench.clock, bench.rows, bench.inside_s = Clock(), [], 0.0
        deadline = time.perf_counter() + seconds
        made = 0
        while made < 2 or time.perf_counter() < deadline:
            bench.make(next(groups))
            made += 1
        inside_s = bench.inside_s
        bench.rare(job.plans(range(min(job.recipe.shard_samples, 500))))
        return _rates(bench, inside_s, max(first_s - _group_s(bench), 0.0))
    finally:
        bench.guard.close()


def _groups(job: Job) -> Iterator[range]:
    """Groups of the first shard, over and over."""
    whole = replace(job, samples=job.recipe.shard_samples)
    while True:
        yield from whole.groups(0)


def _group_s(bench: Bench) -> float:
    clock = bench.clock
    return (clock.each("render") + clock.each("label")) * bench.job.recipe.group_samples


def _rates(bench: Bench, inside_s: float, warm_s: float) -> Rates:
    clock = bench.clock
    kinds = {kind for kind in clock.samples if kind not in ("render", "label", TEACHER)}
    rendered, labelled = clock.samples["render"], clock.samples["label"]
    commit_s, written = bench.commit()
    on_gpu = bench.job.label_device.startswith("cuda")
    return Rates(
        about=f"{platform.machine()}, {_cpu()}, measured alone",
        driver_s=0.0,
        worker_s=bench.loaded_s + warm_s,
        mix_s=max(clock.seconds["render"] - inside_s, 0.0) / rendered,
        processors={kind: clock.each(kind) for kind in sorted(kinds)},
        encode_s=max(clock.seconds["label"] - clock.seconds[TEACHER], 0.0) / labelled,
        teacher_s=None if on_gpu else clock.each(TEACHER),
        commit_s_per_shard=commit_s,
        bytes_written=written,
        bytes_read=bytes_read(bench.job),
        gpu={TEACHER: clock.each(TEACHER)} if on_gpu else {},
    )


def _cpu() -> str:
    """The processor's name, as the kernel has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def bytes_read(job: Job) -> float:
    """Bytes of the corpora that a sample reads: crops of speech and noise, whole rooms."""
    recipe, found = job.recipe, 0.0
    shares = {
        "speech": 1.0 - (recipe.voices.share if recipe.voices else 0.0),
        "voices": recipe.voices.share if recipe.voices else 0.0,
        "noise": recipe.noise.probability if recipe.noise else 0.0,
        "rooms": recipe.room.probability if recipe.room else 0.0,
    }
    for role, source in recipe.sources.present().items():
        table = job.manifests[source.corpus].usable
        frames, rate = table["frames"].to_numpy(), table["sample_rate_hz"].to_numpy()
        size = table["size_bytes"].to_numpy()
        seconds = frames / rate
        part = 1.0 if role == "rooms" else np.minimum(CLIP_S / seconds, 1.0)
        weight = np.ones_like(seconds) if role == "rooms" else seconds  # longer: drawn more often
        found += shares[role] * float(np.average(size * part, weights=weight))
    return found


def together(job: Job, alone: Rates, workers: int, seconds: float) -> Rates:
    """``alone`` with how much longer ``workers`` processes take at once, and what they cost more
    to start."""
    if workers <= 1:
        return alone
    context = multiprocessing.get_context("spawn")
    began = time.time()
    with ProcessPoolExecutor(workers, context) as pool:
        answers = [pool.submit(_measure_there, job, seconds) for _ in range(workers)]
        found = [answer.result() for answer in answers]
    slow = float(np.mean([_work_s(rates, job) / _work_s(alone, job) for rates, _ in found]))
    return alone.model_copy(
        update={
            "together": max(slow, 1.0),
            "cores": workers,
            "import_s": float(np.mean([entered - began for _, entered in found])),
            "about": alone.about.replace("measured alone", f"alone and {workers} at once"),
        }
    )


def _measure_there(job: Job, seconds: float) -> tuple[Rates, float]:
    entered = time.time()
    return measure(job, seconds), entered


def _work_s(rates: Rates, job: Job) -> float:
    """Core-seconds of a sample in which each processor counts by its share."""
    shares = uses(job.recipe)
    inside = sum(shares.get(kind, 0.0) * s for kind, s in rates.processors.items())
    teacher_s = rates.gpu[TEACHER] if rates.teacher_s is None else rates.teacher_s
    return rates.mix_s + inside + rates.encode_s + teacher_s


def since_start() -> float:
    """Seconds since this process was started: what a driver takes until its workers begin."""
    return time.time() - psutil.Process(os.getpid()).create_time()


def save(rates: Rates, path: Path) -> None:
    """Write rates as YAML."""
    with whole_file(path) as file:
        file.write(yaml.safe_dump(rates.model_dump(mode="json"), sort_keys=False).encode())


def read(path: Path) -> Rates:
    """Rates of a file. ``ValueError`` naming the field that is wrong."""
    return load(Rates, path)


def given(options: Sequence[str], flag: str) -> dict[str, float]:
    """Seconds a sample from ``NAME=X`` options, X in times real time. ``ValueError`` if wrong."""
    found: dict[str, float] = {}
    for option in options:
        name, equals, text = option.partition("=")
        try:
            speed = float(text) if equals else 0.0
        except ValueError:
            speed = 0.0
        if not speed > 0:
            raise UserError(f"{flag} {option}: write NAME=X, X in times real time, above 0")
        found[name] = CLIP_S / speed
    return found


def require_known(rates: Rates, names: Iterable[str], recipe: Recipe) -> None:
    """``ValueError`` for the name of a rate that neither the recipe nor ``rates`` know."""
    known = {TEACHER, *recipe.kinds(), *rates.processors, *rates.gpu} - {"none"}
    for name in names:
        if name not in known:
            raise UserError(unknown("rate", name, known))


def with_given(rates: Rates, cpu: dict[str, float], gpu: dict[str, float]) -> Rates:
    """``rates`` with those that a user gives; ``teacher`` is one of the names."""
    changes: dict[str, Any] = {
        "processors": rates.processors | {k: s for k, s in cpu.items() if k != TEACHER},
        "gpu": rates.gpu | gpu,
        "missing": tuple(kind for kind in rates.missing if kind not in {*cpu, *gpu}),
    }
    if TEACHER in cpu:
        changes["teacher_s"] = cpu[TEACHER]
    return rates.model_copy(update=changes)
