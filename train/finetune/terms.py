"""What an update adds beside the drawn task's loss: distillation, structured pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from train.finetune.clips import Batch
from train.finetune.config import By, Hears
from train.models.distil import Distillation, DistilLoss, evenly
from train.models.encoders.interface import SpeechEncoder, States
from train.pruning.encoder_units import counted_macs, encoder_layout, split_encoder
from train.pruning.gates import Budget, Importance, cut, gated


class Term(nn.Module):
    """One summand of the loss. Its parameters are learned, its state dict is in checkpoints."""

    def groups(self) -> list[dict[str, Any]]:
        """Its parameters as groups for AdamW; a group without ``lr`` has the heads'."""
        parameters = list(self.parameters())
        return [{"params": parameters, "weight_decay": 0.0}] if parameters else []

    def tensors(self, encoder: SpeechEncoder) -> Mapping[str, Tensor]:
        """Tensors by which the encoder is called instead of its own (gates); none: its own."""
        return {}

    def loss(self, batch: Batch, states: States, step: int) -> Tensor:
        """What is added to the loss of update ``step``."""
        return torch.zeros(())

    def is_ready(self) -> bool:
        """Whether a validation now is one of what will be left: only then may it be the best."""
        return True

    def figures(self) -> dict[str, float]:
        """What a line of the log holds of it."""
        return {}

    def finish(self, encoder: SpeechEncoder) -> SpeechEncoder:
        """The encoder that is saved and judged: cut for real."""
        return encoder


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


class Shrinking(Term):
    """An encoder of which a share ``keep`` of the multiply-adds is left at the end.

    As of ``train.pruning.joint``; importance is that of the tasks' and all other losses.
    """

    updates: Tensor

    def __init__(self, encoder: SpeechEncoder, by: By, keep: float, steps: int, lr: float) -> None:
        super().__init__()
        self.lr, macs = lr, counted_macs(encoder)
        if by == "low-rank":
            split_encoder(encoder)
        kind = Importance if by == "importance" else Budget
        self.budget = kind(encoder_layout(encoder), macs, keep, steps)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def groups(self) -> list[dict[str, Any]]:
        return self.budget.groups(self.lr)

    def is_ready(self) -> bool:
        return int(self.updates) > self.budget.settles_at

    def tensors(self, encoder: SpeechEncoder) -> Mapping[str, Tensor]:
        gates = self.budget.of_step if self.training else self.budget.after
        return gated(encoder, self.budget.layout, gates(int(self.updates)))

    def loss(self, batch: Batch, states: States, step: int) -> Tensor:
        """What the budget adds while gates are open."""
        self.updates.fill_(step + 1)
        return self.budget.loss(step)

    def figures(self) -> dict[str, float]:
        """The share of the multiply-adds that is left, or expected to be."""
        return {"macs": self.budget.left(int(self.updates))}

    def finish(self, encoder: SpeechEncoder) -> SpeechEncoder:
        return cut(encoder, self.budget.layout, self.budget.fixed_N)
