"""Makers of the offline default corpora: demo speech, noise and rooms, as ordinary folders.

Nothing downstream knows that these folders are a demo: they hold FLAC files in a plain layout, and
the corpora of ``data_specs/corpora/demo.yaml`` read them like any user's own. Each maker is seeded
(same seed, same bytes; a larger count only adds files) and resumable (a file is renamed into place
when it is whole, so what exists is kept).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import signal

from data_specs.io.addresses import path_here
from data_specs.io.audio import heard_below
from data_specs.io.cli import cancelled_early
from data_specs.io.errors import UserError
from data_specs.io.files import only_writer, remove_leftovers, whole_file, write_text
from data_specs.io.hardware import cpus
from data_specs.io.parse import json_object
from data_specs.io.progress import progress_bar
from data_specs.io.rng import stream
from data_specs.sample import SAMPLE_RATE
from data_specs.strict import HERE
from pipeline.audio import DropSample, encode_flac, read_part, to_pcm

Wave = NDArray[np.float64]
Job = tuple[Path, Callable[[], Wave]]

MADE_BY = "made-by.json"
"""Beside the audio: which maker and seed, so that two seeds never mix in one folder."""

PEAK = 0.9
MIN_SPEECH_SECONDS = 8.2  # a crop of 7.68 s fits, with room for a recipe's speed change
AIM_SPEECH_SECONDS = 9.6
SPEED_OF_SOUND = 343.0  # m/s


# --- common ---------------------------------------------------------------------------------------


def rng_of(seed: int, name: str) -> np.random.Generator:
    """A generator for one file: it depends on the seed and the file's name and on nothing else."""
    return np.random.Generator(np.random.Philox(key=stream(seed, f"makers/{name}", 0, 1)[0, :2]))


def write_flac(path: Path, wave: Wave) -> None:
    """Write 16-bit FLAC at 16 kHz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(encode_flac(to_pcm(wave.astype(np.float32))))


@contextmanager
def claimed(out: Path, maker: str, seed: int) -> Iterator[None]:
    """Hold ``out`` as its only writer; leftovers of runs that were killed are removed.

    ``UserError`` where another run writes to it, or where it is another maker's or seed's.
    """
    mark, path = {"maker": maker, "seed": seed}, out / MADE_BY
    with only_writer(out):
        if not path.is_file():
            write_text(path, json.dumps(mark) + "\n")
        elif (found := json_object(path.read_bytes(), path, "give another --out")) != mark:
            raise UserError(f"{path}: made with {found}, not {mark}; give another --out or seed")
        else:
            for part in out.rglob(".*.part"):  # as older versions named what was on its way
                part.unlink(missing_ok=True)
        remove_leftovers(out)
        yield


def make_files(jobs: Iterable[Job], what: str, workers: int) -> list[Path]:
    """Run the jobs whose file is not there yet, with a progress bar; return all paths."""
    jobs = list(jobs)
    todo = [job for job in jobs if not job[0].is_file()]
    with (
        progress_bar(total=len(jobs), initial=len(jobs) - len(todo), desc=what, unit="file") as bar,
        cancelled_early(ThreadPoolExecutor(max_workers=max(1, workers))) as pool,
    ):
        for _ in pool.map(lambda job: write_flac(job[0], job[1]()), todo):
            bar.update()
    return [path for path, _ in jobs]


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


@cache
def sentences_of() -> dict[str, list[str]]:
    """Sentences to speak, by language."""
    sentences: dict[str, list[str]] = yaml.safe_load(
        (HERE / "voices" / "sentences.yaml").read_text(encoding="utf-8")
    )
    return sentences


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
    lines = rng_of(seed, name).permutation(sentences_of()[voice.language])
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
    ``RuntimeError`` naming the Debian package if a synthesizer is missing, ``ValueError`` if
    ``out`` holds the clips of another seed.
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


# --- noise ----------------------------------------------------------------------------------------


def _shaped(rng: np.random.Generator, samples: int, gain: Callable[[Wave], Wave]) -> Wave:
    """Gaussian noise with the magnitude response ``gain(frequency_hz)``."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency_hz = np.asarray(np.fft.rfftfreq(samples, 1 / SAMPLE_RATE), np.float64)
    return np.asarray(np.fft.irfft(spectrum * gain(frequency_hz), samples))


def _sway(rng: np.random.Generator, samples: int, depth_db: float) -> Wave:
    """A slow random gain: a smooth curve through a new level about every second."""
    points = 2 + samples // SAMPLE_RATE
    levels_db = rng.normal(0, depth_db, points)
    at = np.linspace(0, points - 1, samples)
    return 10 ** (np.interp(at, np.arange(points), levels_db) / 20)


def _coloured(rng: np.random.Generator, samples: int) -> Wave:
    """White, pink, brown or anything between: -9 to +2 dB an octave, slowly swaying."""
    slope_db = rng.choice([0.0, -3.0, -6.0, rng.uniform(-9, 2)])
    exponent = slope_db / (20 * np.log10(2))
    noise = _shaped(rng, samples, lambda hz: np.maximum(hz, 30.0) ** exponent)
    return noise * _sway(rng, samples, rng.uniform(0, 4))


def _band(rng: np.random.Generator, samples: int) -> Wave:
    """A band of noise one to four octaves wide: fans, wind, hiss, water."""
    centre_hz = np.exp(rng.uniform(np.log(150), np.log(5000)))
    octaves = rng.uniform(0.5, 2)

    def gain(hz: Wave) -> Wave:
        return 1 / (1 + (np.log2(np.maximum(hz, 1.0) / centre_hz) / octaves) ** 4) + 1e-3

    return _shaped(rng, samples, gain) * _sway(rng, samples, rng.uniform(1, 5))


def _hum(rng: np.random.Generator, samples: int) -> Wave:
    """Mains hum at 50 or 60 Hz with harmonics and a little hiss."""
    seconds = np.arange(samples) / SAMPLE_RATE
    mains_hz = rng.choice([50.0, 60.0]) * rng.uniform(0.998, 1.002)
    wave = np.zeros(samples)
    for harmonic in range(1, int(rng.integers(6, 40))):
        gain = rng.uniform(0.2, 1) / harmonic ** rng.uniform(0.4, 1.2)
        wave += gain * np.sin(2 * np.pi * (harmonic * mains_hz * seconds + rng.uniform()))
    return wave + rng.uniform(0.01, 0.15) * rng.standard_normal(samples)


def _clicks(rng: np.random.Generator, samples: int) -> Wave:
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


def _babble(rng: np.random.Generator, samples: int, speech: Sequence[Path]) -> Wave:
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
    talkers = heard_below(speech, "to make babble of; check --from") if speech else []
    kinds: dict[str, Callable[[np.random.Generator, int], Wave]] = {
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


# --- rooms ----------------------------------------------------------------------------------------

MAX_ORDER = 20
"""Image sources up to this order (some 11 000); what comes later is a diffuse tail."""


def _response(size_m: Wave, source_m: Wave, microphone_m: Wave, rt60_s: float) -> Wave:
    """Early reflections of a shoebox by image sources, with walls that give ``rt60_s`` (Eyring)."""
    import pyroomacoustics

    volume = float(size_m.prod())
    surface = 2 * float(volume * (1 / size_m).sum())
    # Eyring instead of pyroomacoustics' inverse Sabine: that has no answer for short decays.
    absorption = 1 - np.exp(-24 * np.log(10) / SPEED_OF_SOUND * volume / (surface * rt60_s))
    room = pyroomacoustics.ShoeBox(
        size_m,
        fs=SAMPLE_RATE,
        materials=pyroomacoustics.Material(float(absorption)),
        max_order=MAX_ORDER,
    )
    room.add_source(source_m)
    room.add_microphone(microphone_m)
    room.compute_rir()
    return np.asarray(room.rir[0][0], dtype=np.float64)


def with_tail(rng: np.random.Generator, early: Wave, rt60_s: float, complete_s: float) -> Wave:
    """Continue ``early`` beyond ``complete_s`` by noise that decays 60 dB in ``rt60_s``.

    From there on image sources are missing, and a real room's reflections are too dense to be told
    from noise. The tail starts at the level that the 20 ms before it have.
    """
    samples = max(int((complete_s + 1.1 * rt60_s) * SAMPLE_RATE), 1)
    join, window = int(complete_s * SAMPLE_RATE), int(0.02 * SAMPLE_RATE)
    wave = np.zeros(samples)
    kept = early[: min(join, samples)]
    wave[: len(kept)] = kept
    level = float(np.sqrt(np.mean(wave[max(0, join - window) : join] ** 2)))
    decay = 10 ** (-3 * (np.arange(samples - join) + window / 2) / (rt60_s * SAMPLE_RATE))
    wave[join:] += level * decay * rng.standard_normal(samples - join)
    return wave


def decay_seconds(response: Wave) -> float:
    """Decay by 60 dB, in seconds: T20 of Schroeder's curve, from -5 to -25 dB."""
    energy = np.cumsum(response[::-1] ** 2)[::-1]
    level_db = 10 * np.log10(energy / energy[0] + 1e-12)
    samples = int(np.argmax(level_db < -25) - np.argmax(level_db < -5))
    return 3 * max(samples, 1) / SAMPLE_RATE


def _room(
    rng: np.random.Generator, rt60_s: tuple[float, float], length_m: tuple[float, float]
) -> Wave:
    """One response: its direct sound 2.5 ms after the start, peak 0.9."""
    length, width = np.sort(rng.uniform(*length_m, 2))[::-1]
    size_m = np.array([length, width, rng.uniform(2.3, min(4.0, 1.2 * width + 1))])
    seconds = float(np.exp(rng.uniform(*np.log(rt60_s))))
    source_m = rng.uniform(0.3, size_m - 0.3)
    microphone_m = rng.uniform(0.3, size_m - 0.3)
    # Every image of an order up to N has arrived once sound has crossed the room N times.
    complete_s = MAX_ORDER * float(size_m.min()) / SPEED_OF_SOUND
    asked_s = seconds
    for _ in range(2):  # Eyring's formula is off in a flat or absorbent room: correct it once
        early = _response(size_m, source_m, microphone_m, asked_s)
        wave = with_tail(rng, early, seconds, complete_s)
        asked_s *= seconds / decay_seconds(wave)
    direct = int(np.linalg.norm(source_m - microphone_m) / SPEED_OF_SOUND * SAMPLE_RATE)
    wave = wave[max(0, direct) :]  # pyroomacoustics' own filter delay leaves 2.5 ms before it
    return wave / np.abs(wave).max() * PEAK


def make_rooms(
    out: Path,
    rooms: int = 40,
    seed: int = 1,
    rt60_s: tuple[float, float] = (0.15, 1.2),
    length_m: tuple[float, float] = (2.5, 10.0),
    workers: int = 2,
) -> list[Path]:
    """Write ``rooms`` impulse responses ``room-<nnn>.flac``, 16 kHz, peak 0.9, to ``out``.

    Shoebox rooms with sides in ``length_m`` and a decay by 60 dB in ``rt60_s`` seconds (drawn on a
    logarithmic scale). Raises ``ValueError`` for an empty range or another seed's folder.
    """
    for name, (low, high) in {"rt60_s": rt60_s, "length_m": length_m}.items():
        if not 0 < low <= high:
            raise UserError(f"{name}: {low} to {high} is not a range of positive numbers")

    def room(name: str) -> Wave:
        return _room(rng_of(seed, name), rt60_s, length_m)

    names = [f"room-{index:03d}.flac" for index in range(rooms)]
    jobs: list[Job] = [(out / name, partial(room, name)) for name in names]
    with claimed(out, "rooms", seed):
        return make_files(jobs, "rooms", workers)


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    verbs = parser.add_subparsers(dest="what", required=True)
    for what, count in {"speech": 260, "noise": 60, "rooms": 40}.items():
        verb = verbs.add_parser(what, help=f"write a demo {what} folder")
        verb.add_argument("--out", type=path_here, required=True, metavar="DIR")
        verb.add_argument("--count", type=int, default=count, help="files (default %(default)s)")
        verb.add_argument("--seed", type=int, default=1)
        verb.add_argument("--workers", type=int, default=cpus())
        if what == "noise":
            verb.add_argument(
                "--from",
                dest="speech",
                type=path_here,
                metavar="SPEECHDIR",
                help="babble's talkers",
            )


def run(args: argparse.Namespace) -> int:
    """``python -m pipeline corpora speech|noise|rooms --out DIR [--count N] [--seed S]``.

    Raises ``UserError`` for a missing synthesizer or wrong input.
    """
    made = _run(args)
    print(f"{args.out}: {len(made)} {args.what} files")
    return 0


def _run(args: argparse.Namespace) -> list[Path]:
    if args.count < 0:
        raise UserError(f"--count must not be negative, is {args.count}")
    if args.what == "speech":
        return make_speech(args.out, args.count, args.seed, args.workers)
    if args.what == "noise":
        return make_noise(args.out, args.count, args.seed, args.speech, args.workers)
    return make_rooms(args.out, args.count, args.seed, workers=args.workers)
