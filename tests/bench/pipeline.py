"""Speed as ratios against named baselines, all within one run: ``python -m tests.bench pipeline``.

Every engine run is the whole command in a process of its own, so that start-up counts and memory
is that of all its processes together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import yaml

from data_specs.recipe import load_recipe
from pipeline.options import parse_roots
from pipeline.render.render import Roots
from tests.bench import command, run_parts
from tests.bench.stand_ins import default_corpora

RECIPE = "demo"
EQUAL_PRIORITY = {"RAY_worker_niceness": "0"}
"""Ray starts its workers at nice 15, and whatever else runs would then slow only them."""

MEMORY_SHARD = 100
LOOK_SECONDS = 5.0
"""How often memory is looked at: of the 16 processes of a Ray run it takes .1 s of a core."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench pipeline``."""
    parser.add_argument("what", nargs="*", default=["engines", "memory"], help="engines, memory")
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--samples", type=int, default=2000, help="of an engine run")
    parser.add_argument("--repeat", type=int, default=3, help="engine runs; medians are quoted")


def run(args: argparse.Namespace) -> int:
    """Print a table a bench."""
    with tempfile.TemporaryDirectory() as folder:
        roots = parse_roots(args.corpus, load_recipe(RECIPE)) or default_corpora(Path(folder))
        setting = Setting(roots, Path(folder), args.samples, args.repeat)
        parts = {"engines": bench_engines, "memory": bench_memory}
        return run_parts(args.what, {name: partial(one, setting) for name, one in parts.items()})


@dataclass(frozen=True)
class Setting:
    """What all benches share."""

    roots: Roots
    folder: Path
    samples: int
    repeat: int


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
        options = ["--samples", samples, "--engine", engine, "--workers", workers, "--out", out]
        words = command("pipeline", "shards", recipe, *options, roots=setting.roots)
        began = time.perf_counter()
        process = subprocess.Popen(
            words,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **EQUAL_PRIORITY},
        )
        with _Peak(psutil.Process(process.pid)) as peak:
            _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)} failed:\n{errors[-2000:]}")
        return time.perf_counter() - began, peak.bytes / 1e6


class _Peak:
    """Highest memory of a process and its children, shared pages counted once (PSS)."""

    def __init__(self, process: psutil.Process) -> None:
        self.process, self.bytes = process, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
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
