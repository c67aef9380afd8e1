"""The throughput model against real runs: ``python -m tests.bench estimate``.

``estimate`` calibrates in a process of its own, as a user's would, alone and with two workers at
once. Then the whole command is run with one and with two workers, and its seconds are held to what
was predicted. Nothing else may run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_specs.recipe import load_recipe
from pipeline.cluster import rates as measured
from pipeline.cluster.stand_ins import default_corpora
from pipeline.cluster.throughput import Cluster, Rates, predict
from pipeline.options import parse_roots
from tests.bench.pipeline import Setting, timed_command

GOAL = 0.15
WORKERS = (1, 2)


def main(argv: Sequence[str]) -> int:
    """Print predicted and measured seconds; exit status 1 where they differ by more."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench estimate", description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each turn of calibration")
    parser.add_argument("--repeat", type=int, default=1, help="medians are quoted")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    options = parser.parse_args(argv)
    recipe = load_recipe(options.recipe)
    with tempfile.TemporaryDirectory() as folder:
        roots = parse_roots(options.corpus, recipe) or default_corpora(Path(folder))
        setting = Setting(roots, Path(folder), options.samples, options.repeat)
        rates = _calibrated(setting, options)
        print(
            f"{options.samples} samples of {options.recipe}, engine {options.engine}: {rates.about}"
        )
        print(f"{'workers':>8}{'predicted, s':>14}{'measured, s':>13}{'off by':>9}")
        worst = 0.0
        for workers in WORKERS:
            separate = workers > 1 or options.engine == "ray"
            cluster = Cluster(cores=workers, separate=separate)
            predicted = predict(recipe, rates, options.samples, cluster).seconds
            seconds = statistics.median(
                timed_command(setting, options.engine, workers, options.samples, options.recipe)[0]
                for _ in range(options.repeat)
            )
            off = predicted / seconds - 1
            worst = max(worst, abs(off))
            print(f"{workers:>8}{predicted:>14.1f}{seconds:>13.1f}{off:>9.1%}", flush=True)
    print(f"off by {worst:.1%} at most (goal {GOAL:.0%})")
    return 0 if worst <= GOAL else 1


def _calibrated(setting: Setting, options: argparse.Namespace) -> Rates:
    path = setting.folder / "rates.yaml"
    folders = [f"--corpus={name}={f}" for name, dirs in setting.roots.items() for f in dirs]
    command = [sys.executable, "-m", "pipeline", "estimate", options.recipe, *folders]
    command += ["--seconds", str(options.seconds), "--workers", str(max(WORKERS))]
    command += ["--nodes", "1", "--save", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    print(done.stdout)
    return measured.read(path)
