"""Scores of speech clips: ``load("v7").score(wave, sample_rate)`` and ``python -m train score``.

Longer clips are scored in windows of 7.68 s, at most 1 s apart, spread evenly; the score is
the windows' mean (published code). Shorter clips get zeros at their end (published), or are
repeated (``short="repeat"``, better for small students).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from data_specs.sample import CROP_SAMPLES
from data_specs.teacher import MEAN, teacher_table
from train.audio import Wave, check_wave, read_mono, to_16k
from train.files import load_checkpoint, write_text
from train.models.head_teacher import HEAD_JSON, HeadTeacher
from train.models.student import Student, load_v7, mos_of, sha256_of, student_of, v7_weights_path
from train.models.teacher import Teacher, load_teacher
from train.pruning.storage import SPARSE_FILE, is_pruned, load_pruned, read_about

Short = Literal["zero", "repeat"]

MAX_HOP_SAMPLES = 16_000
"""Windows of a long clip start at most 1 s apart (published code)."""

MIN_SAMPLES = 400
"""What one frame of XLS-R or of MFCC is made of; shorter clips are padded."""

WINDOWS_A_BATCH = 8
AUDIO_ENDINGS = {
    ".wav",
    ".flac",
    ".ogg",
    ".opus",
    ".mp3",
    ".aiff",
    ".aif",
    ".au",
    ".w64",
}
COLUMNS = ("path", "mos", "seconds", "model", "weights_sha256", "error")

DONE, SOME_FAILED, NONE_SCORED = 0, 1, 2
"""Exit codes of ``python -m train score``."""


@dataclass(frozen=True)
class Score:
    """The score of one file, or why there is none."""

    path: Path
    mos: float | None
    seconds: float | None
    error: str | None = None


@dataclass
class _Pending:
    """A file whose windows are being scored."""

    path: Path
    seconds: float
    windows: int
    scores: list[float] = field(default_factory=list)


def window_count(samples: int) -> int:
    """How many windows a clip of that many samples at 16 kHz is scored in."""
    return math.ceil(max(0, samples - CROP_SAMPLES) / MAX_HOP_SAMPLES) + 1


def windows(wave_T: Wave, short: Short = "zero") -> Iterator[Wave]:
    """The windows (122880,) of a 16 kHz clip, as the published code cuts them."""
    missing = CROP_SAMPLES - len(wave_T)
    if missing > 0:
        yield (np.pad(wave_T, (0, missing)) if short == "zero" else np.resize(wave_T, CROP_SAMPLES))
        return
    for place in np.linspace(0, 1, window_count(len(wave_T))):
        start = int(place * -missing)
        yield wave_T[start : start + CROP_SAMPLES]


class Scorer:
    """A loaded model that scores clips of any length and rate; made by ``load``."""

    def __init__(
        self, network: nn.Module, name: str, weights_sha256: str, device: str = "cpu"
    ) -> None:
        self.name = name
        self.weights_sha256 = weights_sha256
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()

    def score(
        self,
        wave: NDArray[np.floating] | Tensor,
        sample_rate: int,
        short: Short = "zero",
    ) -> float:
        """Mean opinion score, 1 to 5, of one channel of speech, shape (T,), at any rate in Hz.

        ``ValueError`` for no samples, several channels, values that are not finite, or a rate
        that is not positive.
        """
        if isinstance(wave, Tensor):
            wave = wave.detach().cpu().numpy()
        wave_T = np.ascontiguousarray(wave, np.float32)
        check_wave(wave_T, "wave")
        parts = list(_batched(self.windows(to_16k(wave_T, sample_rate), _checked(short))))
        return float(np.mean([mos for part in parts for mos in self.score_windows(part)]))

    def windows(self, wave_T: Wave, short: Short) -> Iterator[Wave]:
        """What a clip at 16 kHz is scored in."""
        return windows(wave_T, short)

    @torch.inference_mode()
    def score_windows(self, waves: Sequence[Wave]) -> list[float]:
        """Scores of windows, 122880 samples each at 16 kHz."""
        waves_BT = torch.from_numpy(np.stack(waves)).to(self.device)
        scores: list[float] = self.network(waves_BT).tolist()
        return scores

    def score_files(
        self, paths: Iterable[Path], short: Short = "zero", batch: int = WINDOWS_A_BATCH
    ) -> Iterator[Score]:
        """Score files in order; a file that cannot be scored gives a ``Score`` with the error.

        Windows of neighbouring files share batches; one file's audio is in memory at a time.
        """
        pending: list[_Pending] = []
        queue: list[tuple[_Pending, Wave]] = []
        for path in paths:
            for entry in self._windows_of_file(path, _checked(short)):
                if isinstance(entry, Score):
                    yield from self._finish(pending, queue)
                    yield entry
                    continue
                if not pending or pending[-1] is not entry[0]:
                    pending.append(entry[0])
                queue.append(entry)
                if len(queue) == batch:
                    self._work_off(queue)
                    yield from _completed(pending)
        yield from self._finish(pending, queue)

    def _windows_of_file(self, path: Path, short: Short) -> Iterator[tuple[_Pending, Wave] | Score]:
        try:
            wave_T, rate = read_mono(path)
            seconds = len(wave_T) / rate
            wave_T = to_16k(wave_T, rate)
        except ValueError as error:
            yield Score(path, None, None, str(error))
            return
        file = _Pending(path, seconds, window_count(len(wave_T)))
        for window_T in self.windows(wave_T, short):
            yield file, window_T

    def _finish(
        self, pending: list[_Pending], queue: list[tuple[_Pending, Wave]]
    ) -> Iterator[Score]:
        self._work_off(queue)
        yield from _completed(pending)

    def _work_off(self, queue: list[tuple[_Pending, Wave]]) -> None:
        if queue:
            scores = self.score_windows([wave for _, wave in queue])
            for (file, _), mos in zip(queue, scores, strict=True):
                file.scores.append(mos)
            queue.clear()


class TeacherScorer(Scorer):
    """A teacher as a scorer, in float32.

    Where its head reads frames, a clip shorter than a window is heard as it is, and zeros are put
    behind its frames (published code of xls-r-sqa); ``short="repeat"`` repeats the wave.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.name, self.weights_sha256 = teacher.name, teacher.weights_sha256

    def windows(self, wave_T: Wave, short: Short) -> Iterator[Wave]:
        """See ``Scorer.windows``."""
        heard = MIN_SAMPLES <= len(wave_T) < CROP_SAMPLES and short == "zero"
        if heard and isinstance(self.teacher, HeadTeacher):
            return iter((wave_T,))
        return windows(wave_T, short)

    def score_windows(self, waves: Sequence[Wave]) -> list[float]:
        """See ``Scorer.score_windows``; a window may be shorter than the others."""
        whole = [wave for wave in waves if len(wave) == CROP_SAMPLES]
        scores = iter(self.teacher.score(np.stack(whole))[0].tolist() if whole else [])
        return [
            next(scores) if len(wave) == CROP_SAMPLES else self._score_short(wave) for wave in waves
        ]

    def _score_short(self, wave_T: Wave) -> float:
        if not isinstance(self.teacher, HeadTeacher):
            raise ValueError(f"teacher {self.name!r} scores clips of {CROP_SAMPLES} samples only")
        return float(mos_of(self.teacher.logits(torch.from_numpy(wave_T)[None]).double()))


def _completed(pending: list[_Pending]) -> Iterator[Score]:
    while pending and len(pending[0].scores) == pending[0].windows:
        file = pending.pop(0)
        yield Score(file.path, float(np.mean(file.scores)), file.seconds)


def _batched(waves: Iterable[Wave]) -> Iterator[list[Wave]]:
    part: list[Wave] = []
    for wave in waves:
        part.append(wave)
        if len(part) == WINDOWS_A_BATCH:
            yield part
            part = []
    if part:
        yield part


def _checked(short: Short) -> Short:
    if short not in get_args(Short):
        raise ValueError(f"short={short!r}: known are {', '.join(get_args(Short))}")
    return short


def load(model: str | Path, device: str = "cpu") -> Scorer:
    """A scorer of "v7" (the published weights), a run folder, a ``.pt`` or a ``.safetensors``.

    Or of a teacher: a name of ``teachers.yaml``, ``mean:a+b``, the folder of a trained head. Models
    that were pruned or shrunk are called by their folder, too.
    ``ValueError`` naming what is missing or damaged.
    """
    if str(model) == "v7":
        return Scorer(load_v7(), "v7", sha256_of(v7_weights_path()), device)
    path = Path(model)
    if str(model) in teacher_table().teachers or str(model).startswith(MEAN):
        return TeacherScorer(load_teacher(model, device, "fp32"))
    if (path / HEAD_JSON).is_file() or _is_pruned_teacher(path):
        return TeacherScorer(load_teacher(model, device, "fp32"))
    if path.is_dir():
        path = _model_in(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such model; give v7, a run folder, a model file or a teacher")
    config, weights = _from_tensors(path) if path.suffix == ".safetensors" else _from_pt(path)
    return Scorer(student_of(path, config, weights), str(model), sha256_of(path), device)


def student_in(scorer: Scorer) -> Student:
    """The student that scores, to go on with; ``ValueError`` for a scorer that is none."""
    network = getattr(scorer, "network", None)
    if not isinstance(network, Student):
        raise ValueError(f"{scorer.name}: is not a student: give v7, or a run or model of one")
    return network


def _is_pruned_teacher(folder: Path) -> bool:
    return is_pruned(folder) and read_about(folder).get("kind") == "teacher"


def _model_in(folder: Path) -> Path:
    for name in (SPARSE_FILE, "model.safetensors", "best.pt"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: holds no model.safetensors or best.pt: train it first")


def _from_tensors(path: Path) -> tuple[object, dict[str, Tensor]]:
    if path.name == SPARSE_FILE:
        weights, described = load_pruned(path.parent)
        return described.get("config"), weights
    about = path.with_suffix(".json")
    if not about.is_file():
        raise ValueError(f"{about} is missing: it says what student {path.name} is")
    try:
        return json.loads(about.read_bytes()).get("config"), safetensors.torch.load_file(path)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} or {about.name} is damaged: {error}") from error


def _from_pt(path: Path) -> tuple[object, dict[str, Tensor]]:
    content = load_checkpoint(path)
    if "weights" in content:
        return content.get("student_config"), content["weights"]
    raise ValueError(f"{path}: holds no model; give the run's best.pt or its folder")


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Audio files of files, folders (recursive, sorted) and ``.txt`` lists (a path a line).

    Lines of a list are relative to it. ``ValueError`` for a list that cannot be read as text.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = (file for file in path.rglob("*") if file.suffix.lower() in AUDIO_ENDINGS)
            found += sorted(file for file in files if file.is_file())
        elif path.suffix == ".txt":
            found += _listed(path)
        else:
            found.append(path)
    return found


def _listed(path: Path) -> list[Path]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable list of files: {error}") from error
    return [path.parent / line.strip() for line in lines if line.strip()]


def scores_csv(scores: Iterable[Score], scorer: Scorer) -> str:
    """The CSV text of scores; columns as in ``COLUMNS``, empty where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for score in scores:
        mos = "" if score.mos is None else f"{score.mos:.6f}"
        seconds = "" if score.seconds is None else f"{score.seconds:.3f}"
        row = [
            score.path,
            mos,
            seconds,
            scorer.name,
            scorer.weights_sha256,
            score.error or "",
        ]
        writer.writerow(row)
    return text.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train score``."""
    parser.add_argument("paths", nargs="+", type=Path, help="files, folders, .txt lists")
    parser.add_argument(
        "--model", default="v7", help="v7, a run folder, a model file, or a teacher"
    )
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--short", choices=get_args(Short), default="zero")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="default: all cores")


def run(args: argparse.Namespace) -> int:
    """``python -m train score``; returns the exit code (0 all, 1 some failed, 2 none scored)."""
    if args.threads:
        torch.set_num_threads(args.threads)
    scorer, files = load(args.model, args.device), find_files(args.paths)
    if not files:
        raise ValueError(f"no audio file in {', '.join(map(str, args.paths))}")
    if not args.out.parent.is_dir():
        raise ValueError(f"{args.out.parent}: no such folder for --out")
    scores: list[Score] = []
    audio_seconds = 0.0
    with tqdm(total=len(files), unit="file", desc="score") as bar:
        for score in scorer.score_files(files, args.short):
            scores.append(score)
            audio_seconds += score.seconds or 0.0
            bar.update()
            bar.set_postfix_str(
                f"{audio_seconds / max(bar.format_dict['elapsed'], 1e-9):.1f}x real time"
            )
    write_text(args.out, scores_csv(scores, scorer))
    failed = [score for score in scores if score.error]
    for score in failed[:5]:
        print(f"not scored: {score.error}", file=sys.stderr)
    print(f"{len(scores) - len(failed)} scored, {len(failed)} not: {args.out}")
    if len(failed) == len(scores):
        return NONE_SCORED
    return SOME_FAILED if failed else DONE
