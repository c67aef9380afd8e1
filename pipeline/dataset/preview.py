"""A static page to listen to samples of a dataset. ``python -m pipeline preview DIR``.

One file without a script or an outside address: audio, spectrogram, plan in words and score of
samples spread evenly over the whole shards, or of one for each processor. With the corpora's
folders the recording that each was made from stands beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import write_text
from data_specs.io.listen import data_uri, in_words, spectrogram_png
from data_specs.io.parse import json_field, json_object
from data_specs.recipe import Recipe
from data_specs.sample import DATASET_FILE, SAMPLE_RATE, SampleRecord, parse_sample, shard_name
from data_specs.strict import checked
from pipeline.audio import decode_flac, encode_flac
from pipeline.dataset.description import require_dataset
from pipeline.dataset.shards import find_shards, samples
from pipeline.options import corpus_option, outside_option, parse_roots
from pipeline.render.plan import SamplePlan
from pipeline.render.render import Roots, render_group, require_below


def _whole_shards(folder: Path) -> list[Path]:
    """Tars with a record beside them. Raises ``ValueError`` where there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that python -m pipeline shards wrote")
    tars = [folder / f"{shard_name(number)}.tar" for number in find_shards(folder)]
    whole = [tar for tar in tars if tar.is_file() and tar.with_suffix(".json").is_file()]
    if not whole:
        raise UserError(f"{folder}: no whole shard yet; run python -m pipeline shards to the end")
    return whole


Found = tuple[Path, SampleRecord, bytes]
"""A sample where it lies: tar, record and FLAC."""


def spread(folder: Path, count: int) -> Iterator[tuple[str, Found]]:
    """``count`` samples, evenly spread over the shards and inside each, by key."""
    tars = _whole_shards(folder)
    step = max(1, len(tars) // count)
    chosen = tars[::step][:count]
    shares = [len(range(place, count, len(chosen))) for place in range(len(chosen))]
    for tar, wanted in zip(chosen, shares, strict=True):
        record = tar.with_suffix(".json")
        total = json_field(json_object(record.read_bytes(), record), "samples", int, record)
        share = min(wanted, total)
        places = {total * place // share for place in range(share)}
        for place, found in enumerate(_read(tar)):
            if place in places:
                yield found[1].key, found


def every_processor(folder: Path, recipe: Recipe) -> Iterator[tuple[str, Found]]:
    """One sample for each processor of the recipe, by its name: the one with the least besides.

    Reads shards until every processor was met. What no sample went through is left out.
    """
    best: dict[str, tuple[int, Found]] = {}
    for tar in _whole_shards(folder):
        for found in _read(tar):
            with _named(tar, found[1]):
                kinds = [s["kind"] for s in found[1].plan["steps"] if s["kind"] != "none"]
                besides = len(kinds) + bool(found[1].plan["room"]) + bool(found[1].plan["noise"])
            for kind in kinds:
                if kind not in best or besides < best[kind][0]:
                    best[kind] = besides, found
        if set(best) >= set(recipe.kinds()) - {"none"}:
            break
    yield from ((kind, best[kind][1]) for kind in sorted(best))


def _read(tar: Path) -> Iterator[Found]:
    for key, flac, data in samples(tar):
        yield tar, parse_sample(data, f"{tar}: {key}.json"), flac


def _card(title: str, found: Found, roots: Roots, outside: bool) -> dict[str, Any]:
    tar, record, flac = found
    try:
        pcm = decode_flac(flac)
    except UserError as error:
        raise UserError(f"{tar}: {record.key}.flac: {error}") from error
    with _named(tar, record):
        words = in_words(record.plan)
    return {
        "title": title,
        "key": record.key,
        "shard": tar.stem,
        "mos": f"{record.mos:.2f}",
        "words": words,
        "audio": data_uri("audio/flac", flac),
        "picture": data_uri("image/png", spectrogram_png(pcm)),
        "seconds": f"{len(pcm) / SAMPLE_RATE:.2f}",
        "original": _original(record, roots, outside) if roots else None,
    }


@contextmanager
def _named(tar: Path, record: SampleRecord) -> Iterator[None]:
    """Name the sample whose plan, which may be any JSON, lacks something."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{tar}: {record.key}.json: its plan is damaged: {error!r}") from error


def _original(record: SampleRecord, roots: Roots, outside: bool = False) -> dict[str, str]:
    """The recording that a sample was made from: the same crop at the same speed and level."""
    plan = checked(SamplePlan, record.plan, f"{record.key}.json: plan")
    bare = plan.model_copy(update={"room": None, "noise": None, "steps": (), "speech_steps": 0})
    if not outside:
        require_below([bare], roots)
    (made,) = render_group([bare], roots)
    if made.pcm is None:
        raise UserError(f"{record.key}: its recording cannot be read any more: {made.detail}")
    return {
        "audio": data_uri("audio/flac", encode_flac(made.pcm)),
        "picture": data_uri("image/png", spectrogram_png(made.pcm)),
    }


def page(
    folder: Path, count: int, corpora: Sequence[str] = (), each: bool = False, outside: bool = False
) -> str:
    """The page as HTML. ``corpora`` are NAME=DIR; ``each`` asks for a sample of each processor,
    ``outside`` lets links lead out of the corpora's folders.

    Raises ``ValueError`` or ``OSError`` naming what is damaged or missing.
    """
    if count < 1:
        raise UserError(f"--count must be at least 1, not {count}")
    about = require_dataset(folder)
    recipe = checked(Recipe, about["recipe"], f"{folder / DATASET_FILE}: recipe")
    roots = parse_roots(corpora, recipe)
    chosen = every_processor(folder, recipe) if each else spread(folder, count)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("preview.html.j2").render(
        folder=folder, about=about, each=each, cards=[_card(*one, roots, outside) for one in chosen]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("dataset", type=path_here, metavar="DIR")
    parser.add_argument("--out", type=path_here, default=Path("preview.html"), metavar="HTML")
    parser.add_argument("--count", type=int, default=12, help="samples (default %(default)s)")
    parser.add_argument("--each-processor", action="store_true", help="one sample for each instead")
    corpus_option(parser)
    outside_option(parser)


def run(args: argparse.Namespace) -> int:
    """``python -m pipeline preview DIR --out preview.html [--count 12 | --each-processor]``."""
    html = page(args.dataset, args.count, args.corpus, args.each_processor, args.allow_outside)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, html)
    print(args.out.resolve())
    return 0
