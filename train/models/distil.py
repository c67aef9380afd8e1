"""Distillation layer to layer: a student's states, mapped by a linear layer each, to a teacher's.

The loss of a frame is the mean absolute difference and a term of the cosine c: -log sigmoid(c)
(DistilHuBERT, Chang et al. 2022) or 1 - c (DPHuBERT, Peng et al. 2023; there without the 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

DistilLoss = Literal["log-sigmoid", "cosine"]


class Distillation(nn.Module):
    """The maps, the identity at first, and the loss of layers in pairs."""

    def __init__(
        self, student_dims: Iterable[int], teacher_dims: Iterable[int], kind: DistilLoss
    ) -> None:
        super().__init__()
        self.kind = kind
        pairs = zip(student_dims, teacher_dims, strict=True)
        self.maps = nn.ModuleList(nn.Linear(ours, theirs) for ours, theirs in pairs)
        for one in self.maps:
            nn.init.eye_(one.weight)  # type: ignore[arg-type]
            nn.init.zeros_(one.bias)  # type: ignore[arg-type]

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """The mean over layers and frames, of states (B, F, D) and (B, G, E) a layer.

        Only the student's first ``lengths_B`` frames count. A teacher of another frame rate is
        interpolated to the student's. Give it the clean clips and the student the degraded ones,
        and the student learns to be robust (RobustDistiller, Guimaraes et al. 2023).
        """
        losses = []
        for one, ours_BFD, theirs_BGE in zip(self.maps, student, teacher, strict=True):
            mapped_BFE, frames = one(ours_BFD).float(), ours_BFD.shape[1]
            losses.append(self._of_frames(mapped_BFE, _resampled(theirs_BGE.float(), frames)))
        loss_BF = torch.stack(losses).mean(0)
        if lengths_B is None:
            return loss_BF.mean()
        counted_BF = torch.arange(loss_BF.shape[1], device=loss_BF.device) < lengths_B[:, None]
        return (loss_BF * counted_BF).sum() / counted_BF.sum()

    def _of_frames(self, ours_BFE: Tensor, theirs_BFE: Tensor) -> Tensor:
        apart_BF = (ours_BFE - theirs_BFE).abs().mean(-1)
        cosine_BF = functional.cosine_similarity(ours_BFE, theirs_BFE, dim=-1)
        log_sigmoid = self.kind == "log-sigmoid"
        return apart_BF + (-functional.logsigmoid(cosine_BF) if log_sigmoid else 1 - cosine_BF)


def _resampled(states_BGE: Tensor, frames: int) -> Tensor:
    if states_BGE.shape[1] == frames:
        return states_BGE
    return functional.interpolate(states_BGE.mT, frames, mode="linear").mT


def evenly(layers: int) -> list[int]:
    """Up to four depths, 0 (what the first layer reads) to ``layers``, as DPHuBERT takes them."""
    return sorted({round(layers * third / 3) for third in range(4)})


@contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what modules give, in the order in which they are called."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        found.append(output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
