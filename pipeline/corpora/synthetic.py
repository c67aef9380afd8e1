"""Write the demo's corpora: synthetic and studio speech, noise and simulated rooms, as folders.

They hold FLAC files in a plain layout, which the corpora of ``data_specs/corpora/demo.yaml`` read
like any user's own. Each is seeded (same seed, same bytes; a larger count only adds files) and
resumable (what is there is kept).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from scipy import signal

from data_specs.io.addresses import path_here
from data_specs.io.audio import audio_files_below
from data_specs.io.errors import UserError
from data_specs.io.hardware import cpus
from data_specs.room import load_rooms
from data_specs.sample import SAMPLE_RATE
from data_specs.voice import sentences
from pipeline.audio import DropSample, read_part
from pipeline.corpora.folder import PEAK, Job, Wave, claimed, make_files, rng_of
from pipeline.corpora.rooms import make_rooms

MIN_SPEECH_SECONDS = 8.2  # a crop of 7.68 s fits, with some left for a recipe's speed change
AIM_SPEECH_SECONDS = 9.6


def _read(path: Path, speed: float = 1.0) -> Wave:
    """The first minute of a file, at 16 kHz. Raises ``ValueError`` if it is not usable audio."""
    try:
        wave = read_part(path, 0, 60 * SAMPLE_RATE, speed)
    except DropSample as error:
        raise UserError(f"{path}: {error}; mend it or remove it from the folder") from error
    if not len(wave):
        raise UserError(f"{path}: no samples; remove it from the folder")
    return wave.astype(np.float64)


def _level(wave: Wave, rms_dbfs: float) -> Wave:
    """Scale to a root mean square in dBFS, less where the peak would pass ``PEAK``."""
    wave = wave - wave.mean()
    rms = float(np.sqrt(np.mean(wave**2)))
    peak = float(np.abs(wave).max())
    return wave * min(10 ** (rms_dbfs / 20) / max(rms, 1e-9), PEAK / max(peak, 1e-9))


# --- speech ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Voice:
    """A synthesizer's voice with settings that make it sound like another person.

    ``stretch`` multiplies durations, ``pitch`` the fundamental frequency, and ``tract`` the
    formants (by resampling), as a shorter or longer vocal tract would.
    """

    engine: str
    voice: str
    language: str
    stretch: float = 1.0
    pitch: float = 1.0
    tract: float = 1.0

    @property
    def speaker(self) -> str:
        """The folder's name, unique among ``voices()``."""
        numbers = (self.stretch, self.pitch, self.tract)
        name = self.voice.replace("+", "-").lower()
        return "-".join([name, *(f"{100 * number:.0f}" for number in numbers)])


# (stretch, pitch, tract) of the flite variants. The default teacher rates the plain voices 2.6 to
# 3.1; tract beyond about 10 % costs quality and sounds less like a person.
FLITE_VARIANTS = (
    (1.00, 1.00, 1.00),
    (0.90, 1.08, 1.00),
    (1.12, 0.92, 1.00),
    (1.00, 1.00, 1.06),
    (1.10, 1.10, 0.94),
    (0.92, 0.94, 1.10),
    (1.18, 1.05, 1.04),
    (0.95, 0.88, 0.97),
    (1.06, 1.15, 1.08),
    (0.88, 1.00, 0.92),
    (1.14, 0.96, 1.10),
    (1.02, 1.04, 0.90),
)
FLITE_F0_HZ = {"slt": 170.0, "rms": 95.0, "awb": 120.0}
"""English voices that Debian's flite brings, and about where their pitch lies."""

ESPEAK_VOICES = (
    ("de", "de", 1.00, 1.0),
    ("fr-fr+f2", "fr", 1.05, 1.1),
    ("es", "es", 0.95, 0.9),
    ("pt+f3", "pt", 1.05, 1.2),
    ("it+m3", "it", 1.00, 0.9),
    ("nl", "nl", 1.05, 1.1),
    ("pl+f4", "pl", 0.95, 1.0),
    ("de+f3", "de", 1.10, 1.2),
    ("es-419+f2", "es", 1.05, 1.0),
    ("pt-br+m2", "pt", 1.00, 0.8),
    ("fr-be+m4", "fr", 1.10, 0.9),
)


@cache
def voices() -> tuple[Voice, ...]:
    """Every demo speaker: flite's in English, and a fifth to a quarter espeak-ng's in others."""
    flite = [
        Voice("flite", name, "en", *variant) for variant in FLITE_VARIANTS for name in FLITE_F0_HZ
    ]
    espeak = [Voice("espeak-ng", *row) for row in ESPEAK_VOICES]
    every = 1 + len(flite) // len(espeak)
    mixed: list[Voice] = []
    while flite or espeak:  # spread the few among the many, so that any prefix has both
        mixed += flite[: every - 1] + espeak[:1]
        flite, espeak = flite[every - 1 :], espeak[1:]
    return tuple(mixed)


def _need(program: str) -> None:
    if shutil.which(program) is None:
        raise UserError(
            f"{program} is not installed: run 'sudo apt-get install {program}' (Debian, Ubuntu), "
            "or give your own speech folder instead of the demo's"
        )


def _command(voice: Voice, text: str, wav: Path) -> list[str]:
    # flite makes the tract-scaled voices slower and lower first; resampling brings both back.
    stretch, pitch = voice.stretch * voice.tract, voice.pitch / voice.tract
    if voice.engine == "flite":
        f0_hz = FLITE_F0_HZ[voice.voice] * pitch
        settings = [
            f"duration_stretch={stretch:.4f}",
            f"int_f0_target_mean={f0_hz:.2f}",
        ]
        flags = [part for setting in settings for part in ("--setf", setting)]
        return ["flite", "-voice", voice.voice, *flags, "-t", text, "-o", str(wav)]
    speed_wpm, pitch_0_to_99 = round(160 / stretch), min(99, round(50 * pitch))
    flags = ["-v", voice.voice, "-s", str(speed_wpm), "-p", str(pitch_0_to_99)]
    return ["espeak-ng", *flags, "-w", str(wav), text]


def _speak(voice: Voice, text: str) -> Wave:
    """Synthesize ``text``; mono at 16 kHz. Raises ``UserError`` with the program's words."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        done = subprocess.run(
            _command(voice, text, wav),
            capture_output=True,
            text=True,
            check=False,
            process_group=0,  # a signal to the group is this process' to handle
        )
        if done.returncode or not wav.is_file():
            raise UserError(f"{voice.engine} failed for {voice.speaker}: {done.stderr.strip()}")
        return _read(wav, voice.tract)


def _say(voice: Voice, seed: int, name: str) -> Wave:
    """Everyday sentences, enough of them for ``MIN_SPEECH_SECONDS``, levelled to -23 dBFS."""
    lines = rng_of(seed, name).permutation(sentences()[voice.language])
    letters = np.cumsum([len(line) + 8 for line in lines])
    take = 1 + int(np.searchsorted(letters, AIM_SPEECH_SECONDS * 17 / voice.stretch))
    wave = _speak(voice, " ".join(lines[:take]))
    while len(wave) < MIN_SPEECH_SECONDS * SAMPLE_RATE:
        take += 1
        wave = _speak(voice, " ".join(lines[:take]))
    return _level(wave, -23)


def make_speech(out: Path, clips: int = 260, seed: int = 1, workers: int = 2) -> list[Path]:
    """Write ``clips`` files ``<language>/<speaker>/<n>.flac`` of 8 to 14 s, 16 kHz, to ``out``.

    flite's three English voices and espeak-ng's of seven other languages, each with several
    settings, stand for ``len(voices())`` speakers; clips go round them in turn. Raises
    ``UserError`` naming the Debian package if a synthesizer is missing, or if ``out`` holds the
    clips of another seed.
    """
    for program in sorted({voice.engine for voice in voices()}):
        _need(program)
    jobs: list[Job] = []
    for index in range(clips):
        turn, which = divmod(index, len(voices()))
        voice = voices()[which]
        name = f"{voice.language}/{voice.speaker}/{turn}.flac"
        jobs.append((out / name, partial(_say, voice, seed, name)))
    with claimed(out, "speech", seed):
        return make_files(jobs, "speech", workers)


# --- studio prompts, out of Debian's asterisk-core-sounds -----------------------------------------

MIN_PROMPT_SECONDS = 3.0
BYTES_A_SECOND = 8_000

# The packages hold raw G.722, 16 kHz at 64 kbit/s, a folder for each talker: en_US_f_Allison.
TALKER = re.compile(r"/(?P<language>[a-z]{2})_[A-Z]{2}_[fm]_(?P<name>\w+)/(?P<prompt>.+)\.g722$")


def make_studio(unpacked: Path, out: Path, workers: int = 2) -> list[Path]:
    """Write the prompts of 3 s and more below a folder as ``<language>/studio-<name>/*.flac``.

    Raises ``UserError`` where the folder has none, or what decodes them is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UserError("PyAV, which decodes G.722, is not installed: run make setup") from error
    found = ((TALKER.search(path.as_posix()), path) for path in sorted(unpacked.rglob("*.g722")))
    jobs = [
        (out / talker["language"] / f"studio-{talker['name'].lower()}" / _name(talker), path)
        for talker, path in found
        if talker and path.stat().st_size >= MIN_PROMPT_SECONDS * BYTES_A_SECOND
        if not talker["prompt"].startswith("silence/")
    ]
    if not jobs:
        raise UserError(f"{unpacked}: no prompts of asterisk-core-sounds-*-g722 below it")
    with claimed(out, "studio", 0):
        return make_files(
            [(to, partial(decode_g722, path)) for to, path in jobs], "studio", workers
        )


def _name(talker: re.Match[str]) -> str:
    return talker["prompt"].replace("/", "-") + ".flac"


def decode_g722(path: Path) -> Wave:
    """Speech (T,) at 16 kHz."""
    import av

    with av.open(str(path), format="g722") as file:
        frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
    return np.concatenate(frames, axis=1)[0].astype(np.float64) / 2**15


# --- noise ----------------------------------------------------------------------------------------


def _shaped(rng: Generator, samples: int, gain: Callable[[Wave], Wave]) -> Wave:
    """Gaussian noise with the magnitude response ``gain(frequency_hz)``."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency_hz = np.asarray(np.fft.rfftfreq(samples, 1 / SAMPLE_RATE), np.float64)
    return np.asarray(np.fft.irfft(spectrum * gain(frequency_hz), samples))


def _sway(rng: Generator, samples: int, depth_db: float) -> Wave:
    """A slow random gain: a smooth curve through a new level about every second."""
    points = 2 + samples // SAMPLE_RATE
    levels_db = rng.normal(0, depth_db, points)
    at = np.linspace(0, points - 1, samples)
    return 10 ** (np.interp(at, np.arange(points), levels_db) / 20)


def _coloured(rng: Generator, samples: int) -> Wave:
    """White, pink, brown or anything between: -9 to +2 dB an octave, slowly swaying."""
    slope_db = rng.choice([0.0, -3.0, -6.0, rng.uniform(-9, 2)])
    exponent = slope_db / (20 * np.log10(2))
    noise = _shaped(rng, samples, lambda hz: np.maximum(hz, 30.0) ** exponent)
    return noise * _sway(rng, samples, rng.uniform(0, 4))


def _band(rng: Generator, samples: int) -> Wave:
    """A band of noise one to four octaves wide: fans, wind, hiss, water."""
    centre_hz = np.exp(rng.uniform(np.log(150), np.log(5000)))
    octaves = rng.uniform(0.5, 2)

    def gain(hz: Wave) -> Wave:
        return 1 / (1 + (np.log2(np.maximum(hz, 1.0) / centre_hz) / octaves) ** 4) + 1e-3

    return _shaped(rng, samples, gain) * _sway(rng, samples, rng.uniform(1, 5))


def _hum(rng: Generator, samples: int) -> Wave:
    """Mains hum at 50 or 60 Hz with harmonics and a little hiss."""
    seconds = np.arange(samples) / SAMPLE_RATE
    mains_hz = rng.choice([50.0, 60.0]) * rng.uniform(0.998, 1.002)
    wave = np.zeros(samples)
    for harmonic in range(1, int(rng.integers(6, 40))):
        gain = rng.uniform(0.2, 1) / harmonic ** rng.uniform(0.4, 1.2)
        wave += gain * np.sin(2 * np.pi * (harmonic * mains_hz * seconds + rng.uniform()))
    return wave + rng.uniform(0.01, 0.15) * rng.standard_normal(samples)


def _clicks(rng: Generator, samples: int) -> Wave:
    """Knocks and clicks, one to twenty a second, each a short ring, over faint hiss."""
    rate_hz = np.exp(rng.uniform(0, np.log(20)))
    count = max(3, int(rate_hz * samples / SAMPLE_RATE))
    impulses = np.zeros(samples)
    impulses[rng.integers(0, samples, count)] = rng.lognormal(0, 0.8, count)
    ring = np.arange(int(0.05 * SAMPLE_RATE)) / SAMPLE_RATE
    pitch_hz, decay_s = (
        np.exp(rng.uniform(np.log(200), np.log(5000))),
        rng.uniform(0.001, 0.012),
    )
    knock = np.sin(2 * np.pi * pitch_hz * ring) + 0.5 * rng.standard_normal(len(ring))
    wave = signal.fftconvolve(impulses, knock * np.exp(-ring / decay_s))[:samples]
    return wave + rng.uniform(0.001, 0.02) * rng.standard_normal(samples)


def _babble(rng: Generator, samples: int, speech: Sequence[Path]) -> Wave:
    """Three to eight talkers at once, each looped from a random point."""
    wave = np.zeros(samples)
    for _ in range(int(rng.integers(3, 9))):
        talker = _read(speech[int(rng.integers(len(speech)))])
        start = int(rng.integers(len(talker)))
        looped = np.resize(np.roll(talker, -start), samples)
        wave += looped / max(float(np.sqrt(np.mean(looped**2))), 1e-9) * rng.uniform(0.5, 1)
    return wave


def make_noise(
    out: Path,
    files: int = 60,
    seed: int = 1,
    speech: Path | None = None,
    workers: int = 2,
) -> list[Path]:
    """Write ``files`` noises ``<kind>-<nnn>.flac`` of 10 to 20 s, 16 kHz, to ``out``.

    Kinds take turns: coloured, hum, clicks, band and, where ``speech`` names a folder, babble made
    from it (which then depends on that folder's files too). Raises ``ValueError`` if ``speech``
    holds no audio or ``out`` the noises of another seed.
    """
    talkers = audio_files_below(speech, "to make babble of; check --from") if speech else []
    kinds: dict[str, Callable[[Generator, int], Wave]] = {
        "coloured": _coloured,
        "babble": partial(_babble, speech=talkers),
        "hum": _hum,
        "clicks": _clicks,
        "band": _band,
    }
    names = [kind for kind in kinds if talkers or kind != "babble"]

    def noise(kind: str, name: str) -> Wave:
        rng = rng_of(seed, name)
        samples = int(rng.uniform(10, 20) * SAMPLE_RATE)
        return _level(kinds[kind](rng, samples), -23)

    jobs: list[Job] = []
    for index in range(files):
        turn, which = divmod(index, len(names))
        kind, name = names[which], f"{names[which]}-{turn:03d}.flac"
        jobs.append((out / name, partial(noise, kind, name)))
    with claimed(out, "noise", seed):
        return make_files(jobs, "noise", workers)


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    kinds = parser.add_subparsers(dest="what", required=True)
    for what, count, seed in (("speech", 260, 1), ("noise", 60, 1), ("rooms", 40, None)):
        kind = kinds.add_parser(what, help=f"write a folder of {what}")
        kind.add_argument("--out", type=path_here, required=True, metavar="DIR")
        kind.add_argument("--count", type=int, default=count, help="files (default: %(default)s)")
        whose = "" if seed else " (default: the spec's)"
        kind.add_argument(
            "--seed", type=int, default=seed, help=f"another seed: other files{whose}"
        )
        kind.add_argument("--workers", type=int, default=cpus())
    babble = kinds.choices["noise"].add_argument("--from", dest="speech", type=path_here)
    babble.metavar, babble.help = "SPEECHDIR", "speech to make babble of"
    studio = kinds.add_parser("studio", help="write a folder of Debian's studio prompts")
    studio.add_argument("--out", type=path_here, required=True, metavar="DIR")
    studio.add_argument("--from", dest="unpacked", type=path_here, required=True, metavar="DIR")
    studio.add_argument("--workers", type=int, default=cpus())
    studio.set_defaults(count=0)
    spec = kinds.choices["rooms"].add_argument("--spec", default="simulated", metavar="SPEC")
    spec.help = "YAML file, or the name of one in data_specs/rooms (default: %(default)s)"


def run(args: argparse.Namespace) -> int:
    """``python -m pipeline corpora speech|noise|rooms|studio --out DIR [--count N] [--seed S]``."""
    if args.count < 0:
        raise UserError(f"--count must not be negative, is {args.count}")
    made = _make(args)
    print(f"{args.out}: {len(made)} {args.what} files")
    return 0


def _make(args: argparse.Namespace) -> list[Path]:
    if args.what == "speech":
        return make_speech(args.out, args.count, args.seed, args.workers)
    if args.what == "studio":
        return make_studio(args.unpacked, args.out, args.workers)
    if args.what == "noise":
        return make_noise(args.out, args.count, args.seed, args.speech, args.workers)
    return make_rooms(load_rooms(args.spec, args.seed), args.out, args.count, args.workers)
