"""The estimate against real runs: ``python -m tests.bench estimate``.

``estimate`` measures in a process of its own, as a user's would, with as many workers as are then
used. The whole command is run, and its seconds are held to what was predicted. Nothing else may run
on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_specs.recipe import Recipe, load_recipe
from pipeline.cluster import rates
from pipeline.options import parse_roots
from tests.bench.pipeline import Setting, timed_command
from tests.bench.stand_ins import default_corpora

GOAL = 0.15
WORKERS = (1, 2)


def main(argv: Sequence[str]) -> int:
    """Print predicted and measured seconds; exit status 1 where they differ by more."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench estimate", description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--measure", type=int, default=150, help="samples measured, of each worker")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    options = parser.parse_args(argv)
    recipe = load_recipe(options.recipe)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        roots = parse_roots(options.corpus, recipe) or default_corpora(Path(folder))
        setting = Setting(roots, Path(folder), options.samples, 1)
        print(f"{'workers':>8}{'predicted, s':>14}{'measured, s':>13}{'off by':>9}")
        for workers in WORKERS:
            known = _measured(setting, recipe, options, workers)
            size = recipe.shard_samples
            predicted = rates.predict(known, options.samples, size, workers).seconds
            seconds, _ = timed_command(
                setting, options.engine, workers, options.samples, options.recipe
            )
            off = predicted / seconds - 1
            worst = max(worst, abs(off))
            print(f"{workers:>8}{predicted:>14.1f}{seconds:>13.1f}{off:>9.1%}", flush=True)
    print(f"off by {worst:.1%} at most (goal {GOAL:.0%})")
    return 0 if worst <= GOAL else 1


def _measured(
    setting: Setting, recipe: Recipe, options: argparse.Namespace, workers: int
) -> rates.Rates:
    path = setting.folder / "rates.yaml"
    folders = [f"--corpus={name}={f}" for name, dirs in setting.roots.items() for f in dirs]
    command = [sys.executable, "-m", "pipeline", "estimate", options.recipe, *folders]
    command += ["--measure", str(options.measure), "--workers", str(workers), "--save", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return rates.read(path, recipe)
