"""What a task is: labels of clips to a loss, states of an encoder to predictions and to figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from data_specs.labelled import LabelledClip
from train.bootstrap import Interval
from train.loop.loop import Metrics
from train.models.encoders.interface import SpeechEncoder, States

Result = dict[str, Interval]
"""What a task is judged by on the clips of one dataset, by name."""


class SpeechTask(nn.Module, ABC):
    """A head over an encoder's states, learned with it. One file, one line in the table.

    ``column`` is the label that its clips have; ``about`` what its class needs to make the head
    again, as JSON. A new task is given the training clips, to count its classes.
    """

    name: ClassVar[str]
    column: ClassVar[str]

    def __init__(self, **about: Any) -> None:
        super().__init__()
        self.about = about

    @classmethod
    @abstractmethod
    def new(cls, encoder: SpeechEncoder, training: Sequence[LabelledClip]) -> Self:
        """A fresh head. ``UserError`` where these clips do not make a task."""

    def require(self, clips: Sequence[LabelledClip]) -> None:
        """``UserError`` naming the first clip to judge by whose label cannot be judged."""

    def inputs(
        self, encoder: SpeechEncoder, waves_BT: Tensor, lengths_B: Tensor
    ) -> dict[str, Tensor]:
        """What the encoder is called with beside the waves."""
        return {}

    @abstractmethod
    def loss(self, states: States, clips: Sequence[LabelledClip]) -> Tensor:
        """What an update lowers, a scalar."""

    @abstractmethod
    def predict(self, states: States) -> list[Any]:
        """What the head says of each clip."""

    @abstractmethod
    def measure(self, clips: Sequence[LabelledClip], predicted: Sequence[Any]) -> Metrics:
        """Validation: ``loss``, which the best model has the lowest of, and whatever else."""

    @abstractmethod
    def judge(self, clips: Sequence[LabelledClip], predicted: Sequence[Any], seed: int) -> Result:
        """Test: every figure with its interval."""

    def rows(self, clips: Sequence[LabelledClip], predicted: Sequence[Any]) -> list[dict[str, str]]:
        """What is kept of each test clip, for a CSV file; none: nothing."""
        return []


class LayerMix(nn.Module):
    """The weighted sum of an encoder's states, weights learned (s3prl): ``States`` -> (B, F, D).

    Each state has its layer norm without weights first, so that loud layers do not decide alone.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights_K = nn.Parameter(torch.zeros(layers))

    def forward(self, states: States) -> Tensor:
        mixed: Tensor = torch.zeros(())
        for weight, layer_BFD in zip(self.weights_K.softmax(0), states.layers, strict=True):
            mixed = mixed + weight * nn.functional.layer_norm(layer_BFD, layer_BFD.shape[-1:])
        return mixed


def mean_over(x_BFD: Tensor, states: States) -> Tensor:
    """The mean over each clip's own frames: (B, D)."""
    valid_BF1 = states.valid()[..., None].to(x_BFD.device)
    return x_BFD.masked_fill(~valid_BF1, 0).sum(1) / valid_BF1.sum(1)


def groups_of(clips: Sequence[LabelledClip]) -> list[str]:
    """What a bootstrap draws: speakers, where every clip names one, else clips."""
    if all(clip.speaker for clip in clips):
        return [str(clip.speaker) for clip in clips]
    return [str(clip.path) for clip in clips]
