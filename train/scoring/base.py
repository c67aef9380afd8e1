"""What every scorer does: clips of any length and rate, in memory or in files, to scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_specs.io.errors import UserError
from data_specs.io.waves import Padding, Resampler, filled
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.audio import Clip, Samples, Wave, channels_of, clip_of, open_clip
from train.data.loading import ahead
from train.scoring.code import made_with
from train.scoring.windows import (
    Mode,
    WindowGroup,
    checked,
    cut,
    whole,
    window_count,
    window_starts,
)

WINDOWS_A_BATCH = 8

BATCHES_AHEAD = 2
"""What is read and resampled before it is scored, in batches."""

Channels = Literal["mono", "each"]
"""Mono: the first channel (as distillmos does it). Each: a score for every channel."""


class Window(NamedTuple):
    """The score of one window of a clip; seconds from the clip's start."""

    start_seconds: float
    end_seconds: float
    mos: float


@dataclass(frozen=True)
class Score:
    """The score of one channel of a clip, or why there is none, and what made it.

    ``path`` is None for a wave in memory; ``channel`` counts from 0. ``windows`` are what the
    score is the mean of.
    """

    path: Path | None
    mos: float | None
    seconds: float | None
    error: str | None = None
    model: str = ""
    weights_sha256: str = ""
    version: str = ""
    channel: int = 0
    windows: tuple[Window, ...] = ()


@dataclass
class _Pending:
    """A clip whose windows are being scored."""

    score: Score
    count: int = -1
    windows: list[Window] = field(default_factory=list)
    error: str | None = None

    @property
    def is_done(self) -> bool:
        return self.error is not None or len(self.windows) == self.count

    def add(self, part: WindowGroup, scores: Sequence[float]) -> None:
        for offset, mos in zip(part.offsets, scores, strict=True):
            start = part.start + offset
            end = min((start + CROP_SAMPLES) / SAMPLE_RATE, self.score.seconds or 0.0)
            self.windows.append(Window(start / SAMPLE_RATE, end, mos))

    def result(self) -> Score:
        error = self.error
        if error is None:
            mos = float(np.mean([window.mos for window in self.windows]))
            if math.isfinite(mos):
                return replace(self.score, mos=mos, windows=tuple(self.windows))
            where = self.score.path or "the clip"
            error = f"{where}: the model {self.score.model} gives no finite score ({mos})"
        return replace(self.score, seconds=None, error=error)


Work = tuple[_Pending, WindowGroup | str]
"""Something to score, or why a clip cannot be."""


class Scorer(ABC):
    """A model that scores clips; made by ``train.scoring.score.load``.

    A clip longer than 7.68 s is scored in windows (``train.scoring.windows``), and its score is
    their mean. Every window is divided by its own peak, so gain changes nothing as long as the
    peak is far above 1e-8 of full scale; an offset (DC) is not removed, and changes the score:
    both as published. Silence has a score like any other clip.
    """

    def __init__(
        self,
        name: str,
        weights_sha256: str,
        runtime: str,
        precision: str = "fp32",
        parameters: int | None = None,
    ) -> None:
        """``runtime``: what runs the network, its version and the kind of device.

        ``parameters``: of a pruned model those that are alive; None where the network does not
        say (ONNX).
        """
        self.name, self.weights_sha256, self.runtime = name, weights_sha256, runtime
        self.precision, self.parameters = precision, parameters
        self.padding: Padding = "zero"
        """Of short clips where a caller says nothing: what the model was trained to hear."""
        self.resampler: Resampler = "soft"

    @property
    def version(self) -> str:
        """Of the code and of what runs it; with the weights' hash and the precision, a score's."""
        return made_with(self.runtime)

    @abstractmethod
    def score_windows(self, waves: Sequence[Wave]) -> list[float]:
        """Score windows, 122880 samples each at 16 kHz."""

    def window(self, wave_T: Wave, padding: Padding) -> Wave:
        """Return what is scored of a clip at 16 kHz of at most a window."""
        return filled(wave_T, padding)

    def parts(self, clip: Clip, padding: Padding, mode: Mode) -> Iterator[WindowGroup]:
        """Cut a clip into what is scored at a time; ``mode`` is for scorers that override it."""
        if clip.samples > CROP_SAMPLES:
            cuts = cut(clip, window_starts(clip.samples))
            return (WindowGroup(window_T, start) for start, window_T in cuts)
        return iter((WindowGroup(self.window(whole(clip), padding)),))

    def score_shared(self, part: WindowGroup) -> list[float]:
        """Score windows that share convolutions, as ``parts`` of mode "fast" gives them."""
        raise NotImplementedError

    def score(
        self,
        wave: Samples,
        sample_rate: float,
        padding: Padding | None = None,
        mode: Mode = "exact",
    ) -> float:
        """Mean opinion score, 1 to 5, of one channel of speech, shape (T,), at any rate in Hz.

        Floats are taken as they are, int16 and int32 divided by full scale. ``ValueError`` for no
        samples, several channels, values that are not finite, or a rate that is not positive.
        """
        found = self._scored([("wave", wave, sample_rate)], padding, mode)[0]
        if found.mos is None:
            raise UserError(found.error)
        return found.mos

    def score_batch(
        self,
        waves: Sequence[Samples],
        sample_rate: float | Sequence[float],
        padding: Padding | None = None,
        mode: Mode = "exact",
        batch: int = WINDOWS_A_BATCH,
    ) -> list[Score]:
        """Scores of waves (T,) of any lengths, at one rate in Hz or one each, ``batch`` windows
        at a time. ``ValueError`` as ``score`` raises it, naming the wave by its number.
        """
        given: Any = sample_rate
        rates = [given] * len(waves) if np.ndim(given) == 0 else list(given)
        if len(rates) != len(waves):
            raise UserError(f"{len(rates)} sample rates for {len(waves)} waves")
        named = [(f"wave {n}", *pair) for n, pair in enumerate(zip(waves, rates, strict=True))]
        return self._scored(named, padding, mode, batch)

    def curve(self, wave: Samples, sample_rate: float, mode: Mode = "exact") -> list[Window]:
        """The score over time: where in the clip every window is, in seconds, and its score.

        Windows are 7.68 s and overlap; they are at most 1 s apart. ``ValueError`` as ``score``.
        """
        return list(_there(self._scored([("wave", wave, sample_rate)], None, mode)[0]).windows)

    def score_file(
        self,
        path: Path | str,
        padding: Padding | None = None,
        mode: Mode = "exact",
        channel: int = 0,
    ) -> Score:
        """The score of one channel of a file; ``ValueError`` naming a file that has none."""
        padding = self._checked(padding, mode)
        where = Path(path)
        if not 0 <= channel < (count := channels_of(where)):
            raise UserError(f"{where}: channel {channel}: it has {count}, counted from 0")
        opened = partial(open_clip, where, channel, self.resampler)
        (result,) = self._results(self._work(opened, padding, mode, where, channel))
        return _there(result)

    def score_files(
        self,
        paths: Iterable[Path],
        padding: Padding | None = None,
        batch: int = WINDOWS_A_BATCH,
        channels: Channels = "mono",
        mode: Mode = "exact",
    ) -> Iterator[Score]:
        """Score files in order; a file that cannot be scored gives a ``Score`` with the error.

        ``batch`` windows are scored at a time, those of neighbouring files together; the next ones
        are read and resampled meanwhile. Of a long file only some blocks are in memory.
        """
        padding = self._checked(padding, mode)
        work = ahead(self._file_work(paths, channels, padding, mode), BATCHES_AHEAD * batch)
        return self._results(work, batch)

    def unscored(self, path: Path | None, channel: int = 0) -> Score:
        """What is known of a file before it is scored."""
        return Score(path, None, None, None, self.name, self.weights_sha256, self.version, channel)

    def _checked(self, padding: Padding | None, mode: Mode) -> Padding:
        """The padding that was asked for, or the model's own."""
        if checked("mode", mode, Mode) == "fast" and type(self).score_shared is Scorer.score_shared:
            raise UserError(f"{self.name}: mode 'fast' shares a student's convolutions; take exact")
        return checked("padding", padding or self.padding, Padding)  # type: ignore[return-value]

    def _scored(
        self,
        waves: Sequence[tuple[str, Samples, float]],
        padding: Padding | None,
        mode: Mode,
        batch: int = WINDOWS_A_BATCH,
    ) -> list[Score]:
        clips = [clip_of(wave, rate, where, self.resampler) for where, wave, rate in waves]
        found = self._checked(padding, mode)
        work = (self._work(partial(_itself, clip), found, mode) for clip in clips)
        return list(self._results(chain.from_iterable(work), batch))

    def _file_work(
        self, paths: Iterable[Path], channels: Channels, padding: Padding, mode: Mode
    ) -> Iterator[Work]:
        for path in paths:
            try:
                count = channels_of(path) if channels == "each" else 1
            except UserError as error:
                yield _Pending(self.unscored(path)), str(error)
                continue
            for channel in range(count):
                opened = partial(open_clip, path, channel, self.resampler)
                yield from self._work(opened, padding, mode, path, channel)

    def _work(
        self,
        opened: Callable[[], Clip],
        padding: Padding,
        mode: Mode,
        path: Path | None = None,
        channel: int = 0,
    ) -> Iterator[Work]:
        pending = _Pending(self.unscored(path, channel))
        try:
            clip = opened()
            pending.score = replace(pending.score, seconds=clip.seconds)
            pending.count = window_count(clip.samples)
            for part in self.parts(clip, padding, mode):
                yield pending, part
        except UserError as error:
            yield pending, str(error)

    def _results(self, work: Iterable[Work], batch: int = WINDOWS_A_BATCH) -> Iterator[Score]:
        pending: list[_Pending] = []
        queue: list[tuple[_Pending, WindowGroup]] = []
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

    def _work_off(self, queue: list[tuple[_Pending, WindowGroup]]) -> None:
        alone = [part.wave_T for _, part in queue if len(part.offsets) == 1]
        scores = iter(self.score_windows(alone) if alone else [])
        for clip, part in queue:
            clip.add(part, [next(scores)] if len(part.offsets) == 1 else self.score_shared(part))
        queue.clear()


def _there(score: Score) -> Score:
    if score.error is not None:
        raise UserError(score.error)
    return score


def _itself(clip: Clip) -> Clip:
    return clip


def _completed(pending: list[_Pending]) -> Iterator[Score]:
    while pending and pending[0].is_done:
        yield pending.pop(0).result()
