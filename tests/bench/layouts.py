"""Training with channels last and channels first, in turns. ``python -m tests.bench layouts``.

A row for each student: median seconds of a forward and backward pass of random clips, and how many
times as fast channels first are. ``train.models.student.training_layout`` follows from it.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from timeit import timeit

import torch
from torch import Tensor

from data_specs.io.progress import progress_bar
from data_specs.sample import CROP_SAMPLES
from train.models.student import VARIANTS, Student, training_layout, variant

LAYOUTS = (torch.channels_last, torch.contiguous_format)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench layouts``."""
    parser.add_argument("--student", nargs="+", choices=VARIANTS, default=["v1", "v2", "v5", "v7"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)


def learn(student: Student, waves_BT: Tensor) -> None:
    """The passes of one step of training."""
    student.zero_grad()
    student(waves_BT).square().mean().backward()


def run(args: argparse.Namespace) -> int:
    """``python -m tests.bench layouts``; returns the exit code."""
    torch.set_num_threads(args.threads)
    waves_BT = 0.1 * torch.randn(args.batch, CROP_SAMPLES)
    for name in args.student:
        works = []
        for layout in LAYOUTS:
            student = Student(variant(name)).train()
            student.lay_out(layout)
            works.append(partial(learn, student, waves_BT))
        turns = progress_bar(range(args.repeats + 1), desc=name)
        pairs = [[timeit(work, number=1) for work in works] for _ in turns][1:]
        last_s, first_s = (statistics.median(side) for side in zip(*pairs, strict=True))
        gain = statistics.median(last / first for last, first in pairs)
        taken = training_layout(variant(name), torch.device("cpu"))
        print(
            f"{name}, {args.batch} clips: channels last {last_s:.3f} s, first {first_s:.3f} s: "
            f"{gain:.2f} times as fast; training takes {str(taken).removeprefix('torch.')}"
        )
    return 0
