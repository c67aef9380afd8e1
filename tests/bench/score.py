"""Scoring beside the ``distillmos`` package: ``python -m tests.bench score``.

One run, the same weights, the same clips, the same cores: the package's own call, a clip at a time
as its users make it, against ``load("v7")``; then its command against ``python -m train score`` on
a folder. Clip by clip all take turns, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from tests.memory import peak_bytes, peak_reset
from train.audio import Wave, read_mono, to_16k
from train.evaluation.external_scorers import Options
from train.evaluation.scorers import load_scorers
from train.files import csv_text
from train.models.precision import has_fast_bf16
from train.scoring.files import choose_files
from train.scoring.score import load
from train.scoring.windows import Mode

LONG_CLIP_SECONDS = 30
FOLDER_SECONDS = 4
MOVED_SAMPLES = 80
"""A clip is also scored without its first 5 ms: how far the published score itself moves."""

DISTILLMOS_COMMAND = """
import sys, soundfile, torch, torchaudio
from distillmos.sqa import command_line_inference

def load(path):
    wave_TC, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(wave_TC.T.copy()), rate

try:
    torchaudio.load(sys.argv[1])
except (ImportError, OSError, RuntimeError):
    torchaudio.load = load
del sys.argv[1]
command_line_inference()
"""
"""The package's own command. It reads with torchaudio, which from 2.9 on needs torchcodec and with
it FFmpeg's libraries; where those are missing it reads with soundfile, as torchaudio did before.
"""

THEIRS = "distillmos' command"

LOOK_SECONDS = 0.05
"""How often the memory of a command is looked at."""

Score = Callable[[Wave], float]


@dataclass
class Contender:
    """One way to score, and what it took: seconds and scores, clip by clip, round by round."""

    name: str
    score: Score
    seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    def take(self, wave_T: Wave, seconds_too: bool = True) -> None:
        """Score one clip, and keep what it took."""
        before = peak_reset()
        start = time.perf_counter()
        self.scores.append(self.score(wave_T))
        if seconds_too:
            self.seconds.append(time.perf_counter() - start)
        self.peak_mb = max(self.peak_mb, (peak_bytes() - before) / 1e6)


def published() -> Score:
    """The package's network as its own command calls it: one clip, no gradients."""
    from distillmos import ConvTransformerSQAModel

    network = ConvTransformerSQAModel().eval()

    def score(wave_T: Wave) -> float:
        with torch.no_grad():
            return float(network(torch.from_numpy(wave_T)[None]))

    return score


def speechmos() -> Score:
    """DNSMOS P.808, which the ``speechmos`` package gives together with P.835."""
    (scorer,), _ = load_scorers(["dnsmos-p808"], Options())
    return lambda wave_T: scorer.score_windows([wave_T])[0]["dnsmos-p808"]


def contenders(long: bool, also: Sequence[str]) -> list[Contender]:
    """The package first, then ours, then what else was asked for."""
    modes: tuple[Mode, ...] = ("exact", "fast") if long else ("exact",)
    found = [Contender("distillmos", published())]
    for mode, precision in itertools.product(modes, ("fp32", "bf16")):
        score = partial(load("v7", precision=precision).score, sample_rate=SAMPLE_RATE, mode=mode)
        found.append(Contender(f"{precision} {mode}", score))
    for name in also:
        other = name == "speechmos"
        score = speechmos() if other else partial(load(name).score, sample_rate=SAMPLE_RATE)
        found.append(Contender(name, score))
    return found


def race(entrants: Sequence[Contender], clips: Sequence[Wave], rounds: int) -> None:
    """Every clip by every entrant in turn; a round before that is not measured warms up."""
    for entrant in entrants:
        entrant.score(clips[0])
    for number in range(rounds):
        for wave_T in clips:
            turned = entrants[number % len(entrants) :], entrants[: number % len(entrants)]
            for entrant in [one for part in turned for one in part]:
                entrant.take(wave_T)


def rows_of(what: str, entrants: Sequence[Contender]) -> list[dict[str, object]]:
    """A row an entrant: speed as ratios to the first, paired by clip, and score differences."""
    first = entrants[0]
    return [
        {
            "what": what,
            "scorer": one.name,
            "seconds": f"{np.median(one.seconds):.3f}" if one.seconds else None,
            "ratio": f"{np.median(np.divide(first.seconds, one.seconds)):.2f}"
            if one.seconds
            else None,
            **_differences(np.subtract(one.scores, first.scores)),
            "peak_mb": round(one.peak_mb),
        }
        for one in entrants
    ]


def _differences(apart: NDArray[np.float64]) -> dict[str, str]:
    size = np.abs(apart)
    return {
        "mean_difference": f"{apart.mean():+.5f}",
        "mean_size": f"{size.mean():.5f}",
        "p99_size": f"{np.quantile(size, 0.99):.5f}",
        "max_size": f"{size.max():.5f}",
    }


def moved(clips: Sequence[Wave], first: Contender, rounds: int) -> Contender:
    """The published score of the same clips without their first 5 ms."""
    one = Contender(f"distillmos, {MOVED_SAMPLES / 16:.0f} ms cut off", first.score)
    for wave_T in list(clips) * rounds:
        one.take(np.ascontiguousarray(wave_T[MOVED_SAMPLES:]), seconds_too=False)
    return one


def clips_of(samples: int, count: int, audio: Path | None) -> Iterator[Wave]:
    """Clips (samples,) at 16 kHz: recordings put end to end, or noise in syllables."""
    if audio is None:
        yield from (_made(samples, seed) for seed in range(count))
        return
    stream, held_T = _endless(list(choose_files([audio]).files)), np.zeros(0, np.float32)
    for _ in range(count):
        while len(held_T) < samples:
            held_T = np.concatenate([held_T, next(stream)])
        yield held_T[:samples].copy()
        held_T = held_T[samples:]


def _endless(files: Sequence[Path]) -> Iterator[Wave]:
    if not files:
        raise UserError("--audio holds no recordings")
    while True:
        for file in files:
            yield to_16k(*read_mono(file))


def _made(samples: int, seed: int) -> Wave:
    rng = np.random.default_rng(seed)
    time_s = np.arange(samples) / SAMPLE_RATE
    syllables = np.clip(np.sin(2 * np.pi * rng.uniform(2, 4) * time_s), 0.02, 1)
    voice = np.sin(2 * np.pi * rng.uniform(90, 250) * time_s) ** 9
    noise = rng.standard_normal(samples) * rng.uniform(0.001, 0.1)
    return (0.3 * voice * syllables + noise).astype(np.float32)


@dataclass(frozen=True)
class Ran:
    """What a command took."""

    seconds: float
    peak_mb: float


def command(words: Sequence[str], folder: Path) -> Ran:
    """Run a command on the same cores; ``ValueError`` with its last words if it fails.

    Its peak memory is looked up while it runs: what the system says afterwards (``ru_maxrss``)
    counts the process that started it, too.
    """
    errors, peak_mb = folder / "errors.txt", 0.0
    start = time.perf_counter()
    with errors.open("wb") as told:
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=told)
        while process.poll() is None:
            with suppress(OSError):  # it has just ended
                peak_mb = max(peak_mb, peak_bytes(process.pid) / 1e6)
            time.sleep(LOOK_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise UserError(f"{' '.join(words)[:80]}: {errors.read_text(errors='replace')[-400:]}")
    return Ran(seconds, peak_mb)


def folder_rows(args: argparse.Namespace) -> list[dict[str, object]]:
    """A folder of clips of 4 s through both commands, in turns."""
    if not args.files:
        return []
    with tempfile.TemporaryDirectory(prefix="bench-score-") as top:
        folder = Path(top)
        (folder / "all").mkdir()
        clips = clips_of(FOLDER_SECONDS * SAMPLE_RATE, args.files, args.audio)
        for number, clip_T in enumerate(clips):
            soundfile.write(folder / "all" / f"{number:06d}.wav", clip_T, SAMPLE_RATE)
        commands = _commands(folder, args)
        times: dict[str, list[Ran]] = {name: [] for name in commands}
        for _ in range(args.folder_rounds):
            (folder / "ours.csv").unlink(missing_ok=True)
            for name, words in commands.items():
                times[name].append(command(words, folder))
        apart = _apart(folder)
    seconds = {name: float(np.median([r.seconds for r in rans])) for name, rans in times.items()}
    return [
        {
            "what": f"{args.files} files of {FOLDER_SECONDS} s",
            "scorer": name,
            "seconds": f"{seconds[name]:.1f}",
            "ratio": f"{seconds[THEIRS] / seconds[name]:.2f}",
            **({} if name == THEIRS else _differences(apart)),
            "peak_mb": round(max(ran.peak_mb for ran in rans)),
        }
        for name, rans in times.items()
    ]


def _commands(folder: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    clips, options = str(folder / "all"), ["--precision", args.precision]
    theirs = ["-c", DISTILLMOS_COMMAND, f"{clips}/000000.wav", clips, "-o", f"{folder}/theirs.csv"]
    ours = ["-m", "train", "score", clips, *options, "--threads", str(args.threads)]
    return {
        THEIRS: theirs,
        f"train score {args.precision}": [*ours, "--out", str(folder / "ours.csv")],
    }


def _apart(folder: Path) -> NDArray[np.float64]:
    theirs = dict(
        line.rsplit(", ", 1) for line in (folder / "theirs.csv").read_text().splitlines()[1:]
    )
    ours = [line.split(",") for line in (folder / "ours.csv").read_text().splitlines()[1:]]
    return np.array([float(row[1]) - float(theirs[row[0]]) for row in ours])


def long_rows(args: argparse.Namespace) -> list[dict[str, object]]:
    """Time and memory of one long file, beside one of a few minutes."""
    rows: list[dict[str, object]] = []
    if not args.long_hours:
        return rows
    with tempfile.TemporaryDirectory(prefix="bench-score-") as top:
        for hours in (args.long_hours / 20, args.long_hours):
            path = Path(top) / "long.wav"
            with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1) as file:
                for number in range(max(1, round(hours * 60))):
                    file.write(_made(60 * SAMPLE_RATE, number))
            words = ["-m", "train", "score", str(path), "--out", f"{top}/{hours}.csv"]
            options = ["--mode", args.long_mode, "--precision", args.precision]
            ran = command([*words, *options, "--model", args.long_model], Path(top))
            rows.append(
                {
                    "what": f"one file of {hours:g} h",
                    "scorer": f"{args.long_model} {args.precision} {args.long_mode}",
                    "seconds": f"{ran.seconds:.1f}",
                    "peak_mb": round(ran.peak_mb),
                }
            )
    return rows


COLUMNS = (
    *("what", "scorer", "seconds", "ratio", "mean_difference", "mean_size"),
    *("p99_size", "max_size", "peak_mb"),
)


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows as text; differences are to distillmos' scores, memory is what was added or peak."""
    cells = [
        [str(row.get(name) if row.get(name) is not None else "-") for name in COLUMNS]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    lines = [COLUMNS, *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench score``."""
    parser.add_argument(
        "--audio", type=path_here, help="recordings to make the clips of (else: made)"
    )
    parser.add_argument("--clips", type=int, default=8, help="clips of 7.68 s; 0: none")
    parser.add_argument("--long-clips", type=int, default=3, help="clips of 30 s; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=2000, help="in the folder; 0: none")
    parser.add_argument("--folder-rounds", type=int, default=1)
    parser.add_argument("--long-hours", type=float, default=0, help="of one long file; 0: none")
    parser.add_argument("--long-mode", choices=("exact", "fast"), default="fast")
    parser.add_argument("--long-model", default="v7")
    parser.add_argument("--precision", default="auto", help="of the commands")
    models = "students, bundles, .onnx files (int8 or not), speechmos: race them, too"
    parser.add_argument("--also", nargs="+", default=[], help=models)
    parser.add_argument("--threads", type=int, default=1, help="cores for everything")
    parser.add_argument("--out", type=path_here, help="the table as CSV")


def _benches(args: argparse.Namespace) -> Iterator[Callable[[], list[dict[str, object]]]]:
    yield partial(_race_rows, args, CROP_SAMPLES / SAMPLE_RATE, args.clips)
    yield partial(_race_rows, args, LONG_CLIP_SECONDS, args.long_clips)
    yield partial(folder_rows, args)
    yield partial(long_rows, args)


def _race_rows(args: argparse.Namespace, seconds: float, count: int) -> list[dict[str, object]]:
    if not count:
        return []
    clips = list(clips_of(int(seconds * SAMPLE_RATE), count, args.audio))
    entrants = contenders(seconds == LONG_CLIP_SECONDS, args.also)
    race(entrants, clips, args.rounds)
    return rows_of(f"{seconds:g} s", [*entrants, moved(clips, entrants[0], args.rounds)])


def run(args: argparse.Namespace) -> int:
    """``python -m tests.bench score``; returns the exit code."""
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.sched_setaffinity(0, cores)  # of reading threads and commands, too
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    print(f"{len(cores)} cores; bf16 in hardware: {has_fast_bf16(torch.device('cpu'))}")
    rows: list[dict[str, object]] = []
    for measure in _benches(args):
        found = measure()
        rows += found
        print(f"{table(found)}\n" if found else "", end="", flush=True)
    if args.out is not None:
        write_text(args.out, csv_text([{name: row.get(name) for name in COLUMNS} for row in rows]))
    return 0
