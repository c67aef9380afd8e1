"""What teachers should hear behind short clips, and which: ``python -m tests.bench filling``.

Rated clips, whole and cropped, are scored with zeros behind them, repeated end to beginning with
a hard seam, and repeated with a cross-fade (``data_specs.io.waves.filled``); Pearson's correlation
to people's ratings of the whole clip, by clip.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from data_specs.io.addresses import path_here
from data_specs.io.progress import progress_bar
from data_specs.io.waves import Wave, filled
from data_specs.rated import RatedClip, read_rated
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.audio import read_mono, to_16k
from train.evaluation.lengths import crop_start
from train.metrics import agreement
from train.models.teacher import load_teacher

FILLINGS: dict[str, Callable[[Wave], Wave]] = {
    "zeros": lambda wave_T: filled(wave_T, "zero"),
    "hard seam": lambda wave_T: np.resize(wave_T, CROP_SAMPLES),
    "cross-fade": lambda wave_T: filled(wave_T, "repeat"),
}
TEACHERS = ("distillmos", "dnsmos-p808")
SHARE = 1 / 3
"""Of DNSMOS P.808 in the teacher ``open``."""


def scored(clips: Sequence[RatedClip], seconds: float | None) -> dict[str, list[float]]:
    """Scores of every clip (or of its crop), by teacher and filling; and the ratings."""
    teachers = {name: load_teacher(name, precision="fp32") for name in TEACHERS}
    found: dict[str, list[float]] = {"people": []}
    for number, clip in enumerate(progress_bar(clips, desc=f"{seconds or 'whole'} s")):
        wave_T = to_16k(*read_mono(clip.path))[:CROP_SAMPLES]
        if seconds:
            length = min(round(seconds * SAMPLE_RATE), len(wave_T))
            start = crop_start(wave_T, length, 0, number)
            if start is None:
                continue
            wave_T = wave_T[start : start + length]
        found["people"].append(clip.mos)
        for filling, fill in FILLINGS.items():
            given_BT = np.asarray(fill(wave_T), np.float32)[None]
            scores = [float(teacher.score(given_BT)[0][0]) for teacher in teachers.values()]
            both = (1 - SHARE) * scores[0] + SHARE * scores[1]
            for name, mos in zip((*TEACHERS, "both"), (*scores, both), strict=True):
                found.setdefault(f"{name}, {filling}", []).append(mos)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench filling``."""
    parser.add_argument("--rated", type=path_here, required=True)
    parser.add_argument("--seconds", type=float, nargs="*", default=[1, 2, 3])
    parser.add_argument("--every", type=int, default=1, help="take each clip, or each second ...")


def run(args: argparse.Namespace) -> int:
    """Print a table a rated set."""
    clips = read_rated(args.rated)[:: args.every]
    for name in dict.fromkeys(clip.dataset for clip in clips):
        ours = [clip for clip in clips if clip.dataset == name]
        columns = {seconds: scored(ours, seconds) for seconds in (*args.seconds, None)}
        heads = ["whole" if s is None else f"{s:g} s" for s in columns]
        print(f"\n{name}, {len(ours)} clips, PCC to people\n| | {' | '.join(heads)} |")
        print("|---|" + "---|" * len(heads))
        for row in [row for row in columns[None] if row != "people"]:
            pccs = (agreement(column["people"], column[row]).pcc for column in columns.values())
            print(f"| {row} | {' | '.join(f'{pcc:.3f}' for pcc in pccs)} |")
    return 0
