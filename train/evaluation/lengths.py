"""How well models score short crops: ``python -m train lengths``.

The samples of held-out shards are cropped to some seconds, and what a model says of the crop is
held against the label in the shard: the teacher's score of the whole clip. Crops are padded to
7.68 s with zeros (published) or repeated. All models and both paddings are given the same crops.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.options import add_options
from data_specs.io.progress import progress_bar
from data_specs.io.waves import Padding
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.audio import Wave
from train.bootstrap import draws, interval, pearson
from train.command import made_by
from train.data.order import generator
from train.data.shards import list_shards
from train.data.stream import PCM_SCALE, ShardSamples
from train.evaluation.tables import markdown, write_tables
from train.files import run_folder
from train.loop.loop import Host, host_of
from train.metrics import agreement
from train.pages import decimals, ranged
from train.scoring.base import WINDOWS_A_BATCH, Scorer
from train.scoring.score import load

SILENT_DB = -60.0
"""A crop whose level is this far below its clip's is silent: nobody could rate it."""

ATTEMPTS = 10
"""Places that are tried for a crop that is not silent; then the clip is left out."""

FULL = CROP_SAMPLES / SAMPLE_RATE
WHOLE = "none"
"""What stands in the column ``padding`` for whole clips: nothing is padded."""


@dataclass(frozen=True)
class LengthResult:
    """One model, length and padding: a record of ``lengths.csv``. Interval of 95 %; RMSE in MOS."""

    model: str
    seconds: float
    padding: str
    clips: int
    pcc: float | None
    pcc_low: float | None
    pcc_high: float | None
    rmse: float | None
    reason: str | None = None


def crop_start(wave_T: Wave, length: int, seed: int, number: int) -> int | None:
    """Where the crop of sample ``number`` starts; None if every place that is tried is silent.

    A pure function: the places that are tried depend on seed and number alone, as shares of the
    audio that there is.
    """
    loud = _power(wave_T) * 10 ** (SILENT_DB / 10)
    for share in generator(seed, number).random(ATTEMPTS):
        start = int(share * (len(wave_T) - length + 1))
        power = _power(wave_T[start : start + length])
        if power > 0 and power >= loud:
            return start
    return None


def _power(wave_T: Wave) -> float:
    return float(np.mean(np.square(wave_T, dtype=np.float64)))


def chosen_numbers(samples: int, wanted: int | None) -> list[int]:
    """Numbers of the samples to take, spread evenly over all of them."""
    most = min(wanted or samples, samples)
    return [int(place) for place in np.linspace(0, samples - 1, most).round()]


def crops(
    samples: ShardSamples, numbers: Sequence[int], seconds: float, seed: int
) -> Iterator[tuple[float, Wave]]:
    """Label and crop of every sample that is not silent; the whole clip for ``FULL`` seconds."""
    length = min(round(seconds * SAMPLE_RATE), CROP_SAMPLES)
    for number in numbers:
        pcm_T, label = samples.read(number)
        wave_T = np.asarray(pcm_T, np.float32) / PCM_SCALE
        start = 0 if length == CROP_SAMPLES else crop_start(wave_T, length, seed, number)
        if start is not None:
            yield label, wave_T[start : start + length]


def result_of(
    name: str, seconds: float, padding: str, labels: Sequence[float], scores: Sequence[float]
) -> LengthResult:
    """Agreement of the crops' scores with the labels of their whole clips."""
    agreed = agreement(labels, scores)
    resampled_R = pearson(draws([str(row) for row in range(len(labels))], 0), labels, scores)
    pcc = interval(agreed.pcc, resampled_R, agreed.reason or "not defined")
    return LengthResult(
        name, seconds, padding, len(labels), **pcc.named("pcc"), rmse=agreed.rmse, reason=pcc.reason
    )


def measure_length(
    scorers: Sequence[Scorer],
    samples: ShardSamples,
    numbers: Sequence[int],
    seconds: float,
    seed: int,
) -> list[LengthResult]:
    """Every model at one length, with both paddings; a batch of crops is in memory at a time.

    ``ValueError`` if all of the crops are silent.
    """
    paddings: tuple[str, ...] = get_args(Padding) if seconds < FULL else (WHOLE,)
    scores: dict[tuple[str, str], list[float]] = {
        (scorer.name, padding): [] for scorer in scorers for padding in paddings
    }
    labels: list[float] = []
    for start in progress_bar(
        range(0, len(numbers), WINDOWS_A_BATCH), desc=f"{seconds:g} s", unit="batch"
    ):
        part = numbers[start : start + WINDOWS_A_BATCH]
        kept = list(crops(samples, part, seconds, seed))
        labels += [label for label, _ in kept]
        for scorer in scorers if kept else ():
            for padding in paddings:
                filling: Padding = "repeat" if padding == "repeat" else "zero"
                waves = [scorer.window(wave_T, filling) for _, wave_T in kept]
                scores[scorer.name, padding] += scorer.score_windows(waves)
    if not labels:
        raise UserError(f"all crops of {seconds:g} s are silent: give longer --seconds")
    return [
        result_of(name, seconds, padding, labels, mos) for (name, padding), mos in scores.items()
    ]


def measure(
    scorers: Sequence[Scorer],
    folder: Path,
    seconds: Sequence[float],
    seed: int,
    wanted: int | None = None,
) -> list[LengthResult]:
    """Every model at every length and on whole clips, model by model."""
    samples = ShardSamples(list_shards(folder))
    numbers = chosen_numbers(len(samples), wanted)
    results: list[LengthResult] = []
    for length in [*sorted(set(seconds)), FULL]:
        results += measure_length(scorers, samples, numbers, length, seed)
    order = [scorer.name for scorer in scorers]
    return sorted(results, key=lambda row: order.index(row.model))


def table(results: Sequence[LengthResult]) -> str:
    """The results as a Markdown table."""
    padding = {"zero": "zeros", "repeat": "itself", WHOLE: "–"}
    cells = [
        (
            one.model,
            "whole" if one.seconds >= FULL else f"{one.seconds:g} s",
            padding[one.padding],
            str(one.clips),
            ranged(one.pcc, one.pcc_low, one.pcc_high),
            decimals(one.rmse),
        )
        for one in results
    ]
    pcc = "PCC to the teacher's score of the whole clip"
    return "\n".join(
        markdown(("model", "crop", "padded with", "clips", pcc, "RMSE (MOS)"), cells, 3)
    )


def left_out(results: Sequence[LengthResult]) -> str:
    """How many clips were left out at each length, in words; empty where none was."""
    clips = {row.seconds: row.clips for row in results}
    gone = {seconds: clips[FULL] - number for seconds, number in clips.items()}
    said = ", ".join(f"{number} of {seconds:g} s" for seconds, number in gone.items() if number)
    silent = f"the crop was silent ({-SILENT_DB:g} dB below its clip)"
    return f"Left out: {said}; in {ATTEMPTS} places {silent}." if said else ""


def _seconds(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not 1 / SAMPLE_RATE <= value < FULL:
        raise argparse.ArgumentTypeError(f"{text}: above 0 and below {FULL:g}, a whole clip")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train lengths``."""
    add = parser.add_argument
    add("--model", nargs="+", action="extend", required=True, help="v7, a run or a teacher")
    add("--shards", type=path_here, required=True, help="held-out shards")
    add("--seconds", nargs="+", type=_seconds, default=[1.0, 2.0, 4.0], help="lengths of crops")
    add("--out", type=path_here, required=True, help="folder for the results")
    add("--samples", type=int, help="take that many samples, spread evenly (default: all)")
    add("--seed", type=int, default=0, help="of the crops' places")
    add_options(parser, Host, Host.model_fields.keys() - {"device", "threads"})


def run(args: argparse.Namespace) -> int:
    """``python -m train lengths``; returns the exit code."""
    host = host_of(args, Host)
    if args.samples is not None and args.samples < 2:
        raise UserError(f"--samples {args.samples}: a correlation needs at least two")
    with run_folder(args.out):
        scorers = [load(model, host.device) for model in dict.fromkeys(args.model)]
        results = measure(scorers, args.shards, args.seconds, args.seed, args.samples)
        about = made_by("lengths", args, add_arguments)
        how = f"`{about['command']}`, {about['date']}. In brackets: bootstrap intervals (95 %)."
        said = [part for part in (table(results), left_out(results)) if part]
        records = [asdict(one) for one in results]
        content = {"about": about, "results": records}
        write_tables(args.out, "lengths", content, records, "\n\n".join([*said, how]) + "\n")
    print(*said, args.out / "lengths.md", sep="\n")
    return 0
