"""Take out of a pruned model what it no longer needs. ``python -m train shrink``.

Units whose weights are all gone are removed: scores stay the same, the model is smaller and faster.
``--keep-macs 0.5`` goes on, for students: the units that change the score least for their
multiply-adds go too (``train.pruning.structured``), until half of these are left;
``--finetune-steps`` then lets what is left learn from the shards' labels.
What comes out is an ordinary model folder. Speed and, with ``--judge``, correlation are measured
beside the original's in the same run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of, write_text
from data_specs.io.progress import progress_bar
from data_specs.rated import read_rated, require_heard
from data_specs.sample import CROP_SAMPLES
from train.data.shards import list_shards
from train.data.sources import RatedSamples, Samples, open_sources
from train.data.stream import ShardSamples, to_waves
from train.evaluation.scorers import OwnScorer, complete, score_rated, score_shards
from train.files import load_checkpoint, run_folder, version, write_weights
from train.metrics import Agreement, agreement
from train.models.front_end import XlsrFrontEnd
from train.models.head_teacher import HeadTeacher, XlsrFromMemory, describe, weights_of
from train.models.student import Student, macs_of
from train.models.tensors import write_about
from train.pruning.masks import Masks
from train.pruning.storage import ABOUT_FILE, DENSE_FILE, SPARSE_FILE, save_pruned
from train.pruning.structured import (
    choose_units,
    dead_units,
    layout_of,
    removed,
    shrink,
    unit_importance,
)
from train.scoring.score import Scorer, TeacherScorer, load, student_in
from train.student.fit import Host, fit
from train.student.presets import make_config

FIT_FOLDER, REPORT_FILE = "fit", "shrink.json"
SPEED_BATCHES = (1, 8)
"""Windows at a time for which speed is measured: one clip, and what ``train score`` takes."""

WORTH_A_MASK = 0.05
"""Share of zeros above which a tensor of 32 bits a weight is smaller with a bit for each."""


@dataclass
class Shrinking:
    """What is shrunk, what became of it, and what was said about it."""

    source: Scorer
    student: Student
    units: dict[str, dict[str, str]]
    report: dict[str, Any]


# --- clips ----------------------------------------------------------------------------------------


def clips_of(where: Path | str | None, count: int, seed: int = 0) -> Tensor:
    """Up to ``count`` clips, float32 (B, 122880) within -1 to 1, drawn from all of a source.

    A CSV of rated clips, a folder of shards, or None: noise of different loudness over time.
    """
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
    if where is None:
        noise_BT = draw.standard_normal((count, CROP_SAMPLES), np.float32)
        gates_BS = draw.random((count, CROP_SAMPLES // 7680), np.float32) ** 3
        return torch.from_numpy(0.1 * noise_BT * gates_BS.repeat(7680, axis=1))
    samples = _samples(where)
    numbers = draw.permutation(len(samples))[:count].tolist()
    return torch.stack([_wave(samples, number) for number in sorted(numbers)])


def _samples(where: Path | str) -> Samples:
    if str(where).endswith(".csv"):
        clips = read_rated(where)
        require_heard(clips)
        return RatedSamples(clips)
    return ShardSamples(list_shards(where))


def _wave(samples: Samples, number: int) -> Tensor:
    pcm_T = torch.from_numpy(np.array(samples.read(number)[0]))
    return to_waves(pcm_T, torch.device("cpu"))


# --- shrinking ------------------------------------------------------------------------------------


def shrink_student(source: Scorer, args: argparse.Namespace) -> Shrinking:
    """The student without its dead units, and without its least important ones if asked."""
    student: Any = source.network
    if not isinstance(student, Student):
        raise UserError(f"{source.name}: {type(student).__name__} cannot be shrunk")
    waves_BT = clips_of(args.importance_from, args.clips)
    before_B = scores_of(source.score_windows, waves_BT)
    dead = dead_units(student)
    smaller = shrink(student, dead)
    shrinking = Shrinking(source, smaller, {"dead": removed(dead)}, {})
    _tell_difference(shrinking, "without its dead units", before_B, waves_BT)
    if args.keep_macs is not None:
        smaller = _choose(shrinking, student, args)
        shrinking.student = smaller
        _tell_difference(shrinking, "without the chosen ones", before_B, waves_BT)
    return shrinking


def _choose(shrinking: Shrinking, original: Student, args: argparse.Namespace) -> Student:
    """Without the least important units, until the wanted share of the original's work is left."""
    student = shrinking.student
    share = args.keep_macs * macs_of(original.config) / macs_of(student.config)
    if share >= 1:
        print(f"without its dead units it has less than {args.keep_macs:.0%}: nothing is chosen")
        return student
    waves_BT = clips_of(args.importance_from, args.importance_clips, seed=1)
    device = shrinking.source.device
    bar = progress_bar(torch.split(waves_BT, 1), unit="clip", desc="importance")
    importance = unit_importance(student, (wave_1T.to(device) for wave_1T in bar))
    chosen = choose_units(student, importance, share)
    shrinking.units["chosen"] = removed(chosen)
    return shrink(student, chosen)


def scores_of(score: Callable[[Sequence[Any]], Sequence[float]], waves_BT: Tensor) -> Tensor:
    """MOS (B,) of waves, float64, a few at a time."""
    parts = [score(list(part.numpy())) for part in torch.split(waves_BT, 8)]
    return torch.tensor([mos for part in parts for mos in part], dtype=torch.float64)


def _digest(student: Student) -> str:
    """SHA-256 over the names and contents of a student's tensors."""
    state = hashlib.sha256()
    for name, tensor in student.state_dict().items():
        state.update(name.encode())
        state.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _tell_difference(shrinking: Shrinking, what: str, before_B: Tensor, waves_BT: Tensor) -> None:
    """Parity: how far scores of clips are from the original's."""
    network = shrinking.student.to(shrinking.source.device).eval()
    with torch.inference_mode():
        parts = [network(p.to(shrinking.source.device)).cpu() for p in torch.split(waves_BT, 8)]
    apart_B = (torch.cat(parts).double() - before_B).abs()
    found = {"max": float(apart_B.max()), "mean": float(apart_B.mean()), "clips": len(apart_B)}
    shrinking.report[f"MOS apart {what}"] = found
    print(
        f"{what}: scores of {found['clips']} clips are {found['max']:.2g} MOS apart at most, "
        f"{found['mean']:.2g} on average",
        flush=True,
    )


# --- fine-tuning ----------------------------------------------------------------------------------


def finetune(shrinking: Shrinking, args: argparse.Namespace) -> dict[str, Any]:
    """Let what is left learn from the shards' labels, as ``train fit`` does; its best weights.

    What is trained, and on what, for ``model.json``. The run folder ``fit`` lies within ``--out``:
    the same command goes on with it.
    """
    start, sources = shrinking.student, open_sources(args.shards, args.validation)
    names = ("batch", "lr", "validate_every", "precision", "seed")
    config = make_config(
        f"{_name(shrinking.source)}-shrunk",
        sources,
        "fast",
        start.config,
        steps=args.finetune_steps,
        start=_digest(start),
        warmup=min(args.warmup, args.finetune_steps // 10),
        **{name: getattr(args, name) for name in names},
    )
    host = Host(args.workers, args.device, args.cache_gb, logger="none")
    fit(config, sources, args.out / FIT_FOLDER, host, start)
    tuned = load(args.out / FIT_FOLDER, args.device)
    shrinking.student = student_in(tuned)
    best = load_checkpoint(args.out / FIT_FOLDER / "best.pt")["metrics"]
    return {"fit": config.model_dump(), "metrics": best}


# --- what it buys ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Median seconds of a batch before and after; ``gain`` is how many times faster it is now."""

    windows: int
    before_s: float
    after_s: float
    gain: float


def speeds(
    before: Callable[[Sequence[Any]], object],
    after: Callable[[Sequence[Any]], object],
    repeats: int,
    batches: Sequence[int] = SPEED_BATCHES,
) -> list[Speed]:
    """Both ways to score, in turns, so that what else the machine does falls on both.

    A measurement is the median of ``repeats`` pairs after one that warms up; the gain is the median
    of the pairs' own ratios.
    """
    found = []
    for windows in batches:
        waves = list(clips_of(None, windows).numpy())
        pairs = [(_seconds(before, waves), _seconds(after, waves)) for _ in range(repeats + 1)][1:]
        ours, theirs = ([pair[side] for pair in pairs] for side in (1, 0))
        gain = statistics.median(b / a for b, a in pairs)
        found.append(Speed(windows, statistics.median(theirs), statistics.median(ours), gain))
    return found


def _seconds(score: Callable[[Sequence[Any]], object], waves: Sequence[Any]) -> float:
    began = time.perf_counter()
    score(waves)
    return time.perf_counter() - began


def judge(scorers: Sequence[Scorer], where: Path) -> list[Agreement]:
    """How well each agrees with the ratings of a CSV, or the labels of shards."""
    found = []
    for scorer in scorers:
        if where.suffix == ".csv":
            rows = complete(score_rated(OwnScorer(scorer), read_rated(where), "zero"))
        else:
            rows = complete(score_shards(OwnScorer(scorer), where))
        found.append(agreement([row.truth for row in rows], [row.score for row in rows]))
    return found


def _tell_gains(
    before: Scorer, after: Scorer, args: argparse.Namespace, report: dict[str, Any]
) -> None:
    measured = speeds(before.score_windows, after.score_windows, args.repeats)
    report["threads"] = torch.get_num_threads()
    report["speed"] = [asdict(speed) for speed in measured]
    for speed in measured:
        print(
            f"{speed.windows} window(s) at a time: {1e3 * speed.before_s:.1f} ms before, "
            f"{1e3 * speed.after_s:.1f} ms after: {speed.gain:.2f} times as fast "
            f"(median of {args.repeats}, {torch.get_num_threads()} threads)"
        )
    for where in args.judge:
        old, new = judge((before, after), where)
        report.setdefault("judged", {})[str(where)] = {"before": asdict(old), "after": asdict(new)}
        lost = None if old.pcc is None or new.pcc is None else old.pcc - new.pcc
        figures = (
            "undefined" if lost is None else f"{old.pcc:.4f} -> {new.pcc:.4f} ({lost:.4f} lost)"
        )
        print(f"{where}: {old.clips} clips, PCC {figures}, RMSE {old.rmse:.4f} -> {new.rmse:.4f}")


def _tell_sizes(before: nn.Module, after: nn.Module, report: dict[str, Any]) -> None:
    for name, count in (("parameters", _parameters), ("multiply-adds a clip", _macs)):
        old, new = count(before), count(after)
        report[name] = {"before": old, "after": new}
        print(f"{name}: {old:,} -> {new:,} ({new / old:.1%})")


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _macs(model: Any) -> int:
    layout = layout_of(model)
    return round(layout.macs(layout.counts))


# --- the command ----------------------------------------------------------------------------------


def _name(source: Scorer) -> str:
    """What a model is called, without the path to it: files hold no machine's paths."""
    return Path(source.name).name


def write_student(shrinking: Shrinking, out: Path, tuned: Mapping[str, Any]) -> None:
    """``model.safetensors`` and ``model.json`` of a student, as ``train fit`` writes them."""
    student = shrinking.student
    path = out / DENSE_FILE
    write_weights(path, student.state_dict())
    about = {
        "student": f"{_name(shrinking.source)}, shrunk",
        "config": student.config.model_dump(mode="json"),
        "parameters": _parameters(student),
        "macs_per_clip": _macs(student),
        "shrunk_from": {
            "model": _name(shrinking.source),
            "weights_sha256": shrinking.source.weights_sha256,
        },
        "units_left": shrinking.units,
        **tuned,
        "weights_sha256": sha256_of(path),
        "version": version(),
    }
    write_about(out / ABOUT_FILE, about)


def _run_student(source: Scorer, args: argparse.Namespace) -> int:
    shrinking = shrink_student(source, args)
    waves_BT = clips_of(args.importance_from, args.clips)
    tuned: dict[str, Any] = {}
    if args.finetune_steps:
        tuned = finetune(shrinking, args)
        before_B = scores_of(source.score_windows, waves_BT)
        _tell_difference(shrinking, "fine-tuned", before_B, waves_BT)
    write_student(shrinking, args.out, tuned)
    _tell_sizes(source.network, shrinking.student, shrinking.report)
    _tell_gains(source, load(args.out, str(source.device)), args, shrinking.report)
    write_text(args.out / REPORT_FILE, json.dumps(shrinking.report, indent=2) + "\n")
    print(f"done: {args.out / DENSE_FILE}")
    return 0


def shrink_teacher(teacher: HeadTeacher) -> tuple[HeadTeacher, dict[str, str]]:
    """A teacher whose XLS-R has no dead heads and feed-forward units, and what is left of it.

    ``ValueError`` for a teacher without such an encoder.
    """
    front_end = teacher.front_end
    if not isinstance(front_end, XlsrFrontEnd):
        raise UserError(f"teacher {teacher.name!r} has no XLS-R encoder that could be shrunk")
    units = dead_units(front_end.encoder)
    encoder = shrink(front_end.encoder, units)
    heard = XlsrFromMemory(teacher.name, encoder, front_end.weights_sha256, str(teacher.device))
    smaller = HeadTeacher(
        teacher.name, heard, teacher.head, teacher.weights_sha256, teacher.calibration
    )
    return smaller, removed(units)


def zeros_of(weights: Mapping[str, Tensor]) -> Masks:
    """Masks of the zeros, where they are worth it: a shrunk teacher may still be a sparse one."""
    matrices = {name: tensor for name, tensor in weights.items() if tensor.ndim >= 2}
    shares = {name: float((tensor == 0).float().mean()) for name, tensor in matrices.items()}
    return Masks({n: t != 0 for n, t in matrices.items() if shares[n] > WORTH_A_MASK})


def _run_teacher(source: TeacherScorer, args: argparse.Namespace) -> int:
    if args.keep_macs is not None or args.finetune_steps:
        raise UserError(
            "of a teacher only dead units are removed: --keep-macs and --finetune-steps are for "
            "students; prune it further with python -m train prune"
        )
    teacher = source.teacher
    if not isinstance(teacher, HeadTeacher):
        raise UserError(f"teacher {teacher.name!r} has no XLS-R encoder that could be shrunk")
    smaller, units = shrink_teacher(teacher)
    weights = weights_of(smaller)
    about = describe(smaller) | {
        "shrunk_from": {"model": _name(source), "weights_sha256": source.weights_sha256},
        "units_left": {"dead": units},
    }
    save_pruned(args.out, weights, zeros_of(weights), about)
    after = load(args.out, args.device)
    waves_BT = clips_of(args.importance_from, args.clips)
    apart_B = scores_of(source.score_windows, waves_BT) - scores_of(after.score_windows, waves_BT)
    report: dict[str, Any] = {"MOS apart": float(apart_B.abs().max())}
    print(f"scores of {len(apart_B)} clips are {report['MOS apart']:.2g} MOS apart at most")
    encoders = [front.encoder for front in (teacher.front_end, smaller.front_end)
                if isinstance(front, XlsrFrontEnd)]  # fmt: skip
    _tell_sizes(encoders[0], encoders[1], report)
    _tell_gains(source, after, args, report)
    write_text(args.out / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    print(f"done: {args.out / SPARSE_FILE}")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train shrink``."""
    parser.add_argument("--model", required=True, help="v7, or the folder of a run or pruned model")
    parser.add_argument("--out", type=path_here, required=True, help="folder of the smaller model")
    parser.add_argument(
        "--keep-macs", type=float, help="share of the multiply-adds to keep; students only"
    )
    parser.add_argument(
        "--importance-from", help="shards or a CSV of clips: judge units by these (no labels)"
    )
    parser.add_argument("--importance-clips", type=int, default=64)
    parser.add_argument("--clips", type=int, default=16, help="clips whose scores are compared")
    parser.add_argument(
        "--judge", type=path_here, action="append", default=[],
        help="shards or a CSV of rated clips: correlation before and after; repeatable",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement of speed")
    parser.add_argument("--finetune-steps", type=int, default=0)
    parser.add_argument("--shards", help="shards to fine-tune on")
    parser.add_argument(
        "--validation", help="shards to validate on (default: validation beside --shards)"
    )
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--warmup", type=int, default=50, help="at most a tenth of the steps")
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="decoding processes (0: none)")
    parser.add_argument(
        "--cache-gb", type=float, default=4.0, help="decoded samples kept in memory"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="default: all cores")


def run(args: argparse.Namespace) -> int:
    """``python -m train shrink``; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.finetune_steps and args.shards is None:
        raise UserError("--finetune-steps needs --shards: what to learn from")
    if args.keep_macs is not None and not 0 < args.keep_macs <= 1:
        raise UserError(f"--keep-macs {args.keep_macs}: must be above 0 and at most 1")
    if args.finetune_steps:
        open_sources(args.shards, args.validation)  # now, not when all is shrunk
    source = load(args.model, args.device)
    with run_folder(args.out):
        if isinstance(source, TeacherScorer):
            return _run_teacher(source, args)
        if args.keep_macs is not None and args.importance_from is None:
            raise UserError("--keep-macs needs clips to judge units by: --importance-from SHARDS")
        return _run_student(source, args)
