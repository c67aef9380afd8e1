"""Students and teachers as scorers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data_specs.io.errors import UserError
from data_specs.io.waves import Padding, filled
from data_specs.sample import CROP_SAMPLES
from train.audio import Clip, Wave
from train.models.head_teacher import HeadTeacher
from train.models.precision import NAMES, resolve_precision
from train.models.student import Student, mos_of
from train.models.teacher import Teacher
from train.scoring.base import Scorer
from train.scoring.engine import Engine
from train.scoring.windows import (
    MIN_SAMPLES,
    Mode,
    WindowGroup,
    shared_parts,
    whole,
)


def torch_on(device: torch.device) -> str:
    """Return PyTorch's version and the kind of device that it runs on."""
    return f"torch {torch.__version__} {device.type}"


class StudentScorer(Scorer):
    """A student as a scorer, run by an engine that follows its weights."""

    def __init__(
        self,
        network: Student,
        name: str,
        weights_sha256: str,
        device: str = "cpu",
        precision: str = "fp32",
        parameters: int | None = None,
    ) -> None:
        """``parameters``: how many are alive, if not all of the network's."""
        self.device = torch.device(device)
        self.dtype = resolve_precision(precision, self.device)
        self.network = network.to(self.device).eval()
        if parameters is None:
            parameters = sum(parameter.numel() for parameter in network.parameters())
        runtime, in_words = torch_on(self.device), NAMES[self.dtype]
        super().__init__(name, weights_sha256, runtime, in_words, parameters)
        self.padding, self.resampler = network.config.padding, network.config.resampler
        self._engine: Engine | None = None
        self._made_of: tuple[tuple[int, int], ...] = ()

    def engine(self) -> Engine:
        """Return the student's engine, made anew where its weights were changed."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        made_of = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        if self._engine is None or made_of != self._made_of:
            self._engine = Engine(self.network, self.dtype, self.device)
            self._made_of = made_of
        return self._engine

    def parts(self, clip: Clip, padding: Padding, mode: Mode) -> Iterator[WindowGroup]:
        """See ``Scorer.parts``; the engine pads with zeros itself: it knows what silence gives."""
        if clip.samples > CROP_SAMPLES and mode == "fast":
            return shared_parts(clip, self.engine().grid_samples)
        if clip.samples <= CROP_SAMPLES and padding == "zero":
            return iter((WindowGroup(whole(clip)),))
        return super().parts(clip, padding, mode)

    def score_windows(self, waves: Sequence[Wave]) -> list[float]:
        """See ``Scorer.score_windows``; zeros are put behind a window that is shorter."""
        return self.engine().scores(waves)

    def score_shared(self, part: WindowGroup) -> list[float]:
        """See ``Scorer.score_shared``."""
        return self.engine().shared(part.wave_T, part.offsets, part.peak)


class TeacherScorer(Scorer):
    """A teacher as a scorer, in the precision that it was loaded in.

    Where its head reads frames, a clip shorter than a window is scored as it is, and zeros are put
    behind its frames (published code of xls-r-sqa); ``padding="repeat"`` repeats the wave.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        dtype = getattr(teacher, "dtype", torch.float32)
        super().__init__(
            teacher.name,
            teacher.weights_sha256,
            torch_on(getattr(teacher, "device", torch.device("cpu"))),
            NAMES[dtype],
            getattr(teacher, "parameter_count", None),
        )

    def window(self, wave_T: Wave, padding: Padding) -> Wave:
        """See ``Scorer.window``."""
        as_it_is = len(wave_T) >= MIN_SAMPLES and padding == "zero"
        if as_it_is and isinstance(self.teacher, HeadTeacher):
            return wave_T
        return filled(wave_T, padding)

    def score_windows(self, waves: Sequence[Wave]) -> list[float]:
        """See ``Scorer.score_windows``; a window may be shorter than the others."""
        full = [wave for wave in waves if len(wave) == CROP_SAMPLES]
        scores = iter(self.teacher.score(np.stack(full))[0].tolist() if full else [])
        return [
            next(scores) if len(wave) == CROP_SAMPLES else self._score_short(wave) for wave in waves
        ]

    def _score_short(self, wave_T: Wave) -> float:
        if not isinstance(self.teacher, HeadTeacher):
            raise UserError(f"teacher {self.name!r} scores clips of {CROP_SAMPLES} samples only")
        return float(mos_of(self.teacher.logits(torch.from_numpy(wave_T)[None]).double()))
