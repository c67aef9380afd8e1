"""Speed as ratios against named baselines, all within one run: ``python -m tests.bench pipeline``.

Every engine run is the whole command in a process of its own, so that start-up counts and memory
is that of all its processes together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import yaml
from pydantic import TypeAdapter

from data_specs.io.errors import UserError
from data_specs.processors import Processor as Spec
from data_specs.recipe import load_recipe
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from pipeline.dataset.prepare import scan_all
from pipeline.options import parse_roots
from pipeline.render import processors as degrade
from pipeline.render.plan import BLOCK, Tables, make_table, plan_block, plan_range
from pipeline.render.processors import PROCESSORS
from pipeline.render.render import Roots
from tests.bench.stand_ins import default_corpora

RECIPE = "demo"
EQUAL_PRIORITY = {"RAY_worker_niceness": "0"}
"""Ray starts its workers at nice 15, and whatever else runs would then slow only them."""

MEMORY_SHARD = 100
CLIP_SECONDS = CROP_SAMPLES / SAMPLE_RATE


def main(argv: Sequence[str]) -> int:
    """Run the named benches (all without a name) and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench pipeline", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="plan|processors|engines|memory",
        help="or scale, estimate, machines: each alone, options of its own (bench scale --help)",
    )
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--samples", type=int, default=2000, help="of an engine run")
    parser.add_argument("--repeat", type=int, default=3, help="engine runs; medians are quoted")
    options = parser.parse_args(argv)
    unknown = set(options.names) - set(BENCHES)
    if unknown:
        parser.error(f"no bench {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    with tempfile.TemporaryDirectory() as folder:
        roots = parse_roots(options.corpus, load_recipe(RECIPE)) or default_corpora(Path(folder))
        setting = Setting(roots, Path(folder), options.samples, options.repeat)
        for name in options.names or list(BENCHES):
            BENCHES[name](setting)
    return 0


@dataclass(frozen=True)
class Setting:
    """What all benches share."""

    roots: Roots
    folder: Path
    samples: int
    repeat: int


# --- planning and processors ----------------------------------------------------------------------


def bench_plan(setting: Setting, count: int = 1_000_000) -> None:
    """Plan a million samples, as columns and one object a sample."""
    recipe = load_recipe(RECIPE)
    manifests = scan_all(recipe, setting.roots)
    tables: Tables = {
        role: make_table(manifests[source.corpus], source, role, "train")
        for role, source in recipe.sources.present().items()
    }
    print(f"\nplanning {count} samples of {RECIPE}.yaml on one core")
    print(f"{'':24}{'seconds':>10}{'peak growth, MB':>18}")

    def columns() -> None:
        for first in range(0, count, BLOCK):
            plan_block(recipe, tables, first, min(BLOCK, count - first))

    def objects() -> None:
        for _ in plan_range(recipe, tables, 0, count):
            pass

    for name, work in (("columns (verb plan)", columns), ("one plan at a time", objects)):
        before = psutil.Process().memory_info().rss
        with _Peak(psutil.Process(), 0.2) as peak:
            seconds = _seconds(work)
        print(f"{name:24}{seconds:>10.1f}{(peak.bytes - before) / 1e6:>18.0f}")


def bench_processors(setting: Setting) -> None:
    """Each processor on one core: groups as the pipeline runs them against one at a time."""
    import torch

    torch.set_num_threads(1)
    rng = np.random.Generator(np.random.Philox(0))
    group = load_recipe(RECIPE).group_samples
    waves_BT = (rng.standard_normal((group, CROP_SAMPLES)) * 0.05).astype(np.float32)
    print(f"\nprocessors, x real time on one core, groups of {group}")
    print(f"{'':20}{'one by one':>12}{'grouped':>12}{'ratio':>8}")
    for kind in sorted(PROCESSORS):
        spec = TypeAdapter(Spec).validate_python({"kind": kind})
        columns = PROCESSORS[kind].draw(spec, lambda name: np.linspace(0.05, 0.95, group), "bench")
        params = [{n: float(c[i]) for n, c in columns.items()} for i in range(group)]
        try:
            rates = _processor_rates(kind, waves_BT, params)
        except (UserError, ImportError, OSError) as error:  # its weights are not on this machine
            print(f"{kind:20}not measured: {str(error).splitlines()[0][:70]}")
            continue
        print(f"{kind:20}{rates[0]:>12.0f}{rates[1]:>12.0f}{rates[1] / rates[0]:>8.2f}")


def _processor_rates(
    kind: str, waves_BT: np.ndarray, params: list[dict[str, float]]
) -> tuple[float, float]:
    def single() -> None:
        for wave, p in zip(waves_BT, params, strict=True):
            degrade.run(kind, wave[None], [p])

    def grouped() -> None:
        degrade.run(kind, waves_BT, params)

    grouped()  # libraries load, filters are designed
    seconds = [max(min(_seconds(work) for _ in range(3)), 1e-6) for work in (single, grouped)]
    return tuple(len(waves_BT) * CLIP_SECONDS / s for s in seconds)  # type: ignore[return-value]


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- engines --------------------------------------------------------------------------------------


def bench_engines(setting: Setting) -> None:
    """The same samples by the local engine, by Ray with one worker, and by Ray with two."""
    kinds = {
        "local, 1 worker": ("local", 1),
        "ray, 1 worker": ("ray", 1),
        "ray, 2 workers": ("ray", 2),
    }
    print(f"\n{setting.samples} samples of {RECIPE}.yaml, whole commands, {setting.repeat} turns")
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    peaks: dict[str, float] = dict.fromkeys(kinds, 0.0)
    for _ in range(setting.repeat):
        for name, (engine, workers) in kinds.items():  # in turn: a slow hour hits all alike
            taken, peak = timed_command(setting, engine, workers, setting.samples)
            seconds[name].append(taken)
            peaks[name] = max(peaks[name], peak)
            print(
                f"  turn {len(seconds[name])}: {name:20}{taken:>8.1f} s{peak:>8.0f} MB", flush=True
            )
    print(f"{'':20}{'seconds (median)':>18}{'samples/s':>12}{'peak MB':>10}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name:20}{value:>18.1f}{setting.samples / value:>12.2f}{peaks[name]:>10.0f}")
    local, one, two = median.values()
    print(f"ray against local, one worker: {one / local:.3f} of its time (goal at most 1.05)")
    print(f"two workers against one: {one / two:.2f} times as fast (goal at least 1.8)")


def bench_memory(setting: Setting) -> None:
    """Peak memory of a run in which each worker makes one shard, and of one ten times as long.

    Shards are smaller than the recipe's, so that the long run takes minutes: what a worker holds of
    a shard is then less, and what it might not let go of weighs more.
    """
    print(f"\npeak memory of all processes, ray, 2 workers, shards of {MEMORY_SHARD}")
    recipe = load_recipe(RECIPE).model_copy(update={"shard_samples": MEMORY_SHARD})
    path = setting.folder / "memory.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    peaks = []
    for samples in (2 * MEMORY_SHARD, 20 * MEMORY_SHARD):
        seconds, peak = timed_command(setting, "ray", 2, samples, str(path))
        peaks.append(peak)
        print(f"{samples:>8} samples {peak:>8.0f} MB {seconds:>8.1f} s", flush=True)
    print(f"ten times as long: {peaks[1] / peaks[0]:.3f} of the memory (goal at most 1.10)")


def timed_command(
    setting: Setting, engine: str, workers: int, samples: int, recipe: str = RECIPE
) -> tuple[float, float]:
    """Run the command; seconds, and peak MB of it and all its children."""
    with tempfile.TemporaryDirectory(dir=setting.folder) as out:
        folders = [f"--corpus={n}={f}" for n, dirs in setting.roots.items() for f in dirs]
        command = [sys.executable, "-m", "pipeline", "shards", recipe, *folders, "--out", out]
        command += ["--samples", str(samples), "--engine", engine, "--workers", str(workers)]
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **EQUAL_PRIORITY},
        )
        with _Peak(psutil.Process(process.pid)) as peak:
            _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors[-2000:]}")
        return time.perf_counter() - began, peak.bytes / 1e6


class _Peak:
    """Highest memory of a process and its children, shared pages counted once (PSS).

    A look at the 16 processes of a Ray run takes 0.1 s of a core: every second would be too often.
    """

    def __init__(self, process: psutil.Process, every_seconds: float = 5.0) -> None:
        self.process, self.every_seconds, self.bytes = process, every_seconds, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.every_seconds):
            self.bytes = max(self.bytes, self._now())

    def _now(self) -> int:
        total = 0
        try:
            family = [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        for member in family:
            try:
                total += member.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it ended between the two looks
        return total


BENCHES: dict[str, Callable[[Setting], None]] = {
    "plan": bench_plan,
    "processors": bench_processors,
    "engines": bench_engines,
    "memory": bench_memory,
}
