"""Measure against named baselines, as ratios within one run: ``python -m tests.bench NAME``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from data_specs.io.cli import run_command

NAMES = {
    "pipeline": "engines against each other, memory of short and long runs",
    "processors": "the paper's processors against the packages' own calls, on one core",
    "codecs": "what each codec does to speech at each rate: DistillMOS, level, delay, speed",
    "machines": "what other thread counts and instruction sets make of the same samples",
    "scale": "a dataset of 4 million samples without its audio",
    "estimate": "the estimate of time against real runs",
    "filling": "what teachers should hear behind short clips, against people's ratings",
    "folds": "front ends of a teacher, its head by folds of whole conditions",
    "gpu": "all that needs a GPU, in order of worth; --device cpu --small rehearses it",
    "layouts": "training with channels last against channels first",
    "loader": "how fast shards are read, against decoding alone",
    "presets": "the fast preset's training against the paper's",
    "prune": "a round of pruning the 2B model: memory, seconds, an estimate",
    "score": "scoring against the distillmos package: speed, differences, memory",
    "speakers": "the equal error rate of Resemblyzer on labelled clips",
    "teacher": "the XLS-R teacher's speed, memory and precision",
}


def main(argv: Sequence[str]) -> int:
    """Run one benchmark with the options behind its name."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:11} {about}" for name, about in NAMES.items()),
    )
    parser.add_argument("name", choices=NAMES)
    name = parser.parse_args(argv[:1]).name
    return run_command(lambda: _run(name, argv[1:]))


def _run(name: str, argv: Sequence[str]) -> int:
    bench = importlib.import_module(f"tests.bench.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.bench {name}", description=bench.__doc__
    )
    bench.add_arguments(parser)
    return int(bench.run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
