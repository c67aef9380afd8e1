"""A student as others run it: ONNX, int8, card, bundle, page. ``python -m train export``.

Writes a folder that ``train.scoring.score.load`` reads as it reads a run's, from this disk, a hub
repository or an address (``train.scoring.bundle``): weights, description, model card,
``model.onnx`` and, asked for, ``model.int8.onnx``, a parity report on real clips, a package to
install without this project (``train.export.wheel``), and a page that scores recordings in a
browser.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import LOCK_FILE, only_writer, replace_folder, sha256_of, write_text
from data_specs.io.text import read_text
from train.command import command_of
from train.export import page
from train.export.card import card_text, read_results
from train.export.clips import read_clips
from train.export.int8 import calibrated, write_int8
from train.export.onnx_file import require_packages, write_onnx
from train.export.parity import Parity, as_markdown, compare
from train.export.wheel import require_name, write_wheel
from train.files import version, write_model
from train.models import pruned
from train.models.loading import path_of
from train.models.tensors import read_about, require_finite
from train.scoring import bundle
from train.scoring.onnx_scorer import Facts
from train.scoring.score import load
from train.scoring.scorer import StudentScorer

INT8_LIMIT = 0.03
"""MOS at the 99th percentile that int8 may be away from float32; a warning says if it is more."""


@dataclass(frozen=True)
class Source:
    """The model that is exported."""

    scorer: StudentScorer
    about: dict[str, Any]


def open_source(model: str) -> Source:
    """v7, a run folder, a model file or a bundle; ``ValueError`` for anything but a student."""
    scorer = load(model)
    if not isinstance(scorer, StudentScorer):
        raise UserError(
            f"{scorer.name}: only students are exported, not teachers or exported files"
        )
    path = bundle.fetch(model) if "://" in model else path_of(model)
    about = {**_described(path), "config": scorer.network.config.model_dump(mode="json")}
    name = model if model == "v7" else _last_part(scorer.name)
    made_from = about.get("made_from", {"model": name, "weights_sha256": scorer.weights_sha256})
    about |= {"made_from": made_from, "version": version()}
    return Source(scorer, about)


def _last_part(name: str) -> str:
    """Of a path or of an address, whose credentials ``load`` has taken out."""
    return name.rstrip("/").rpartition("/")[2] if "://" in name else Path(name).resolve().name


def _described(path: Path) -> dict[str, Any]:
    """What stands beside the weights of a run folder or model file, if anything."""
    if pruned.is_pruned(path):
        return pruned.read_about(path)
    file = path / bundle.DESCRIPTION if path.is_dir() else path.with_suffix(".json")
    return read_about(file) if file.is_file() else {}


def write_student(source: Source, out: Path, half: bool) -> str:
    """Weights and description; the weights' SHA-256, as ``load`` of the folder finds it.

    With half, the source's weights are rounded to 16 bits, and stored so.
    """
    network, path = source.scorer.network, out / bundle.WEIGHTS
    state = network.state_dict()
    if half:
        state = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
        require_finite(Path("--half"), state)  # 65504 is the largest
        network.load_state_dict(state)
    write_model(path, state, source.about)
    return sha256_of(path)


def write_networks(source: Source, out: Path, sha256: str, args: argparse.Namespace) -> list[Path]:
    """The files that were asked for: ONNX in float32, and in int8."""
    name = source.about["made_from"]["model"]
    config = source.scorer.network.config
    facts = Facts(
        model=name, weights_sha256=sha256, version=version(), precision="fp32",
        padding=config.padding, resampler=config.resampler,
    )  # fmt: skip
    files = [out / bundle.ONNX]
    write_onnx(files[0], source.scorer.network, facts)
    if args.int8:
        waves = read_clips(args.calibrate, args.calibration_clips, config.resampler)
        print(f"int8: calibrating on {len(waves)} clips of {args.calibrate}", flush=True)
        files.append(out / bundle.ONNX_INT8)
        made = calibrated(source.scorer.network, waves)
        int8 = facts.model_copy(update={"precision": "int8"})
        write_int8(files[1], files[0], made, waves[0], int8)
    return files


def write_parity(
    source: Source, out: Path, files: list[Path], args: argparse.Namespace
) -> dict[str, Parity]:
    """The parity report, if clips were given for it; says when int8 is too far away."""
    if not args.parity:
        return {}
    heard = source.scorer.network.config.resampler
    waves = read_clips(args.parity, args.parity_clips, heard)
    found = compare(source.scorer, files, waves)
    rows = {name: asdict(parity) for name, parity in found.items()}
    content = {"clips_of": args.parity.name, "files": rows}
    write_text(out / bundle.PARITY, json.dumps(content, indent=1) + "\n")
    write_text(out / bundle.PARITY_TEXT, as_markdown(found))
    print(as_markdown(found))
    for name, parity in found.items():
        if parity.p99 > INT8_LIMIT:
            print(
                f"warning: {name} is {parity.p99:.3f} MOS from float32 at the 99th percentile, "
                f"more than {INT8_LIMIT}: calibrate on more clips, of the kind that will be scored"
            )
    return found


def write_card(source: Source, out: Path, parity: dict[str, Parity]) -> None:
    """``README.md``, of the files that are there."""
    names = [name for name in bundle.FILES if name != bundle.CARD and (out / name).is_file()]
    hashes = {name: sha256_of(out / name) for name in names}
    write_text(out / bundle.CARD, card_text(source.about, hashes, parity))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train export``."""
    clips = "folder of shards, CSV of rated clips, or folder of audio"
    parser.add_argument("--model", default="v7", help="v7, a run folder, a model file, a bundle")
    parser.add_argument("--out", type=path_here, required=True, help="folder of the bundle")
    parser.add_argument("--half", action="store_true", help="weights rounded to 16 bits")
    parser.add_argument("--int8", action="store_true", help="model.int8.onnx too")
    parser.add_argument("--calibrate", type=path_here, help=f"for --int8: {clips}")
    parser.add_argument("--calibration-clips", type=int, default=200)
    parser.add_argument("--parity", type=path_here, help=f"compare with PyTorch on these: {clips}")
    parser.add_argument("--parity-clips", type=int, default=200)
    parser.add_argument(
        "--evaluation", type=path_here, help="results of `train evaluate`, for the card"
    )
    parser.add_argument("--notes", type=path_here, help="Markdown on its data, for the card")
    parser.add_argument("--licence", help="of the weights, for the card: mit, cc-by-4.0, ...")
    parser.add_argument("--wheel", help="a package of this name too, to install by itself")
    parser.add_argument("--web", type=path_here, help="write index.html, a page that scores, here")
    parser.add_argument("--web-int8", action="store_true", help="with the int8 model in it")
    parser.add_argument("--onnxruntime-web", type=path_here, help="its dist folder, for --web")


def run(args: argparse.Namespace) -> int:
    """``python -m train export``: everything into ``--out``."""
    _check(args)
    runtime = page.read_runtime(args.onnxruntime_web) if args.web else None
    source = open_source(args.model)
    source.about.update(_for_the_card(args))
    with _bundle_for(args.out) as made:
        files = write_networks(source, made, write_student(source, made, args.half), args)
        parity = write_parity(source, made, files, args)
        write_card(source, made, parity)
        if args.wheel:
            card = made / bundle.CARD
            wheel = write_wheel(args.wheel, files[0], card, made, source.about["version"]).name
        bundle.write_checksums(made)
    print(f"bundle: {args.out} ({command_of('export', args, add_arguments)})")
    if args.wheel:
        print(f"package: pip install {args.out / wheel}; then {args.wheel} score PATH...")
    if runtime:
        name = files[1 if args.web_int8 else 0].name
        page_file = page.write_page(args.web, args.out / name, runtime)
        size = page_file.stat().st_size / 1e6
        print(f"page: {page_file} ({size:.1f} MB; open it in a browser)")
    return 0


def _for_the_card(args: argparse.Namespace) -> dict[str, Any]:
    """What was given for the card; a bundle that is exported again keeps what it had."""
    given = {
        "licence": args.licence,
        "notes": args.notes and read_text(args.notes).strip(),
        "results": args.evaluation and read_results(args.evaluation),
    }
    return {name: value for name, value in given.items() if value}


@contextmanager
def _bundle_for(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` to fill, which then replaces it whole.

    One export at a time: the folder around it, ``.NAME.export``, is locked. ``UserError`` where
    ``out`` is something else than a bundle as it was exported.
    """
    out = out.resolve()
    bundle.require_replaceable(out)
    work = out.with_name(f".{out.name}.export")
    with only_writer(work):
        if not out.exists() and (old := work / f"{out.name}.old").is_dir():  # see replace_folder
            old.rename(out)
        for left in work.iterdir():  # of an export that was killed
            if left.name != LOCK_FILE:
                shutil.rmtree(left)
        made = work / out.name
        try:
            made.mkdir()
            yield made
            bundle.require_replaceable(out)
            _take_place(made, out)
        finally:
            shutil.rmtree(work)


def _take_place(made: Path, out: Path) -> None:
    try:
        replace_folder(made, out)
    except OSError as error:
        if not out.is_mount():
            raise
        raise UserError(
            f"{out}: cannot be replaced whole ({error.strerror}): give a folder in it as --out"
        ) from error


def _check(args: argparse.Namespace) -> None:
    """``ValueError`` for what is wrong before any work."""
    require_packages()
    if args.int8 and not args.calibrate:
        raise UserError("--int8 needs real clips: give --calibrate SHARDS, a CSV or a folder")
    if args.calibrate and not args.int8:
        raise UserError("--calibrate is for int8: give --int8 too")
    if args.web_int8 and not (args.web and args.int8):
        raise UserError("--web-int8 needs --web and --int8")
    if args.out.exists() and args.out.resolve() == Path(args.model).resolve():
        raise UserError(f"{args.out}: is the model itself: give another --out")
    if args.wheel is not None:
        require_name(args.wheel)
    bundle.require_replaceable(args.out)
    if args.web:
        page.require_own(args.web)
