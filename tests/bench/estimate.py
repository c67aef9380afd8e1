"""The estimate against real runs: ``python -m tests.bench estimate``.

``estimate`` measures in a process of its own, as a user's would, with as many workers as are then
used. The whole command is run, and its seconds are held to what was predicted. Nothing else may run
on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from data_specs.recipe import load_recipe
from pipeline.cluster import rates
from pipeline.options import parse_roots
from tests.bench import command, said_by
from tests.bench.pipeline import Setting, timed_command
from tests.bench.stand_ins import default_corpora

GOAL = 0.15
WORKERS = (1, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench estimate``."""
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--measure", type=int, default=150, help="samples measured, of each worker")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")


def run(options: argparse.Namespace) -> int:
    """Print predicted and measured seconds; exit status 1 where they differ by more."""
    recipe = load_recipe(options.recipe)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        roots = parse_roots(options.corpus, recipe) or default_corpora(Path(folder))
        setting = Setting(roots, Path(folder), options.samples, 1)
        print(f"{'workers':>8}{'predicted, s':>14}{'measured, s':>13}{'off by':>9}")
        for workers in WORKERS:
            path = setting.folder / "rates.yaml"
            size = ("--measure", options.measure, "--workers", workers, "--save", path)
            said_by(command("pipeline", "estimate", options.recipe, *size, roots=roots))
            known = rates.read(path, recipe)
            shard = recipe.shard_samples
            predicted = rates.predict(known, options.samples, shard, workers).seconds
            seconds, _ = timed_command(
                setting, options.engine, workers, options.samples, options.recipe
            )
            off = predicted / seconds - 1
            worst = max(worst, abs(off))
            print(f"{workers:>8}{predicted:>14.1f}{seconds:>13.1f}{off:>9.1%}", flush=True)
    print(f"off by {worst:.1%} at most (goal {GOAL:.0%})")
    return 0 if worst <= GOAL else 1
