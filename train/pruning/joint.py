"""Training and structured pruning in one run: ``python -m train prune-structured --shards``.

The loss is that of ``train fit``, the distance of some layers from the whole model's, which hears
the same clips, and what gates and their budget add. By "l0" units have gates, by "low-rank" the
ranks of the convolutions (97 % of v7's multiply-adds), which were split by their singular values.
The target rises over the first half; after three quarters the choice is made and the rest of the
steps train what is left. By "importance" it was made before, and what is left starts the run.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from data_specs.io.errors import UserError
from train.loop.loop import Metrics
from train.models.distil import Distillation, DistilLoss, evenly, outputs_of
from train.models.low_rank import split_layers
from train.models.student import Student, macs_of
from train.pruning.gates import Budget, cut, gated
from train.pruning.units import layout_of
from train.student.fit import Trainer
from train.student.presets import FitConfig


class JointConfig(FitConfig):
    """What ``train fit`` needs to know, and the pruning."""

    by: Literal["importance", "l0", "low-rank"] = Field(
        default="importance", description="what says which units go; the others need --shards"
    )
    keep_macs: float = Field(gt=0, le=1)
    importance_clips: int = Field(ge=1)
    distil: float = Field(default=1.0, ge=0, description="weight of the distance between layers")
    distil_loss: DistilLoss = Field(default="log-sigmoid", description="of the cosine")
    gates_lr: float = Field(default=0.05, gt=0, description="Adam's, of the gates")


class Joint(Trainer):
    """A student whose gates learn with its weights, or, by importance, which is cut already.

    ``dense`` is the whole one, ``start`` what the run begins with. ``UserError`` for a budget that
    cannot be met.
    """

    config: JointConfig

    def __init__(
        self,
        config: JointConfig,
        dense: Student,
        start: Student,
        fabric: Fabric | None = None,
    ) -> None:
        super().__init__(config, fabric, start)
        self.name, self.validates_first = f"{config.student} by {config.by}", False
        self.dense = copy.deepcopy(dense).requires_grad_(False).eval().to(self.device)
        self.budget: Budget | None = None  # by importance: nothing more goes
        if config.by != "importance":
            macs = macs_of(dense.config)
            self.budget = Budget(layout_of(self.student), macs, config.keep_macs, config.steps)
        depths = len(evenly(dense.config.layers))
        ours, theirs = ([one.config.dim] * depths for one in (start, dense))
        self.distil = Distillation(ours, theirs, config.distil_loss)
        own: dict[str, nn.Module] = {"distil": self.distil.to(self.device)}
        maps = list(self.distil.parameters())
        groups: list[dict[str, Any]] = [{"params": maps, "lr": config.lr, "weight_decay": 0.0}]
        if self.budget:
            own["budget"] = self.budget.to(self.device)
            groups += self.budget.groups(config.gates_lr)
        for group in groups:
            self.optimizer.add_param_group(group)
        self.parts = {**self.parts, **own}

    def loss(self, waves_BT: Tensor, mos_B: Tensor) -> Tensor:
        """Squared error, distance of layers, and while the gates are open how far off they are."""
        tensors: dict[str, Tensor] = {}
        if self.budget:
            gates_N = self.budget.of_step(self.step)
            tensors = gated(self.student, self.budget.layout, gates_N)
        with self.fabric.autocast():
            with outputs_of(_points(self.student)) as ours:
                predicted_B = functional_call(self.student, tensors, (waves_BT,))
            loss = functional.mse_loss(predicted_B, mos_B)
            if self.config.distil:
                with torch.no_grad(), outputs_of(_points(self.dense)) as theirs:
                    self.dense(waves_BT)
                loss = loss + self.config.distil * self.distil(ours, theirs)
        return loss + self.budget.loss(self.step) if self.budget else loss

    def score(self, waves_BT: Tensor) -> Tensor:
        """Scores (B,) by the averaged weights, gates without chance."""
        if self.budget is None:
            return super().score(waves_BT)
        tensors = gated(self.average, self.budget.layout, self.budget.after(self.step))
        mos_B: Tensor = functional_call(self.average, tensors, (waves_BT,))
        return mos_B

    def keep(self, metrics: Metrics, out: Path) -> str:
        is_open = self.budget and self.step <= self.budget.settles_at
        return "" if is_open else super().keep(metrics, out)

    def best_model(self) -> dict[str, Any]:
        """What is left of the averaged weights, as a student of its own."""
        if self.budget is None:
            return super().best_model()
        smaller = cut(self.average, self.budget.layout, self.budget.fixed_N)
        return super().best_model() | {
            "student_config": smaller.config.model_dump(),
            "weights": smaller.state_dict(),
        }

    def figures(self) -> dict[str, float]:
        return super().figures() | ({"macs": self.budget.left(self.step)} if self.budget else {})


def of_low_rank(student: Student) -> Student:
    """A student whose convolutions are two each, at no more multiply-adds."""
    if student.config.ranks:
        raise UserError("this student is of low rank already: take --by l0")
    student = copy.deepcopy(student)
    names = [f"convolutions.{2 * number}" for number in range(len(student.config.channels))]
    ranks = tuple(split_layers(student, names).values())
    student.config = student.config.model_copy(update={"ranks": ranks})
    return student


def _points(student: Student) -> list[nn.Module]:
    """The modules whose outputs are compared."""
    modules = [student.head.projection, *student.head.encoder.layers]
    return [modules[depth] for depth in evenly(len(modules) - 1)]
