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
from train.pruning.gates import (
    SETTLES,
    Budget,
    Gates,
    by_group,
    cut,
    for_its_cost,
    gated,
    most_likely,
)


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


LOOKS = 0.1
"""Share of the steps over which importance is gathered, before the choice."""


class Shrinking(Term):
    """An encoder of which a share ``keep`` of the multiply-adds is left at the end.

    As of ``train.pruning.joint``; importance is that of the tasks' and all other losses: the
    squared derivative by a gate, over the first tenth of the steps.
    """

    importance_N: Tensor
    updates: Tensor

    def __init__(self, encoder: SpeechEncoder, by: By, keep: float, steps: int, lr: float) -> None:
        super().__init__()
        self.by, self.lr = by, lr
        self.budget = Budget(counted_macs(encoder), keep, steps)
        if by == "low-rank":
            split_encoder(encoder)
        self.layout = encoder_layout(encoder)
        self.gates = Gates(self.layout)
        self.budget.chosen(self.gates)  # can it be met at all?
        self.settles_at = max(1, int((LOOKS if by == "importance" else SETTLES) * steps))
        self.register_buffer("importance_N", torch.zeros_like(self.gates.alphas_N))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def groups(self) -> list[dict[str, Any]]:
        return self.budget.groups(self.gates, self.lr)

    def is_ready(self) -> bool:
        return int(self.updates) > self.settles_at

    def tensors(self, encoder: SpeechEncoder) -> Mapping[str, Tensor]:
        return gated(encoder, self.layout, self._gates())

    def _gates(self) -> Tensor:
        updates = int(self.updates)
        if self.training and updates == self.settles_at:
            self.gates.fixed_N.copy_(self._chosen())
        if updates >= self.settles_at + (not self.training):
            return self.gates.fixed_N
        if self.by == "importance":
            return self._watched() if self.training else torch.ones_like(self.importance_N)
        if self.training:
            return self.gates.drawn()
        return self.budget.so_far(self.gates)

    def _watched(self) -> Tensor:
        """Open gates (N,) of which the backward pass tells what the losses would lose by each."""
        ones_N = torch.ones_like(self.importance_N).requires_grad_(True)

        def gather(slope_N: Tensor) -> None:
            self.importance_N += slope_N.square()

        ones_N.register_hook(gather)
        return ones_N

    def _chosen(self) -> Tensor:
        """The gates (N,) from now on; of importance for the multiply-adds that a unit costs."""
        if self.by != "importance":
            return self.budget.chosen(self.gates)
        importance = dict(by_group(self.layout, self.importance_N.cpu()))
        worth_N = for_its_cost(self.layout, importance)
        kept_N = most_likely(self.layout, worth_N, self.budget.keep * self.budget.macs)
        return kept_N.to(self.importance_N)

    def loss(self, batch: Batch, states: States, step: int) -> Tensor:
        """What the budget adds while gates are open."""
        is_open = self.by != "importance" and step < self.settles_at
        self.updates.fill_(step + 1)
        if not is_open:
            return torch.zeros((), device=self.importance_N.device)
        found: Tensor = self.budget(self.gates, step)
        return found

    def figures(self) -> dict[str, float]:
        """The share of the multiply-adds that is left, or expected to be."""
        if self.by != "importance" and int(self.updates) <= self.settles_at:
            return {"macs": float(self.budget.share(self.gates).detach())}
        fixed = by_group(self.layout, self.gates.fixed_N)
        counts = {name: int(gates_U.count_nonzero()) for name, gates_U in fixed}
        return {"macs": float(self.layout.macs(counts)) / self.budget.macs}

    def finish(self, encoder: SpeechEncoder) -> SpeechEncoder:
        return cut(encoder, self.layout, self.gates.fixed_N)
