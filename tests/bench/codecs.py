"""What each codec does to speech, at each rate: DistillMOS, level, delay, speed on a core.

Medians over clips of the lag and means of the rest. The lag is where the cross-correlation of
waveforms (of their differences) has its maximum; Codec 2 keeps no waveform, there it is that of
the power over 10 ms.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data_specs.io.errors import UserError
from data_specs.processors import CODEC_BITRATES, CONCEALING
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from pipeline.audio import Wave, read_part
from pipeline.render import processors as degrade
from pipeline.render.mix import active_dbfs, set_level
from pipeline.render.processors import opus
from pipeline.render.processors.interface import Params
from train.scoring.score import load

OPUS_BPS = (9_000, 16_000, 24_000)
LOSS = {"loss": 0.1, "pattern": 7.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--speech", type=Path, required=True, help="folder of clean recordings")
    parser.add_argument("--clips", type=int, default=8, help="how many, evenly from the folder")
    parser.add_argument("--only", nargs="*", default=[], help="kinds")


def run(options: argparse.Namespace) -> int:
    """Measure, and print a row at a time."""
    scorer = load("v7")
    clips = _clips(options.speech, options.clips)
    print("| codec | kbit/s | DistillMOS | level, dB | lag, samples | times real time |")
    print("|---|---|---|---|---|---|")
    _row("none", {}, "-", clips, scorer)
    for kind, params, rate in _lines(options.only):
        try:
            _row(kind, params, rate, clips, scorer)
        except UserError as error:
            print(f"| {kind} | {rate} | not here: {error} | | | |")
    return 0


def _clips(folder: Path, count: int) -> list[Wave]:
    """Recordings of 4 s at least, evenly from a folder, cut to a sample's length, at -26 dBFS."""
    long = [p for p in sorted(folder.rglob("*.flac")) if soundfile.info(str(p)).duration >= 4]
    if len(long) < count:
        raise UserError(f"--speech {folder}: {len(long)} FLAC files of 4 s or more, not {count}")
    chosen = [long[i * len(long) // count] for i in range(count)]
    return [set_level(read_part(path, 0, CROP_SAMPLES), -26) for path in chosen]


def _lines(only: list[str]) -> Iterator[tuple[str, Params, str]]:
    """Kind, settings and the rate as it is printed."""
    for kind, rates in CODEC_BITRATES.items():
        if not only or kind in only:
            for rate in rates:
                yield kind, {"bitrate_bps": rate}, f"{rate / 1000:g}"
            if kind in CONCEALING:
                yield kind, {"bitrate_bps": rates[-1]} | LOSS, f"{rates[-1] / 1000:g}, 10 % lost"
    for rate in OPUS_BPS if not only or "opus" in only else ():
        base = {"bitrate_bps": float(rate), "frame_ms": 20.0, "complexity": 5.0, "conceal": 1.0}
        for complexity, name in ((0, "plain"), *opus.NETWORKS.items()):
            more = {"decoder_complexity": float(complexity)}
            if complexity != 5:  # it does nothing where no packet is lost
                yield "opus", base | more, f"{rate / 1000:g}, {name}"
            yield "opus", base | more | LOSS, f"{rate / 1000:g}, {name}, 10 % lost"


def _row(kind: str, params: Params, rate: str, clips: list[Wave], scorer: Any) -> None:
    begun = time.process_time()
    outs = [degrade.run(kind, wave[None], [params])[0] for wave in clips]
    seconds = time.process_time() - begun
    pairs = list(zip(outs, clips, strict=True))
    mos = statistics.mean(scorer.score(out, SAMPLE_RATE) for out in outs)
    level_db = statistics.mean(active_dbfs(out) - active_dbfs(wave) for out, wave in pairs)
    lag = statistics.median(_lag(kind, out, wave) for out, wave in pairs)
    speed = sum(map(len, clips)) / SAMPLE_RATE / max(seconds, 1e-3)
    speed_text = "-" if kind == "none" else f"{speed:.0f}"
    print(
        f"| {kind} | {rate} | {mos:.2f} | {level_db:+.1f} | {lag:.0f} | {speed_text} |", flush=True
    )


def _lag(kind: str, out: Wave, wave: Wave) -> int:
    before, after = (_power(w) if kind == "codec2" else np.diff(w) for w in (wave, out))
    size = 1 << (2 * len(wave)).bit_length()
    product = np.fft.rfft(after, size) * np.conj(np.fft.rfft(before, size))
    lag = int(np.argmax(np.fft.irfft(product)))
    return lag - size if lag > size // 2 else lag


def _power(wave: Wave) -> Any:
    power = np.convolve(wave.astype(np.float64) ** 2, np.hanning(SAMPLE_RATE // 100), "same")
    return power - power.mean()
