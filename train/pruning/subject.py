"""What is pruned: a student, or the encoder of an XLS-R teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from data_specs.io.waves import Padding, Resampler
from train.models.calibration import Affine, Calibration
from train.models.front_end import XlsrFrontEnd, states_of
from train.models.head import TransformerHead
from train.models.head_teacher import HeadTeacher, describe
from train.models.loading import find_student, is_teacher
from train.models.student import Student, mos_of, training_layout
from train.models.teacher import load_teacher
from train.models.xlsr import Encoder
from train.teacher.feature_cache import MIN_SAMPLES


class TeacherNetwork(nn.Module):
    """An XLS-R teacher through which gradients flow: what ``HeadTeacher.logits`` computes."""

    def __init__(self, encoder: Encoder, head: TransformerHead, universal: Affine) -> None:
        super().__init__()
        self.encoder, self.head, self.universal = encoder, head, universal

    def forward(self, waves_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Mean opinion scores (B,), float32, of (B, T) waves at 16 kHz.

        Of each only the first ``lengths_B`` samples are encoded, and zeros put behind its frames,
        as published: shorter clips go through the encoder one at a time.
        """
        frames_BLC = self._frames(waves_BT, lengths_B)
        with torch.autocast(waves_BT.device.type, enabled=False):  # the head is in float32
            logits_B: Tensor = self.head(frames_BLC)
        return mos_of(logits_B * self.universal.scale + self.universal.shift)

    def _frames(self, waves_BT: Tensor, lengths_B: Tensor) -> Tensor:
        samples = waves_BT.shape[1]
        lengths = [max(length, MIN_SAMPLES) for length in lengths_B.tolist()]
        whole = [row for row, length in enumerate(lengths) if length >= samples]
        if len(whole) == len(lengths):
            return states_of(self.encoder, waves_BT)
        short = [row for row, length in enumerate(lengths) if length < samples]
        parts = [waves_BT[whole]] if whole else []
        parts += [waves_BT[row : row + 1, : lengths[row]] for row in short]
        found = [states_of(self.encoder, part) for part in parts]
        places = torch.tensor([*whole, *short], device=waves_BT.device).argsort()
        return torch.cat(found)[places]


@dataclass
class Subject:
    """A network that is pruned, and what it is called; ``teacher`` is None for a student."""

    network: Student | TeacherNetwork
    name: str
    sha256: str
    teacher: HeadTeacher | None = None

    @property
    def calibration(self) -> Calibration | None:
        """Between its scale and those of rated sets."""
        return self.teacher.calibration if self.teacher else None

    @property
    def padding(self) -> Padding:
        """What it was trained to hear behind short clips."""
        return self.network.config.padding if isinstance(self.network, Student) else "zero"

    @property
    def resampler(self) -> Resampler:
        """How what it was trained on came to 16 kHz."""
        return self.network.config.resampler if isinstance(self.network, Student) else "soft"

    def describe(self) -> dict[str, Any]:
        if isinstance(self.network, Student):
            return {"kind": "student", "config": self.network.config.model_dump(mode="json")}
        assert self.teacher is not None
        return describe(self.teacher)


def load_subject(model: str | Path, device: str = "cpu") -> Subject:
    """A student ("v7", a run) or an XLS-R teacher by name, on a device, ready to be trained.

    ``ValueError`` for a model that cannot be pruned.
    """
    name = Path(model).name
    if is_teacher(model):
        return teacher_subject(load_teacher(model, device, "fp32"), name)
    student, sha256 = find_student(model)
    student.to(device).requires_grad_(True)
    student.lay_out(training_layout(student.config, torch.device(device)))
    return Subject(student, name, sha256)


def teacher_subject(teacher: object, name: str) -> Subject:
    """A teacher with an XLS-R encoder, in float32. ``ValueError`` for another teacher."""
    if not isinstance(teacher, HeadTeacher) or not isinstance(teacher.front_end, XlsrFrontEnd):
        raise UserError(
            f"teacher {name!r} has no XLS-R encoder: give one that has, or a student (v7, a run)"
        )
    universal = teacher.calibration.universal if teacher.calibration else Affine()
    network = TeacherNetwork(teacher.front_end.encoder, teacher.head, universal)
    return Subject(network.requires_grad_(True), name, teacher.weights_sha256, teacher)
