"""Fill the text of labelled clips by a recogniser: pseudo-labels for words.

What it hears of every clip comes into ``heard``. Where ``text`` is empty it is filled by what was
heard of the clip, or of its clean twin where it has one, and ``text_by`` names the recogniser by
its name and its weights' hash; a text that is there stays. Where clips have a condition, what was
heard is held to the text by condition: word errors of all words. Batches are the same whatever was
killed, so that the result is, too.

Recognisers are Whisper's and CTC's of ``transformers``, from a folder or a hub: safetensors only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_specs.io.addresses import path_here
from data_specs.io.audio import audio_files_below
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.hardware import require_device
from data_specs.io.parse import json_field, json_object
from data_specs.io.progress import progress_bar
from data_specs.io.text import csv_text
from data_specs.io.walk import LeftOut, print_left_out
from data_specs.labelled import SPLITS, LabelledClip, read_labelled
from data_specs.strict import digest
from pipeline.audio import DropSample, Wave, read_clip
from pipeline.corpora.folder import LABELLED, claimed
from pipeline.corpora.manifest import NOT_UNICODE, is_unicode

LONGEST_S = 30
"""Whisper hears so much at once; a longer clip would be cut where a word is."""

Hear = Callable[[Sequence[Wave]], list[str]]
"""What is said in waves (T,) at 16 kHz."""


def load_recogniser(source: str, device: str = "cpu") -> tuple[str, Hear]:
    """Whom texts are said to be by, and what hears: a folder in ``transformers``' layout, or a hub.

    Raises ``UserError`` for what is none, or is not to be had as safetensors.
    """
    from train.models import recogniser
    from train.models.tensors import state_sha256

    found = recogniser.load_recogniser(source, device)
    return f"{Path(source).name} {state_sha256(found.network)[:12]}", found.hear


def transcribe(
    clips: Sequence[LabelledClip], hear: Hear, parts: Path, batch: int
) -> tuple[list[str | None], dict[int, str]]:
    """What is heard of each clip, and by index why a clip is not; parts that are whole are kept."""
    heard: list[str | None] = []
    failed: dict[int, str] = {}
    parts.mkdir(exist_ok=True)
    with progress_bar(desc="transcribe", unit="clip", total=len(clips)) as bar:
        for start in range(0, len(clips), batch):
            some = clips[start : start + batch]
            path = parts / f"{start:08d}.json"
            texts: list[str | None] = []
            if path.is_file():
                texts = json_field(json_object(path.read_bytes(), path), "heard", list, path)
            if len(texts) != len(some):
                texts, wrong = _batch(some, hear)
                failed |= {start + place: why for place, why in wrong.items()}
                if not wrong:  # a clip that is mended is heard when it runs again
                    write_text(path, json.dumps({"heard": texts}, ensure_ascii=False) + "\n")
            heard += texts
            bar.update(len(some))
    return heard, failed


def _batch(clips: Sequence[LabelledClip], hear: Hear) -> tuple[list[str | None], dict[int, str]]:
    waves: dict[int, Wave] = {}
    wrong: dict[int, str] = {}
    for place, clip in enumerate(clips):
        try:
            waves[place] = read_clip(clip.path, LONGEST_S)
        except DropSample as drop:
            wrong[place] = str(drop)
    texts = dict(zip(waves, hear(list(waves.values())) if waves else [], strict=True))
    return [texts.get(place) for place in range(len(clips))], wrong


# --- tables ---------------------------------------------------------------------------------------


def rows_of(
    clips: Sequence[LabelledClip], heard: Sequence[str | None], name: str, home: Path
) -> list[dict[str, Any]]:
    """The rows of a labelled CSV in ``home``: what was there, texts filled, and ``heard``."""
    of = {clip.path: text for clip, text in zip(clips, heard, strict=True)}
    rows = []
    for clip, text in zip(clips, heard, strict=True):
        found = clip.text or of.get(clip.clean or clip.path)
        rows.append(
            {
                "path": os.path.relpath(clip.path, home),
                **{n: getattr(clip, n) for n in ("mos", "keyword", "speaker")},
                "text": found or None,
                "text_by": clip.text_by if clip.text else name if found else None,
                **{n: getattr(clip, n) for n in ("split", "condition")},
                "clean": os.path.relpath(clip.clean, home) if clip.clean else None,
                "heard": text,
            }
        )
    return rows


def spelled(text: str) -> list[str]:
    """Words without case and punctuation."""
    return re.sub(r"[^\w']+", " ", text.lower()).split()


def word_errors(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By condition: what was heard against the text, of rows that have both."""
    from torchaudio.functional import edit_distance

    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        if row["text"] and row["heard"] is not None and (words := spelled(row["text"])):
            errors = edit_distance(words, spelled(row["heard"]))
            for place, value in enumerate((1, len(words), int(errors))):
                sums[row["condition"] or ""][place] += value
    return [
        {"condition": name, "clips": clips, "words": words, "errors": errors}
        | {"rate": round(errors / words, 4)}
        for name, (clips, words, errors) in sums.items()
    ]


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("source", type=path_here, help="labelled CSV, or folder of clips")
    parser.add_argument("--model", required=True, help="folder in transformers' layout, or a hub's")
    parser.add_argument("--out", type=path_here, required=True, metavar="DIR")
    parser.add_argument("--batch", type=int, default=8, help="clips at once (default: %(default)s)")
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="of a folder's clips (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> int:
    """Transcribe, or go on with it; exit status 1 where a clip could not be heard."""
    if args.batch < 1:
        raise UserError(f"--batch must be 1 or more, is {args.batch}")
    require_device(args.device)
    if args.source.is_dir():
        files = [path.resolve() for path in audio_files_below(args.source, "to transcribe")]
        strange = [path for path in files if not is_unicode(str(path))]
        print_left_out(str(args.source), [LeftOut(str(path), NOT_UNICODE) for path in strange])
        named = [path for path in files if path not in strange]
        clips = [LabelledClip(path=path, dataset="", split=args.split) for path in named]
    else:
        clips = read_labelled([args.source])
    name, hear = load_recogniser(args.model, args.device)
    asked = digest([[str(c.path), c.path.stat().st_size] for c in clips])[:16]
    with claimed(args.out, f"transcribe: {name}, clips {asked}, {args.batch} at once", 0):
        heard, failed = transcribe(clips, hear, args.out / "parts", args.batch)
        rows = rows_of(clips, heard, name, args.out.resolve())
        write_text(args.out / LABELLED, csv_text(rows))
        rates = word_errors(rows) if any(clip.condition or clip.text for clip in clips) else []
        if rates:
            write_text(args.out / "word_errors.csv", csv_text(rates))
    print(f"{args.out / LABELLED}: {len(clips) - len(failed)} clips heard by {name}")
    for one in rates:
        print(
            "{condition:20} {clips:5} clips {words:6} words  word error rate {rate:.3f}".format(
                **one
            )
        )
    left_out = [LeftOut(str(clips[index].path), why) for index, why in failed.items()]
    print_left_out(str(args.source), left_out)
    return 1 if failed else 0
