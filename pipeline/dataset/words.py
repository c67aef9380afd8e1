"""Strings of words, or sentences, with their exact text: FLAC and one labelled CSV.

Out of a CSV of isolated recordings (``keyword``, ``speaker``, ``split``) a string is spliced of one
speaker's words: each cut to what is heard of it, at a level of its own, over the end of the one
before. Out of a folder of ``pipeline speak`` each clip is a sentence. One room and one noise lie
over the whole, where folders of them are given. String ``k`` of a split follows from the seed and
``k`` alone. Speakers, noise and rooms of one split are in no other.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from data_specs.io.addresses import path_here, path_or_url
from data_specs.io.errors import UserError
from data_specs.io.hardware import cpus
from data_specs.io.names import below, plain
from data_specs.io.options import add_options, options_of
from data_specs.io.parse import json_field, json_object
from data_specs.io.text import read_text
from data_specs.labelled import COLUMNS, SPLITS
from data_specs.rated import file_of, read_rows
from data_specs.recipe import Holdout, Source
from data_specs.sample import FRAME_SAMPLES, SAMPLE_RATE
from data_specs.strict import Strict, checked, digest, unknown
from pipeline.audio import Wave, read_clip
from pipeline.corpora.folder import LabelledJob, make_labelled
from pipeline.corpora.manifest import Manifest, scan_folders, split_of
from pipeline.corpora.speak import MANIFEST
from pipeline.draw import index, number
from pipeline.render.mix import fit_length, gain, require_sound
from pipeline.render.plan import NoisePlan, RoomPlan, Table, draw_noise, draw_room, make_table
from pipeline.render.render import Roots, mixed

VERSION = 1
"""Raised whenever the same recipe would give other bytes."""

LEVEL_DBFS = -26.0
"""Active level of a string; lower where a peak would clip."""

SPREAD_DB = 3.0
"""A word is up to so much louder or softer than the string's level."""

RANGE_DB, MARGIN_S = 30.0, 0.05
"""Of a recording a word reaches from the first 20 ms to the last that are at most so far below the
loudest, and so far beyond: what is silent at the ends would be a pause at every joint."""

DIFFERENT = 2
"""Words that a speaker must have: a string of one recording alone gives its joints away."""

LONGEST_S = 30
"""A longer recording is no word and no sentence."""

HOLDOUT = Holdout(validation=0.1, test=0.1)
"""Of speakers whose split the CSV does not say, of noise and of rooms."""


@dataclass(frozen=True)
class Recording:
    """A word or a sentence as it was recorded; ``speaker`` is empty where nobody knows."""

    path: Path
    text: str
    speaker: str
    split: str


@dataclass(frozen=True)
class Piece:
    """A recording in a string: over how many samples of what is before it, and how loud."""

    recording: Recording
    overlap: int = 0
    level_dbfs: float | None = None


class Drawing(Strict):
    """What is drawn of a string; each decision is a stream of its own."""

    words: tuple[Annotated[int, Field(ge=1, le=100)], int] = Field(
        (2, 6), description="of a string, least and most"
    )
    overlap_ms: tuple[Annotated[float, Field(ge=0, le=1000)], float] = Field(
        (0.0, 150.0), description="of a word over the end of the one before, least and most"
    )
    mixed_speakers: bool = Field(False, description="a string may be of several, or of unknown")
    snr_db: tuple[float, float] = Field((10.0, 30.0), description="of noise, least and most")
    room_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="of the strings that are in a room"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="another one: other strings")

    @model_validator(mode="after")
    def _ordered(self) -> Drawing:
        for name in ("words", "overlap_ms", "snr_db"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"{name}: {low:g} is above {high:g}")
        return self

    def pieces(self, groups: Sequence[Sequence[Recording]], split: str, k: int) -> list[Piece]:
        """String ``k`` of a split, out of one group's recordings, none of them twice in a row."""
        name, (least, most) = f"words/{split}", self.words
        group = groups[index(self.seed, f"{name}/speaker", k, len(groups))]
        found: list[Piece] = []
        place = -1
        for turn in range(least + index(self.seed, f"{name}/count", k, most - least + 1)):
            others = len(group) - (turn > 0 and len(group) > 1)
            step = index(self.seed, f"{name}/word/{turn}", k, others)
            place = (place + 1 + step) % len(group)
            overlap_ms = self._between(self.overlap_ms, f"{name}/overlap/{turn}", k)
            overlap = round(overlap_ms * SAMPLE_RATE / 1000) if turn else 0
            louder_db = self._between((-SPREAD_DB, SPREAD_DB), f"{name}/level/{turn}", k)
            found.append(Piece(group[place], overlap, LEVEL_DBFS + louder_db))
        return found

    def around(
        self, rooms: Table | None, noise: Table | None, split: str, k: int
    ) -> tuple[RoomPlan | None, NoisePlan | None]:
        """Room and noise of string ``k`` of a split."""
        name = f"words/{split}"
        in_room = number(self.seed, f"{name}/in_room", k) < self.room_share
        snr_db = self._between(self.snr_db, f"{name}/snr_db", k)
        return (
            draw_room(rooms, self.seed, name, k) if rooms and in_room else None,
            draw_noise(noise, self.seed, name, k, snr_db) if noise else None,
        )

    def _between(self, ends: tuple[float, float], name: str, k: int) -> float:
        return ends[0] + (ends[1] - ends[0]) * number(self.seed, name, k)


# --- audio ----------------------------------------------------------------------------------------


def heard(wave: Wave) -> Wave:
    """What is heard of a recorded word (T,), see ``RANGE_DB``."""
    count = -(-len(wave) // FRAME_SAMPLES)
    frames = fit_length(wave, count * FRAME_SAMPLES).reshape(-1, FRAME_SAMPLES).astype(np.float64)
    power = np.mean(frames**2, axis=1)
    loud = np.flatnonzero(power >= power.max() * 10 ** (-RANGE_DB / 10))
    margin = int(MARGIN_S * SAMPLE_RATE)
    return wave[max(0, loud[0] * FRAME_SAMPLES - margin) : (loud[-1] + 1) * FRAME_SAMPLES + margin]


def joined(waves: Sequence[Wave], overlaps: Sequence[int]) -> Wave:
    """Waves one after the other, each over the last samples of what is before it."""
    whole = waves[0]
    for wave, overlap in zip(waves[1:], overlaps[1:], strict=True):
        over = min(overlap, len(whole), len(wave))
        end = len(whole) - over
        whole = np.concatenate([whole[:end], whole[end:] + wave[:over], wave[over:]])
    return whole


def make_string(
    pieces: Sequence[Piece], room: RoomPlan | None, noise: NoisePlan | None, roots: Roots
) -> Wave:
    """The audio of a string (T,). Raises ``DropSample`` for a listed reason."""
    waves = []
    for piece in pieces:
        wave = read_clip(piece.recording.path, LONGEST_S)
        level_dbfs = require_sound(wave, str(piece.recording.path))
        if piece.level_dbfs is not None:
            wave = gain(_faded(heard(wave)), piece.level_dbfs - level_dbfs)
        waves.append(wave)
    return mixed(joined(waves, [p.overlap for p in pieces]), room, noise, LEVEL_DBFS, roots)


def _faded(wave: Wave) -> Wave:
    """In and out over 5 ms: a hard seam clicks."""
    fade = min(SAMPLE_RATE // 200, len(wave) // 2)
    ramp = np.ones(len(wave), np.float32)
    ramp[:fade] = (np.arange(fade) + 0.5) / max(fade, 1)
    return wave * np.minimum(ramp, ramp[::-1])


# --- recordings -----------------------------------------------------------------------------------


def recordings_of(csv_path: Path, column: str, mixed_speakers: bool) -> list[Recording]:
    """Isolated words of a labelled CSV whose word is in ``column``; those that nobody can use told.

    A recording without a speaker cannot be kept apart from another split's, unless its own split is
    said, nor stand beside another one, unless speakers may be mixed. Raises ``UserError`` for a
    speaker in two splits.
    """
    about = "isolated words are a CSV with columns path, speaker, split and --column"
    rows = read_rows(csv_path, ("path", column), (column, *COLUMNS), about)
    drawn = split_of(sorted({_cell(row, "speaker") for row, _ in rows} - {""}), HOLDOUT)
    found, left_out = [], 0
    splits: dict[str, str] = {}
    for row, where in rows:
        word, speaker = _cell(row, column), _cell(row, "speaker")
        split = _cell(row, "split") or drawn.get(speaker)
        if not word or not split or not (speaker or mixed_speakers):
            left_out += 1
            continue
        if split not in SPLITS:
            raise UserError(f"{where}: {unknown('split', split, SPLITS)}")
        if speaker and splits.setdefault(speaker, split) != split:
            raise UserError(
                f"{where}: speaker {speaker!r} is in {split!r} and in {splits[speaker]!r}: "
                "give each speaker one split"
            )
        found.append(Recording(file_of(csv_path, row["path"], where), word, speaker, split))
    if left_out:
        print(f"{csv_path}: left out: {left_out} without a word or a speaker", file=sys.stderr)
    return found


def _cell(row: Mapping[str, str | None], column: str) -> str:
    return plain(" ".join((row.get(column) or "").split()))


def sentences_of(folder: Path, language: str) -> list[Recording]:
    """Clips of ``pipeline speak`` in one language; a speaker is a model's, their split by hash."""
    where = folder / MANIFEST
    rows = [json_object(line, where) for line in read_text(where).splitlines()]
    texts = {
        str(json_field(row, "path", str, where)): " ".join(
            json_field(row, "text", str, where).split()
        )
        for row in rows
        if row.get("language") == language
    }
    speakers = {path: str(PurePosixPath(path).parent) for path in texts}
    split = split_of(sorted(set(speakers.values())), HOLDOUT)
    return [
        Recording(below(folder, path), text, speakers[path], split[speakers[path]])
        for path, text in sorted(texts.items())
    ]


def groups_of(
    recordings: Sequence[Recording], together: bool, texts: int
) -> dict[str, list[list[Recording]]]:
    """By split: the recordings of each speaker, or of all of them together.

    Those who say fewer different ``texts`` are left out, and told.
    """
    groups: dict[str, dict[str, list[Recording]]] = defaultdict(lambda: defaultdict(list))
    for one in recordings:
        groups[one.split]["" if together else one.speaker].append(one)
    found = {
        split: [group for group in those.values() if len({one.text for one in group}) >= texts]
        for split, those in groups.items()
    }
    if few := sum(len(those) - len(found[split]) for split, those in groups.items()):
        print(f"left out: {few} speakers of fewer than {texts} different words", file=sys.stderr)
    return found


# --- command line ---------------------------------------------------------------------------------


def jobs_of(
    strings: Mapping[str, Sequence[Sequence[Piece]]],
    drawing: Drawing,
    manifests: Mapping[str, Manifest],
    roots: Roots,
) -> list[LabelledJob]:
    """The strings of every split, each with its row, in rooms and noise of that split."""
    jobs: list[LabelledJob] = []
    for split, those in strings.items():
        rooms, noise = (
            make_table(manifests[role], Source(corpus=role, holdout=HOLDOUT), role, split)
            if role in manifests
            else None
            for role in ("rooms", "noise")
        )
        for k, pieces in enumerate(those):
            speakers = {piece.recording.speaker for piece in pieces}
            row = {
                "path": f"{split}/{k:06d}.flac",
                "speaker": speakers.pop() if len(speakers) == 1 else None,
                "text": " ".join(piece.recording.text for piece in pieces),
                "text_by": "voices" if pieces[0].level_dbfs is None else "spliced",
                "split": split,
            }
            scene = drawing.around(rooms, noise, split, k)
            jobs.append((row, partial(make_string, pieces, *scene, roots)))
    return jobs


def parse_strings(options: Sequence[str]) -> dict[str, int]:
    """How many strings of each split. ``UserError`` naming a wrong option."""
    counts: dict[str, int] = {}
    for option in options:
        split, _, count = option.partition("=")
        if split not in SPLITS or not count.isdecimal():
            raise UserError(f"--strings {option}: write SPLIT=N, a split of {', '.join(SPLITS)}")
        counts[split] = int(count)
    return counts


def _strings(
    source: Path, recordings: Sequence[Recording], counts: Mapping[str, int], drawing: Drawing
) -> dict[str, list[list[Piece]]]:
    """The strings of each split, spliced, or each a sentence of a folder."""
    sentences = source.is_dir()
    groups = groups_of(recordings, drawing.mixed_speakers, 1 if sentences else DIFFERENT)
    for split in counts:
        if not groups.get(split):
            raise UserError(f"{source}: no recording of split {split!r}")
    if sentences:
        whole = {s: [[Piece(one)] for group in groups[s] for one in group] for s in groups}
        return {split: whole[split][: counts.get(split)] for split in counts or groups}
    return {
        split: [drawing.pieces(groups[split], split, k) for k in range(count)]
        for split, count in counts.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("source", type=path_here, help="CSV of recordings, or folder of `speak`")
    parser.add_argument("--out", type=path_here, required=True, metavar="DIR")
    parser.add_argument(
        "--strings",
        nargs="+",
        default=[],
        metavar="SPLIT=N",
        help="how many of each split; of sentences all there are if not given",
    )
    parser.add_argument(
        "--column", default="keyword", help="of the CSV, with the word (default: %(default)s)"
    )
    parser.add_argument("--language", default="en", help="of sentences (default: %(default)s)")
    for role in ("noise", "rooms"):
        parser.add_argument(f"--{role}", nargs="+", type=path_or_url, default=[], metavar="DIR")
    add_options(parser, Drawing)
    parser.add_argument("--workers", type=int, default=cpus())


def run(args: argparse.Namespace) -> int:
    """Make strings, or go on with them; exit status 1 where one cannot be made."""
    drawing = checked(Drawing, options_of(args, Drawing), "options")
    counts, source = parse_strings(args.strings), args.source
    if source.is_dir():
        recordings = sentences_of(source, args.language)
    elif counts:
        recordings = recordings_of(source, args.column, drawing.mixed_speakers)
    else:
        raise UserError("--strings SPLIT=N is missing: how many strings of each split")
    roots: Roots = {"noise": list(args.noise), "rooms": list(args.rooms)}
    manifests = {role: scan_folders(role, role, some) for role, some in roots.items() if some}
    jobs = jobs_of(_strings(source, recordings, counts, drawing), drawing, manifests, roots)
    home = source.resolve() if source.is_dir() else source.resolve().parent
    files = [
        [os.path.relpath(one.path, home), one.path.stat().st_size, one.text, one.speaker, one.split]
        for one in recordings
    ]
    recipe = {
        "version": VERSION,
        "recordings": digest(files),
        "sources": {role: one.sha256 for role, one in manifests.items()},
        **drawing.model_dump(mode="json", exclude={"seed"}),
    }
    return make_labelled(args.out, "words", recipe, drawing.seed, jobs, args.workers)
