"""Quality: mean opinion scores, by the head of section IV-A over the mixed layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_specs.labelled import LabelledClip
from train.bootstrap import draws, interval, pearson, rmse
from train.finetune.tasks.task import LayerMix, Result, SpeechTask, groups_of
from train.loop.loop import Metrics, errors_of
from train.metrics import agreement
from train.models.encoders.interface import SpeechEncoder, States
from train.models.front_end import centre_crop
from train.models.head import HeadConfig, build_head
from train.models.student import mos_of


class Quality(SpeechTask):
    """See the module. It hears the middle 384 frames of a clip, zeros behind a shorter one."""

    name, column = "quality", "mos"

    def __init__(self, layers: int, head: Mapping[str, Any]) -> None:
        config = HeadConfig.model_validate(head)
        super().__init__(layers=layers, head=config.model_dump())
        self.mix, self.head = LayerMix(layers), build_head(config)

    @classmethod
    def new(cls, encoder: SpeechEncoder, training: Sequence[LabelledClip]) -> Self:
        return cls(len(encoder.dims), {"features": encoder.dims[-1]})

    def _mos(self, states: States) -> Tensor:
        mixed_BFD, lengths = self.mix(states), states.lengths_B.tolist()
        heard = [centre_crop(m[None, :n]) for m, n in zip(mixed_BFD, lengths, strict=True)]
        return mos_of(self.head(torch.cat(heard)))

    def loss(self, states: States, clips: Sequence[LabelledClip]) -> Tensor:
        """Mean squared error, MOS squared."""
        predicted_B = self._mos(states)
        truth_B = torch.tensor([float(clip.mos or 0) for clip in clips])
        return functional.mse_loss(predicted_B, truth_B.to(predicted_B.device))

    def predict(self, states: States) -> list[Any]:
        return self._mos(states).double().tolist()

    def measure(self, clips: Sequence[LabelledClip], predicted: Sequence[Any]) -> Metrics:
        return errors_of(np.array([clip.mos for clip in clips], np.float64), predicted)

    def judge(self, clips: Sequence[LabelledClip], predicted: Sequence[Any], seed: int) -> Result:
        """Pearson's correlation and root mean squared error; conditions are drawn, or speakers."""
        truth = np.array([clip.mos for clip in clips], np.float64)
        found = agreement(truth, predicted)
        conditions = [clip.condition for clip in clips]
        groups = [str(c) for c in conditions] if all(conditions) else groups_of(clips)
        counts_RN = draws(groups, seed)
        return {
            "pcc": interval(found.pcc, pearson(counts_RN, truth, predicted)),
            "rmse": interval(found.rmse, rmse(counts_RN, truth, predicted)),
        }
