"""A static page to listen to samples of a dataset. ``python -m pipeline preview DIR``.

One file without a script or an outside address: audio, spectrogram, plan in words and score of
samples spread evenly over the whole shards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from data_specs.listen import data_uri, in_words, spectrogram_png
from data_specs.sample import DATASET_FILE, SAMPLE_RATE, SampleRecord, parse_sample
from pipeline.audio import decode_flac
from pipeline.shards import find_shards, samples, shard_name


def _whole_shards(folder: Path) -> list[Path]:
    """Tars with a record beside them. Raises ``ValueError`` where there are none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one that python -m pipeline shards wrote")
    tars = [folder / f"{shard_name(number)}.tar" for number in find_shards(folder)]
    whole = [tar for tar in tars if tar.is_file() and tar.with_suffix(".json").is_file()]
    if not whole:
        raise ValueError(f"{folder}: no whole shard yet; run python -m pipeline shards to the end")
    return whole


def _dataset(folder: Path) -> dict[str, Any]:
    path = folder / DATASET_FILE
    try:
        about = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: not there; is {folder} a dataset folder?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(about, dict) or "recipe_hash" not in about:
        raise ValueError(f"{path}: not a dataset description; make the dataset again")
    return about


def choose(folder: Path, count: int) -> list[dict[str, Any]]:
    """``count`` samples, evenly spread over the shards and inside each, ready for the page."""
    tars = _whole_shards(folder)
    step = max(1, len(tars) // count)
    chosen = tars[::step][:count]
    shares = [len(range(place, count, len(chosen))) for place in range(len(chosen))]
    cards = []
    for tar, wanted in zip(chosen, shares, strict=True):
        total = json.loads(tar.with_suffix(".json").read_bytes())["samples"]
        share = min(wanted, total)
        places = {total * place // share for place in range(share)}
        for place, (key, flac, data) in enumerate(samples(tar)):
            if place in places:
                cards.append(_card(parse_sample(data, f"{tar}: {key}.json"), flac, tar))
    return cards


def _card(record: SampleRecord, flac: bytes, tar: Path) -> dict[str, Any]:
    try:
        pcm = decode_flac(flac)
    except ValueError as error:
        raise ValueError(f"{tar}: {record.key}.flac: {error}") from error
    return {
        "key": record.key,
        "shard": tar.stem,
        "mos": f"{record.mos:.2f}",
        "words": in_words(record.plan),
        "audio": data_uri("audio/flac", flac),
        "picture": data_uri("image/png", spectrogram_png(pcm)),
        "seconds": f"{len(pcm) / SAMPLE_RATE:.2f}",
    }


def page(folder: Path, count: int) -> str:
    """The page as HTML. Raises ``ValueError`` naming what is damaged or missing."""
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("preview.html.j2").render(
        folder=folder, about=_dataset(folder), cards=choose(folder, count)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m pipeline preview DIR --out preview.html [--count 12]``."""
    parser = argparse.ArgumentParser(prog="python -m pipeline preview", description=__doc__)
    parser.add_argument("dataset", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("preview.html"), metavar="HTML")
    parser.add_argument("--count", type=int, default=12, help="samples (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        html = page(args.dataset, args.count)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(f".{args.out.name}.part")
    part.write_text(html, encoding="utf-8")
    os.replace(part, args.out)
    print(args.out.resolve())
    return 0
