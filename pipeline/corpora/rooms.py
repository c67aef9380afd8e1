"""Simulated rooms as a corpus, for users without measured ones: seeded and resumable.

A room spec (``data_specs/rooms``) says what is drawn. Room ``k`` is the same whatever the count.
Each is a shoebox with one source and one microphone: image sources (pyroomacoustics), a diffuse
tail, the direct sound 2.5 ms after the start, peak 0.9, FLAC at 16 kHz. Beside it lies its record;
``rooms.jsonl`` holds all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator

from data_specs.distributions import Distribution
from data_specs.io.errors import UserError
from data_specs.room import RoomSpec
from data_specs.sample import SAMPLE_RATE
from data_specs.strict import digest
from pipeline.corpora.folder import (
    PEAK,
    Record,
    Wave,
    claimed,
    make_files,
    manifest_written,
    rng_of,
    write_record,
)
from pipeline.draw import sample

MANIFEST = "rooms.jsonl"
SPEED_OF_SOUND = 343.0  # m/s

POSITIONS = 100
"""Positions tried for source and microphone before a whole room is drawn again."""
CORRECTIONS = 4
"""Times that the absorption is corrected, so that the decay comes nearer to what was drawn."""


@dataclass(frozen=True)
class Shoebox:
    """A room as it was drawn; ``tail`` makes its diffuse tail."""

    size_m: Wave
    source_m: Wave
    microphone_m: Wave
    rt60_s: float
    distance_m: float
    tail: int


def draw_room(spec: RoomSpec, rng: Generator) -> Shoebox | None:
    """One draw of everything; None where source and microphone do not fit so far apart."""

    def one(distribution: Distribution) -> float:
        return float(sample(distribution, rng.random(1))[0])

    size_m = np.array([one(spec.width_m), one(spec.depth_m), one(spec.height_m)])
    rt60_s, distance_m = one(spec.rt60_s), one(spec.distance_m)
    tail = int(rng.integers(2**63))
    for _ in range(POSITIONS):
        microphone_m = rng.uniform(spec.wall_margin_m, size_m - spec.wall_margin_m)
        direction = rng.standard_normal(3)
        source_m = microphone_m + distance_m * direction / np.linalg.norm(direction)
        inside = (source_m >= spec.wall_margin_m) & (source_m <= size_m - spec.wall_margin_m)
        if inside.all():
            return Shoebox(size_m, source_m, microphone_m, rt60_s, distance_m, tail)
    return None


def eyring_absorption(size_m: Wave, rt60_s: float) -> float:
    """Energy absorption of all walls of a shoebox that decays 60 dB in ``rt60_s``.

    Eyring's formula: unlike Sabine's it has an answer below 1 for every decay.
    """
    volume = float(size_m.prod())
    surface = 2 * float(volume * (1 / size_m).sum())
    return float(1 - np.exp(-24 * np.log(10) / SPEED_OF_SOUND * volume / (surface * rt60_s)))


def _images(box: Shoebox, absorption: float, max_order: int) -> Wave:
    """The response by image sources (T,); pyroomacoustics' filters delay it by 2.5 ms."""
    import pyroomacoustics

    room = pyroomacoustics.ShoeBox(
        box.size_m,
        fs=SAMPLE_RATE,
        materials=pyroomacoustics.Material(absorption),
        max_order=max_order,
    )
    room.add_source(box.source_m)
    room.add_microphone(box.microphone_m)
    room.compute_rir()
    return np.asarray(room.rir[0][0], dtype=np.float64)


def with_tail(rng: Generator, early: Wave, rt60_s: float, complete_s: float) -> Wave:
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


def simulate(spec: RoomSpec, box: Shoebox) -> tuple[Wave, float]:
    """The response (T,), direct sound 2.5 ms after the start, and the walls' absorption.

    Eyring's formula is off where sound is not diffuse, so the decay is measured and corrected.
    """
    # Every image of an order up to N has arrived once sound has crossed the room N times.
    complete_s = spec.max_image_order * float(box.size_m.min()) / SPEED_OF_SOUND
    asked_s = box.rt60_s
    for _ in range(CORRECTIONS):
        absorption = eyring_absorption(box.size_m, asked_s)
        early = _images(box, absorption, spec.max_image_order)
        wave = with_tail(rng_of(box.tail, "tail"), early, box.rt60_s, complete_s)
        wave = wave[int(box.distance_m / SPEED_OF_SOUND * SAMPLE_RATE) :]
        off = box.rt60_s / decay_seconds(wave)
        if abs(1 / off - 1) <= spec.rt60_tolerance / 4:
            break
        asked_s *= off
    return wave / np.abs(wave).max() * PEAK, absorption


def make_room(spec: RoomSpec, name: str) -> tuple[Wave, Record]:
    """Room ``name``: its response (T,) and its record.

    Draws again, deterministically, where the positions do not fit or the decay is not reached;
    raises ``UserError`` after the spec's ``tries``.
    """
    reasons: list[str] = []
    for attempt in range(spec.tries):
        box = draw_room(spec, rng_of(spec.seed, f"simulated/{name}/{attempt}"))
        if box is None:
            reasons.append("distance_m does not fit")
            continue
        wave, absorption = simulate(spec, box)
        measured_s = decay_seconds(wave)
        if abs(measured_s / box.rt60_s - 1) <= spec.rt60_tolerance:
            return wave, _record(name, box, absorption, measured_s, attempt)
        reasons.append("rt60_s cannot be reached")
    told = ", ".join(f"{reasons.count(r)} x {r}" for r in sorted(set(reasons)))
    raise UserError(f"{spec.name}: {name}: no room in {spec.tries} tries: {told}")


def _record(name: str, box: Shoebox, absorption: float, measured_s: float, redrawn: int) -> Record:
    width_m, depth_m, height_m = (round(float(side), 4) for side in box.size_m)
    return {
        "path": name,
        "width_m": width_m,
        "depth_m": depth_m,
        "height_m": height_m,
        "rt60_s": box.rt60_s,
        "measured_rt60_s": round(measured_s, 4),
        "absorption": round(absorption, 4),
        "distance_m": box.distance_m,
        "source_m": [round(float(x), 4) for x in box.source_m],
        "microphone_m": [round(float(x), 4) for x in box.microphone_m],
        "redrawn": redrawn,
    }


def make_rooms(spec: RoomSpec, out: Path, count: int, workers: int = 1) -> list[Path]:
    """Write ``count`` rooms ``room00000.flac`` with their records to ``out``, those not there yet.

    Raises ``UserError`` for a folder of another spec or seed, or where no room fits the spec.
    """
    values = spec.model_dump(mode="json", exclude={"about"})

    def room(path: Path) -> Wave:
        wave, record = make_room(spec, path.name)
        write_record(path, record)  # before the audio: a file that is there is whole
        return wave

    paths = [out / f"room{index:05d}.flac" for index in range(count)]
    jobs = [(path, partial(room, path)) for path in paths]
    with (
        claimed(out, f"rooms: {spec.name}, spec {digest(values)[:16]}", spec.seed),
        manifest_written(out / MANIFEST),
    ):
        return make_files(jobs, "rooms", workers)
