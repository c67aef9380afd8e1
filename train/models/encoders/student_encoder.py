"""A student (v7 or ours) as an encoder: its convolutions, then its Transformer layers.

It hears 7.68 s at any level with zeros behind a short clip, as it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from train.models.encoders.interface import SpeechEncoder, States
from train.models.features import compressed_spectrum, peak_normalise
from train.models.student import Student, StudentConfig


class StudentEncoder(SpeechEncoder):
    """State 0 is the projected tokens with their positions; the pooling is not part of it.

    Batch norms keep their statistics: a few updates on another task say less of them.
    """

    kind = "student"
    longest_s = counted_s = CROP_SAMPLES / SAMPLE_RATE

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student, self.resampler = student, student.config.resampler
        self.frame_s = self.longest_s / student.config.tokens
        self.dims = (student.config.dim,) * (student.config.layers + 1)

    @classmethod
    def build(cls, about: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> Self:
        encoder = cls(Student(StudentConfig.model_validate(about["config"])))
        if state is not None:
            encoder.load_state_dict(state)
        return encoder

    def about(self) -> dict[str, Any]:
        return {"config": self.student.config.model_dump(mode="json")}

    def train(self, mode: bool = True) -> Self:
        """All but the batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.eval()
        return self

    def forward(self, waves_BT: Tensor, lengths_B: Tensor) -> States:
        waves_BT = functional.pad(waves_BT, (0, CROP_SAMPLES - waves_BT.shape[1]))
        tokens_BLC = self.student.tokens(compressed_spectrum(peak_normalise(waves_BT)))
        head, tokens = self.student.head, self.student.config.tokens
        found = [head.embedded(tokens_BLC)]
        for layer in head.encoder.layers:
            found.append(layer(found[-1]))
        frames_B = -(-lengths_B * tokens // CROP_SAMPLES)
        return States(tuple(found), frames_B)
