"""Any labelled clips in a grid of rooms and noise, each made once, with its clean twin.

A condition is ``ROOM``, ``noiseSNR`` or ``ROOM-noiseSNR``, of sources that training has seen or
``-unseen`` ones; ROOM is ``short`` or ``long`` by its RT60, the SNR 20, 10, 5 or 0 dB. A clip has
the same room, noise and place in it at every SNR and beside another condition, so that conditions
are compared in pairs. ``clean`` is always made: 16 kHz, mono, at one level, the twin of all others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np

from data_specs.io.addresses import PathOrUrl, path_here, path_or_url
from data_specs.io.audio import BadAudio, header_of
from data_specs.io.errors import UserError
from data_specs.io.hardware import cpus
from data_specs.labelled import SPLITS, LabelledClip, read_labelled
from data_specs.recipe import Source
from data_specs.strict import digest, unknown
from pipeline.audio import DropSample, Wave, read_whole
from pipeline.corpora.folder import LabelledJob, make_labelled
from pipeline.corpora.manifest import scan_folders
from pipeline.corpora.rooms import decay_seconds
from pipeline.render.mix import require_sound
from pipeline.render.plan import (
    NoisePlan,
    RoomPlan,
    Table,
    draw_noise,
    draw_room,
    make_table,
    room_at,
)
from pipeline.render.render import RESPONSE_SECONDS, Roots, find, mixed

VERSION = 1
"""Raised whenever the same recipe would give other bytes."""

LEVEL_DBFS = -26.0
"""Active level of every clip; lower where a peak would clip."""

SNRS_DB = (20, 10, 5, 0)
SEEN, UNSEEN = "seen", "unseen"


@dataclass(frozen=True)
class Condition:
    """A cell of the grid: "" and None where there is no room or no noise."""

    room: str = ""
    snr_db: int | None = None
    sources: str = SEEN

    def uses(self, role: str) -> bool:
        """Whether it has "rooms" or "noise"."""
        return bool(self.room) if role == "rooms" else self.snr_db is not None

    @property
    def name(self) -> str:
        noise = "" if self.snr_db is None else f"noise{self.snr_db}"
        unseen = UNSEEN if self.sources == UNSEEN else ""
        return "-".join(filter(None, (self.room, noise, unseen))) or CLEAN


CLEAN = "clean"
GRID = {
    one.name: one
    for one in (
        Condition(),
        *(
            Condition(room, snr_db, sources)
            for room, snr_db, sources in product(
                ("", "short", "long"), (None, *SNRS_DB), (SEEN, UNSEEN)
            )
            if room or snr_db is not None
        ),
    )
}
DEFAULT = (
    *(CLEAN, "noise20", "noise10", "noise0", "noise10-unseen", "noise0-unseen"),
    *("short", "long", "long-unseen", "short-noise10", "long-noise5", "long-noise5-unseen"),
)
"""Every SNR and kind of room; of noise, of rooms and of both a cell both seen and unseen."""


@dataclass(frozen=True)
class Scenes:
    """What conditions draw from: tables of noise by "unseen", of rooms by "long-unseen"."""

    noise: Mapping[str, Table]
    rooms: Mapping[str, Table]
    roots: Roots
    seed: int

    def draw(self, one: Condition, clip: int) -> tuple[RoomPlan | None, NoisePlan | None]:
        """Room and noise of a clip: the same whatever the SNR and whatever is beside it."""
        room = noise = None
        if one.room:
            kind = f"{one.room}-{one.sources}"
            room = draw_room(self.rooms[kind], self.seed, f"conditions/{kind}", clip)
        if one.snr_db is not None:
            name = f"conditions/{one.sources}"
            noise = draw_noise(self.noise[one.sources], self.seed, name, clip, one.snr_db)
        return room, noise


def chosen(names: Sequence[str]) -> list[Condition]:
    """Conditions by name, in the grid's order, the clean one first. ``UserError`` for another."""
    for name in names:
        if name not in GRID and name != "all":
            raise UserError(f"--conditions: {unknown('condition', name, (*GRID, 'all'))}")
    return [one for name, one in GRID.items() if name in {CLEAN, *names} or "all" in names]


def scan_sources(
    wanted: Sequence[Condition],
    folders: Mapping[str, Sequence[PathOrUrl]],
    rt60_s: Sequence[float],
    seed: int,
) -> tuple[Scenes, dict[str, str]]:
    """Scan what the conditions draw from, ``folders`` by option; its hashes by option too.

    Raises ``UserError`` for an option that is missing or gives no room of the kind.
    """
    scenes = Scenes({}, {}, {name: list(some) for name, some in folders.items()}, seed)
    noise: dict[str, Table] = {}
    rooms: dict[str, Table] = {}
    hashes: dict[str, str] = {}
    for role, sources in product(("noise", "rooms"), (SEEN, UNSEEN)):
        option = role if sources == SEEN else f"unseen-{role}"
        users = [one for one in wanted if one.sources == sources and one.uses(role)]
        if not users:
            continue
        if not folders[option]:
            raise UserError(f"condition {users[0].name!r} needs --{option} DIR")
        manifest = scan_folders(role, option, folders[option])
        hashes[option] = manifest.sha256
        table = make_table(manifest, Source(corpus=option), role, "all")
        if role == "noise":
            noise[sources] = table
            continue
        kinds = _by_decay(table, scenes.roots, rt60_s)
        for one in users:
            if not len(kinds[one.room]):
                short_s, long_s = rt60_s
                raise UserError(
                    f"condition {one.name!r}: no room of --{option} is {one.room}: an RT60 below "
                    f"{short_s:g} s is short, up to {long_s:g} s long (--rt60)"
                )
            rooms[f"{one.room}-{sources}"] = kinds[one.room]
    return replace(scenes, noise=noise, rooms=rooms), hashes


def _by_decay(table: Table, roots: Roots, rt60_s: Sequence[float]) -> dict[str, Table]:
    """Short and long rooms, by the decay behind the direct sound; what is longer is neither."""
    decays_s = np.array([_decay(room_at(table, file), roots) for file in range(len(table))])
    short_s, long_s = rt60_s
    kinds = {"short": decays_s < short_s, "long": (decays_s >= short_s) & (decays_s <= long_s)}
    columns = {name: value for name, value in vars(table).items() if name != "corpus"}
    return {
        kind: replace(table, **{name: value[keep] for name, value in columns.items()})
        for kind, keep in kinds.items()
    }


def _decay(room: RoomPlan, roots: Roots) -> float:
    """RT60 in seconds, to the millisecond; infinite where the response cannot be used."""
    try:
        response = read_whole(find(roots, room), RESPONSE_SECONDS).astype(np.float64)
    except DropSample as drop:
        print(f"left out: {drop}", file=sys.stderr)
        return np.inf
    behind = response[np.argmax(np.abs(response)) :]
    return round(decay_seconds(behind), 3) if np.any(behind) else np.inf


# --- clips ----------------------------------------------------------------------------------------


def jobs_of(
    clips: Sequence[LabelledClip], wanted: Sequence[Condition], scenes: Scenes, seconds: float
) -> list[LabelledJob]:
    """Every clip in every condition, cut to ``seconds``.

    A rating is of the clip as it was, and a text of the whole clip: neither is a row's that has
    room or noise, or was cut.
    """
    whole = [_seconds_of(clip) <= seconds for clip in clips]
    return [
        (
            {
                "path": _name(one.name, index),
                "mos": clip.mos if one.name == CLEAN and whole[index] else None,
                **{name: getattr(clip, name) for name in ("keyword", "speaker")},
                **{n: getattr(clip, n) if whole[index] else None for n in ("text", "text_by")},
                "split": clip.split,
                "condition": one.name,
                "clean": _name(CLEAN, index),
            },
            partial(make_clip, clip, *scenes.draw(one, index), scenes.roots, seconds),
        )
        for one in wanted
        for index, clip in enumerate(clips)
    ]


def _name(condition: str, index: int) -> str:
    return f"{condition}/{index:06d}.flac"


def _seconds_of(clip: LabelledClip) -> float:
    try:
        header = header_of(clip.path)
    except BadAudio:  # told where it is read
        return 0.0
    return header.frames / header.sample_rate_hz


def make_clip(
    clip: LabelledClip,
    room: RoomPlan | None,
    noise: NoisePlan | None,
    roots: Roots,
    seconds: float,
) -> Wave:
    """One clip (T,) in one condition. Raises ``DropSample`` for a listed reason."""
    speech = read_whole(clip.path, seconds)
    require_sound(speech, str(clip.path))
    return mixed(speech, room, noise, LEVEL_DBFS, roots)


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("labelled", type=path_here, metavar="CSV", help="a labelled CSV")
    parser.add_argument("--out", type=path_here, required=True, metavar="DIR")
    parser.add_argument(
        "--conditions",
        nargs="+",
        default=DEFAULT,
        metavar="NAME",
        help=f"of {', '.join(GRID)}, or all (default: {' '.join(DEFAULT)})",
    )
    for option, what in (
        ("noise", "noise that training has seen"),
        ("rooms", "rooms that training has seen"),
        ("unseen-noise", "noise that it has not"),
        ("unseen-rooms", "rooms that it has not"),
    ):
        parser.add_argument(
            f"--{option}", nargs="+", type=path_or_url, default=[], metavar="DIR", help=what
        )
    parser.add_argument(
        "--rt60",
        nargs=2,
        type=float,
        default=(0.7, 3.0),
        metavar=("SHORT", "LONG"),
        help="seconds: below the first a room is short, up to the second long (default: .7 3)",
    )
    parser.add_argument("--split", choices=SPLITS, help="only the clips of this split")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="cut clips to this (default: 30)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=cpus())


def run(args: argparse.Namespace) -> int:
    """Make clips, go on with them, or add names; exit status 1 where one cannot be made."""
    if not 0 < args.seconds <= 3600:
        raise UserError(f"--seconds must be from 0 to 3600, is {args.seconds}")
    wanted = chosen(args.conditions)
    clips = [c for c in read_labelled([args.labelled]) if args.split in (None, c.split)]
    if not clips:
        raise UserError(f"{args.labelled}: no clip of --split {args.split}")
    options = ("noise", "rooms", "unseen_noise", "unseen_rooms")
    folders = {name.replace("_", "-"): getattr(args, name) for name in options}
    scenes, hashes = scan_sources(wanted, folders, args.rt60, args.seed)
    home = args.labelled.resolve().parent
    recipe = {
        "version": VERSION,
        "clips": digest([(os.path.relpath(c.path, home), c.path.stat().st_size) for c in clips]),
        "seconds": args.seconds,
        "level_dbfs": LEVEL_DBFS,
        "rt60_s": list(args.rt60),
        "sources": hashes,
    }
    jobs = jobs_of(clips, wanted, scenes, args.seconds)
    return make_labelled(args.out, "conditions", recipe, args.seed, jobs, args.workers)
