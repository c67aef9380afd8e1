"""A loaded model that scores clips of any length and rate, in memory or in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_specs.io.errors import UserError
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.audio import Clip, Wave, channels_of, clip_of, open_clip
from train.models.head_teacher import HeadTeacher
from train.models.precision import resolve_precision
from train.models.student import Student, mos_of
from train.models.teacher import Teacher
from train.scoring.background import ahead
from train.scoring.code import made_with
from train.scoring.engine import Engine
from train.scoring.int8 import Int8Convolutions
from train.scoring.result import Score, Window
from train.scoring.windows import (
    MIN_SAMPLES,
    Mode,
    Part,
    Short,
    checked_mode,
    checked_short,
    exact_parts,
    shared_parts,
    whole,
    window_count,
    windows,
)

WINDOWS_A_BATCH = 8

BATCHES_AHEAD = 2
"""What is read and resampled before it is scored, in batches."""

Channels = Literal["mono", "each"]
"""Mono: the first channel (as distillmos does it). Each: a score for every channel."""

Samples = NDArray[Any] | Tensor

FULL_SCALE = {np.dtype(np.int16): 2.0**15, np.dtype(np.int32): 2.0**31}
"""What whole numbers are divided by."""


def torch_on(device: torch.device) -> str:
    """PyTorch's version and the kind of device that it runs on."""
    return f"torch {torch.__version__} {device.type}"


PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class _Pending:
    """A clip whose windows are being scored."""

    score: Score
    count: int
    windows: list[Window] = field(default_factory=list)
    error: str | None = None

    @property
    def is_done(self) -> bool:
        return self.error is not None or len(self.windows) == self.count

    def result(self) -> Score:
        if self.error is not None:
            return replace(self.score, seconds=None, error=self.error)
        mos = float(np.mean([window.mos for window in self.windows]))
        if not math.isfinite(mos):
            where = self.score.path or "the clip"
            error = f"{where}: the model {self.score.model} gives no finite score ({mos})"
            return replace(self.score, seconds=None, error=error)
        return replace(self.score, mos=mos, windows=tuple(self.windows))


Work = tuple[_Pending, Part | str]
"""Something to score, or why a clip cannot be."""


def as_wave(wave: Samples, where: str = "wave") -> Wave:
    """Samples (T,) as float32: floats as they are, int16 and int32 divided by full scale.

    Of any byte order and, of a tensor, on any device. ``UserError`` naming ``where`` for other
    types, shapes, no samples or values not finite.
    """
    array = _array(wave, where)
    if array.ndim != 1:
        raise UserError(f"{where}: shape {array.shape}; need one channel, shape (T,)")
    dtype = array.dtype.newbyteorder("=")
    if dtype in FULL_SCALE:
        return (array / FULL_SCALE[dtype]).astype(np.float32)
    if dtype.kind != "f" and dtype.name != "bfloat16":  # which NumPy knows from other packages
        raise UserError(f"{where}: samples of type {dtype}: give floats, int16 or int32")
    with np.errstate(over="ignore"):  # what is too large for float32 is then not finite
        return np.ascontiguousarray(array, np.float32)


def _array(wave: Samples, where: str) -> NDArray[Any]:
    if isinstance(wave, Tensor):
        if wave.is_floating_point() and wave.dtype != torch.float64:
            wave = wave.float()  # NumPy has no bfloat16
        kind = f"{wave.dtype} ({wave.layout})"
    else:
        kind = type(wave).__name__
    try:
        return wave.numpy(force=True) if isinstance(wave, Tensor) else np.asarray(wave)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{where}: samples of type {kind}: give floats, int16 or int32: {error}"
        ) from error


def checked_rate(sample_rate: float, where: str = "wave") -> int:
    """A sample rate in Hz; ``ValueError`` if it is not a positive whole number."""
    if not math.isfinite(sample_rate) or int(sample_rate) != sample_rate or sample_rate <= 0:
        raise UserError(f"{where}: sample rate {sample_rate} Hz: must be positive and whole")
    return int(sample_rate)


def _rates(sample_rate: float | Sequence[float], count: int) -> list[float]:
    given: Any = sample_rate
    return [given] * count if np.ndim(given) == 0 else list(given)


class Scorer:
    """A model that scores clips; made by ``load``.

    A clip longer than 7.68 s is scored in windows (``train.scoring.windows``), and its score is
    their mean. Every window is divided by its own peak, so gain changes nothing as long as the
    peak is far above 1e-8 of full scale; an offset (DC) is not removed, and changes the score:
    both as published. Silence has a score like any other clip.
    """

    precision = "fp32"
    parameters: int | None = None
    """Of a pruned model those that are alive; None where the network does not tell (ONNX)."""
    runtime = ""
    """What runs the network, its version and the kind of device."""
    int8: Int8Convolutions | None = None
    _engine: Engine | None = None
    _made_of: tuple[tuple[int, int], ...] = ()

    def __init__(
        self,
        network: nn.Module,
        name: str,
        weights_sha256: str,
        device: str = "cpu",
        precision: str = "fp32",
        int8: Int8Convolutions | None = None,
        parameters: int | None = None,
    ) -> None:
        """With ``int8``, a student's convolutions are these, and ``precision`` that of the rest.

        ``parameters``: how many are alive, if not all of the network's.
        """
        self.name = name
        self.weights_sha256 = weights_sha256
        self.device = torch.device(device)
        self.dtype = resolve_precision(precision, self.device)
        self.precision = "int8" if int8 else PRECISION_NAMES[self.dtype]
        self.runtime = torch_on(self.device)
        self.int8 = int8
        self.network = network.to(self.device).eval()
        dense = sum(parameter.numel() for parameter in network.parameters())
        self.parameters = dense if parameters is None else parameters

    @property
    def version(self) -> str:
        """Of the code and of what runs it; with the weights' hash and the precision, a score's."""
        return made_with(self.runtime)

    def score(
        self,
        wave: Samples,
        sample_rate: float,
        short: Short = "zero",
        mode: Mode = "exact",
    ) -> float:
        """Mean opinion score, 1 to 5, of one channel of speech, shape (T,), at any rate in Hz.

        Floats are taken as they are, int16 and int32 divided by full scale. ``ValueError`` for no
        samples, several channels, values that are not finite, or a rate that is not positive.
        """
        return _mos(self._scored([("wave", wave, sample_rate)], short, mode)[0])

    def score_batch(
        self,
        waves: Sequence[Samples],
        sample_rate: float | Sequence[float],
        short: Short = "zero",
        mode: Mode = "exact",
        batch: int = WINDOWS_A_BATCH,
    ) -> list[Score]:
        """Scores of waves (T,) of any lengths, at one rate in Hz or one each, ``batch`` windows
        at a time. ``ValueError`` as ``score`` raises it, naming the wave by its number.
        """
        rates = _rates(sample_rate, len(waves))
        if len(rates) != len(waves):
            raise UserError(f"{len(rates)} sample rates for {len(waves)} waves")
        named = [(f"wave {n}", *pair) for n, pair in enumerate(zip(waves, rates, strict=True))]
        return self._scored(named, short, mode, batch)

    def curve(self, wave: Samples, sample_rate: float, mode: Mode = "exact") -> list[Window]:
        """The score over time: every window's place in the clip, in seconds, and its score.

        Windows are 7.68 s and overlap; they are at most 1 s apart.
        """
        return list(self._scored([("wave", wave, sample_rate)], "zero", mode)[0].windows)

    def score_file(
        self, path: Path | str, short: Short = "zero", mode: Mode = "exact", channel: int = 0
    ) -> Score:
        """The score of one channel of a file; ``ValueError`` naming a file that has none."""
        where = Path(path)
        if not 0 <= channel < (count := channels_of(where)):
            raise UserError(f"{where}: channel {channel}: it has {count}, counted from 0")
        work = self._clip_work(where, channel, partial(open_clip, where, channel), short, mode)
        (result,) = self._results(work, WINDOWS_A_BATCH)
        if result.error is not None:
            raise UserError(result.error)
        return result

    def score_files(
        self,
        paths: Iterable[Path],
        short: Short = "zero",
        batch: int = WINDOWS_A_BATCH,
        channels: Channels = "mono",
        mode: Mode = "exact",
    ) -> Iterator[Score]:
        """Score files in order; a file that cannot be scored gives a ``Score`` with the error.

        ``batch`` windows are scored at a time, those of neighbouring files together; the next ones
        are read and resampled meanwhile. Of a long file only some blocks are in memory.
        """
        short, mode = checked_short(short), self._checked(mode)
        work = ahead(self._file_work(paths, channels, short, mode), BATCHES_AHEAD * batch)
        return self._results(work, batch)

    def windows(self, wave_T: Wave, short: Short) -> Iterator[Wave]:
        """What a clip at 16 kHz is scored in; asked for clips of up to one window."""
        return windows(wave_T, short)

    @torch.inference_mode()
    def score_windows(self, waves: Sequence[Wave]) -> list[float]:
        """Scores of windows, 122880 samples each at 16 kHz."""
        engine = self.engine()
        if engine is not None:
            return engine.scores(waves)
        waves_BT = torch.from_numpy(np.stack(waves)).to(self.device)
        lower = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=lower):
            scores: list[float] = self.network(waves_BT).float().tolist()
        return scores

    def engine(self) -> Engine | None:
        """The student's engine, made anew where its weights were changed; None for others."""
        network = getattr(self, "network", None)
        if not isinstance(network, Student):
            return None
        tensors = [*network.parameters(), *network.buffers()]
        made_of = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        if self._engine is None or made_of != self._made_of:
            self._engine = Engine(network, self.dtype, self.device, self.int8)
            self._made_of = made_of
        return self._engine

    def _checked(self, mode: Mode) -> Mode:
        if checked_mode(mode) == "fast" and self.engine() is None:
            raise UserError(f"{self.name}: mode 'fast' shares a student's convolutions; take exact")
        return mode

    def _scored(
        self,
        waves: Sequence[tuple[str, Samples, float]],
        short: Short,
        mode: Mode,
        batch: int = WINDOWS_A_BATCH,
    ) -> list[Score]:
        short, mode = checked_short(short), self._checked(mode)
        clips = [
            clip_of(as_wave(wave, where), checked_rate(rate, where), where)
            for where, wave, rate in waves
        ]
        work = (
            item
            for clip in clips
            for item in self._clip_work(None, 0, partial(_itself, clip), short, mode)
        )
        return list(self._results(work, batch))

    def _file_work(
        self, paths: Iterable[Path], channels: Channels, short: Short, mode: Mode
    ) -> Iterator[Work]:
        for path in paths:
            count = 1
            if channels == "each":
                try:
                    count = channels_of(path)
                except UserError as error:
                    yield _Pending(self.unscored(path), -1), str(error)
                    continue
            for channel in range(count):
                yield from self._clip_work(
                    path, channel, partial(open_clip, path, channel), short, mode
                )

    def _clip_work(
        self,
        path: Path | None,
        channel: int,
        opened: Callable[[], Clip],
        short: Short,
        mode: Mode,
    ) -> Iterator[Work]:
        pending = _Pending(self.unscored(path, channel), -1)
        try:
            clip = opened()
            pending.score = replace(pending.score, seconds=clip.seconds)
            pending.count = window_count(clip.samples)
            for part in self._parts(clip, short, mode):
                yield pending, part
        except UserError as error:
            yield pending, str(error)

    def unscored(self, path: Path | None, channel: int = 0) -> Score:
        """What is known of a file before it is scored."""
        return Score(path, None, None, None, self.name, self.weights_sha256, self.version, channel)

    def _parts(self, clip: Clip, short: Short, mode: Mode) -> Iterator[Part]:
        engine = self.engine()
        if clip.samples > CROP_SAMPLES:
            if engine is not None and mode == "fast":
                return shared_parts(clip, engine.grid_samples)
            return exact_parts(clip)
        wave_T = whole(clip)
        if engine is not None and short == "zero":  # it knows what silence gives
            return iter((Part(wave_T, (0,), (0,)),))
        return (Part(window_T, (0,), (0,)) for window_T in self.windows(wave_T, short))

    def _results(self, work: Iterable[Work], batch: int) -> Iterator[Score]:
        pending: list[_Pending] = []
        queue: list[tuple[_Pending, Part]] = []
        for clip, part in work:
            if not pending or pending[-1] is not clip:
                pending.append(clip)
            if isinstance(part, str):
                clip.error = part
            else:
                queue.append((clip, part))
                if len(queue) < batch and len(part.offsets) == 1:
                    continue
            self._work_off(queue)
            yield from _completed(pending)
        self._work_off(queue)
        yield from _completed(pending)

    def _work_off(self, queue: list[tuple[_Pending, Part]]) -> None:
        alone = [part for _, part in queue if len(part.offsets) == 1]
        scores = iter(self.score_windows([part.wave_T for part in alone]) if alone else [])
        for clip, part in queue:
            of_part = [next(scores)] if len(part.offsets) == 1 else self._score_shared(part)
            seconds = clip.score.seconds or 0.0
            for start, mos in zip(part.starts, of_part, strict=True):
                end = min((start + CROP_SAMPLES) / SAMPLE_RATE, seconds)
                clip.windows.append(Window(start / SAMPLE_RATE, end, mos))
        queue.clear()

    def _score_shared(self, part: Part) -> list[float]:
        engine = self.engine()
        assert engine is not None  # no other scorer is given such parts
        return engine.shared(part.wave_T, part.offsets, part.peak)


class TeacherScorer(Scorer):
    """A teacher as a scorer, in the precision that it was loaded in.

    Where its head reads frames, a clip shorter than a window is heard as it is, and zeros are put
    behind its frames (published code of xls-r-sqa); ``short="repeat"`` repeats the wave.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.name, self.weights_sha256 = teacher.name, teacher.weights_sha256
        self.precision = PRECISION_NAMES.get(getattr(teacher, "dtype", torch.float32), "fp32")
        self.parameters = getattr(teacher, "parameter_count", None)
        self.runtime = torch_on(getattr(teacher, "device", torch.device("cpu")))

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
            raise UserError(f"teacher {self.name!r} scores clips of {CROP_SAMPLES} samples only")
        return float(mos_of(self.teacher.logits(torch.from_numpy(wave_T)[None]).double()))


def _itself(clip: Clip) -> Clip:
    return clip


def _completed(pending: list[_Pending]) -> Iterator[Score]:
    while pending and pending[0].is_done:
        yield pending.pop(0).result()


def _mos(score: Score) -> float:
    if score.mos is None:
        raise UserError(score.error)
    return score.mos
