"""How much less training the fast preset needs than the paper's. ``python -m tests.bench presets``.

Trains one student twice on the same shards: with the paper's settings for ``--steps`` steps, and
with the fast preset for a quarter of them (its cosine ends there). Then asks after how many clips
the fast run's validation error was first as low as the paper run's lowest, and after how many
seconds. Both are ordinary run folders under ``--out``: interrupted, the same command goes on.

The paper trains for 250 000 steps, and its students improve over all of them: what is
compared here is the budget that was asked for.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from data_specs.io.addresses import path_here
from data_specs.sample import CROP_SAMPLES
from train.data.sources import Sources, open_sources
from train.loop.loop import Host
from train.models.student import count, variant
from train.student.fit import fit
from train.student.presets import FitConfig, make_config

FRACTION = 4
"""The fast run has this many times fewer steps."""


@dataclass(frozen=True)
class Point:
    """One validation: clips trained on, seconds of training, mean squared error."""

    clips: int
    seconds: float
    loss: float


def curve(out: Path, config: FitConfig) -> list[Point]:
    """The validations of a finished run, from its log; seconds are those of training alone."""
    points, seconds, before = [], 0.0, 0
    for line in map(json.loads, (out / "log.jsonl").read_text("utf-8").splitlines()):
        if "samples_per_s" in line:
            seconds += (line["step"] - before) * config.batch / line["samples_per_s"]
            before = line["step"]
        elif line["validation_loss"] is not None:
            points.append(Point(line["step"] * config.batch, seconds, line["validation_loss"]))
    return points


def table(student: str, paper: list[Point], fast: list[Point]) -> str:
    """What both reached, and with how much."""
    lowest = min(paper, key=lambda point: point.loss)
    first = next((point for point in fast if point.loss <= lowest.loss), None)
    best = min(fast, key=lambda point: point.loss)
    lines = [
        f"{student}, lowest validation error (mean squared, MOS) and the clips and seconds to it",
        f"paper  {lowest.loss:.4f}  {lowest.clips:9,} clips  {lowest.seconds:7.0f} s",
        f"fast   {best.loss:.4f}  {best.clips:9,} clips  {best.seconds:7.0f} s",
    ]
    if first is None:
        lines.append(f"the fast preset did not reach {lowest.loss:.4f}")
    else:
        lines.append(
            f"that error after {first.clips:,} clips and {first.seconds:.0f} s: "
            f"{lowest.clips / first.clips:.1f} times less compute, "
            f"{lowest.seconds / max(first.seconds, 1e-9):.1f} times less time"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench presets``."""
    parser.add_argument("--student", default="v1")
    parser.add_argument("--shards", required=True)
    parser.add_argument("--validation")
    parser.add_argument("--steps", type=int, default=8000, help="steps of the paper's run")
    parser.add_argument("--out", type=path_here, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _config(args: argparse.Namespace, sources: Sources, preset: str) -> FitConfig:
    steps = args.steps if preset == "paper" else max(1, args.steps // FRACTION)
    return make_config(
        args.student,
        sources,
        preset,
        steps=steps,
        validate_every=max(1, args.steps // (16 * FRACTION)),
        warmup=min(200, steps // 10) if preset == "fast" else None,
    )


def run(args: argparse.Namespace) -> int:
    """``python -m tests.bench presets``; returns the exit code."""
    sources = open_sources(args.shards, args.validation)
    host = Host(workers=args.workers, device=args.device, log_every=10)
    parameters, macs = count(variant(args.student))
    print(
        f"{args.student}: {parameters:,} parameters, {macs / 1e6:.0f} M multiply-adds for each "
        f"clip of {CROP_SAMPLES / 16_000} s"
    )
    curves = {}
    for preset in ("fast", "paper"):
        config = _config(args, sources, preset)
        fit(config, sources, args.out / preset, host)
        curves[preset] = curve(args.out / preset, config)
    print(table(args.student, curves["paper"], curves["fast"]))
    return 0
