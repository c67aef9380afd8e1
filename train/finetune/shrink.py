"""Structured pruning as a term of the loss: gates over the encoder's units, and their budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from train.finetune.clips import Batch
from train.finetune.terms import Term
from train.models.encoders.interface import SpeechEncoder, States
from train.pruning.encoder_units import counted_macs, encoder_layout, split_encoder
from train.pruning.gates import Budget, Gates, by_group, cut, for_its_cost, gated, most_likely
from train.pruning.joint import RAMP, SETTLES

By = Literal["l0", "low-rank", "importance"]

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
        self.by, self.keep, self.lr = by, keep, lr
        self.macs = counted_macs(encoder)
        if by == "low-rank":
            split_encoder(encoder)
        self.layout = encoder_layout(encoder)
        self.gates, self.budget = Gates(self.layout), Budget()
        self.gates.settled(keep * self.macs)  # can it be met at all?
        self.rises_until = RAMP * steps
        self.settles_at = max(1, int((LOOKS if by == "importance" else SETTLES) * steps))
        self.register_buffer("importance_N", torch.zeros_like(self.gates.alphas_N))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def groups(self) -> list[dict[str, object]]:
        """The gates go down, the multipliers up."""
        rate = {"lr": self.lr, "weight_decay": 0.0}
        budget = {"params": list(self.budget.parameters()), "maximize": True}
        return [{"params": list(self.gates.parameters()), **rate}, {**budget, **rate}]

    def is_ready(self) -> bool:
        """Whether a validation now is one of what will be left."""
        return int(self.updates) > self.settles_at

    def tensors(self, encoder: SpeechEncoder) -> Mapping[str, Tensor]:
        """The encoder's tensors, gated."""
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
        return self.gates.settled(max(float(self._expected().detach()), self.keep) * self.macs)

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
            return self.gates.settled(self.keep * self.macs)
        importance = dict(by_group(self.layout, self.importance_N.cpu()))
        worth_N = for_its_cost(self.layout, importance)
        kept_N = most_likely(self.layout, worth_N, self.keep * self.macs)
        return kept_N.to(self.importance_N)

    def _expected(self) -> Any:
        return self.layout.macs(self.gates.expected()) / self.macs

    def loss(self, batch: Batch, states: States, step: int) -> Tensor:
        """What the budget adds while gates are open."""
        is_open = self.by != "importance" and step < self.settles_at
        self.updates.fill_(step + 1)
        if not is_open:
            return torch.zeros((), device=self.importance_N.device)
        target = min(1.0, step / self.rises_until) * (1 - self.keep)
        found: Tensor = self.budget(1 - self._expected(), target)
        return found

    def figures(self) -> dict[str, float]:
        """The share of the multiply-adds that is left, or expected to be."""
        if self.by != "importance" and int(self.updates) <= self.settles_at:
            return {"macs": float(self._expected().detach())}
        fixed = by_group(self.layout, self.gates.fixed_N)
        counts = {name: int(gates_U.count_nonzero()) for name, gates_U in fixed}
        return {"macs": float(self.layout.macs(counts)) / self.macs}

    def finish(self, encoder: SpeechEncoder) -> SpeechEncoder:
        """The encoder without what is closed."""
        return cut(encoder, self.layout, self.gates.fixed_N)
