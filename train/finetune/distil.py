"""Distillation as a term of the loss: layers of an encoder follow those of a teacher."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from data_specs.io.errors import UserError
from train.finetune.clips import Batch
from train.finetune.terms import Term
from train.models.distil import Distillation, DistilLoss, evenly
from train.models.encoders.interface import SpeechEncoder, States

Hears = Literal["same", "clean"]


class Distilling(Term):
    """Up to four depths, the first and the last layer among them, each with a map of its own.

    The teacher is no part of the state: it stays what it was. With ``hears`` "clean" it is given
    the clean twins of the clips (RobustDistiller).
    """

    def __init__(
        self,
        encoder: SpeechEncoder,
        teacher: SpeechEncoder,
        weight: float,
        kind: DistilLoss = "log-sigmoid",
        hears: Hears = "same",
    ) -> None:
        super().__init__()
        self.weight, self.hears = weight, hears
        self.teacher = [teacher.requires_grad_(False).eval()]  # a list: not a module of this one
        ours, theirs = evenly(len(encoder.dims) - 1), evenly(len(teacher.dims) - 1)
        self.depths = list(zip(ours[::-1], theirs[::-1], strict=False))  # the last of a shorter one
        own_dims = [encoder.dims[one] for one, _ in self.depths]
        teacher_dims = [teacher.dims[other] for _, other in self.depths]
        self.distil = Distillation(own_dims, teacher_dims, kind)

    def loss(self, batch: Batch, states: States, step: int) -> Tensor:
        """The weighted distance from what the teacher makes of the batch."""
        waves_BT = batch.waves_BT
        if self.hears == "clean":
            if batch.clean_BT is None:
                raise UserError(f"{batch.clips[0].where}: the teacher hears clean clips: no twin")
            waves_BT = batch.clean_BT
        device = states.layers[0].device
        (teacher,) = self.teacher
        with torch.no_grad():
            heard = teacher.to(device)(waves_BT.to(device), batch.lengths_B.to(device))
        ours = [states.layers[one] for one, _ in self.depths]
        theirs = [heard.layers[other] for _, other in self.depths]
        distance: Tensor = self.distil(ours, theirs, states.lengths_B)
        return self.weight * distance
