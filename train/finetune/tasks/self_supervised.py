"""Self-supervision of a conformer, without labels: BEST-RQ (``train.models.best_rq``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from data_specs.io.errors import UserError
from data_specs.labelled import LabelledClip
from train.bootstrap import draws, interval
from train.finetune.tasks.task import Result, SpeechTask, groups_of
from train.loop.loop import Metrics
from train.models.best_rq import STACK, BestRq, Masked
from train.models.encoders.conformer import Conformer
from train.models.encoders.interface import SpeechEncoder, States
from train.models.features import HOP_SAMPLES


class SelfSupervised(SpeechTask):
    """See the module. All clips are its own, whatever labels they have."""

    name, column = "self", "path"

    def __init__(self, width: int, mels: int) -> None:
        super().__init__(width=width, mels=mels)
        self.best_rq = BestRq(width, mels)
        self._masked: Masked | None = None

    @classmethod
    def new(cls, encoder: SpeechEncoder, training: Sequence[LabelledClip]) -> Self:
        if not isinstance(encoder, Conformer) or encoder.config.factor != STACK:
            raise UserError(f"self: trains a conformer with a state for {STACK} frames of 10 ms")
        return cls(encoder.config.width, encoder.config.mels)

    def inputs(
        self, encoder: SpeechEncoder, waves_BT: Tensor, lengths_B: Tensor
    ) -> dict[str, Tensor]:
        """Masked log-mels: while training masked by torch's generator, else always alike."""
        assert isinstance(encoder, Conformer)
        seed = int(torch.randint(1 << 62, ())) if self.training else 0
        draw = torch.Generator().manual_seed(seed)
        mels_BMK = encoder.features(waves_BT)
        self._masked = self.best_rq.mask(mels_BMK, lengths_B // HOP_SAMPLES, draw)
        return {"mels_BMK": self._masked.mels_BMK}

    def _named(self, states: States) -> tuple[Tensor, Tensor, list[int]]:
        """Loss and rightness of every masked code (N,), and how many are each clip's (B)."""
        assert self._masked is not None, "states are of what inputs gave"
        losses_N, right_N = self.best_rq(states.layers[-1], self._masked)
        return losses_N, right_N, self._masked.masked_BS.sum(1).tolist()

    def loss(self, states: States, clips: Sequence[LabelledClip]) -> Tensor:
        """Cross-entropy of the masked codes, nats."""
        return self._named(states)[0].mean()

    def predict(self, states: States) -> list[Any]:
        """Of each clip: sum of the loss, codes named rightly, masked codes."""
        losses_N, right_N, counts = self._named(states)
        sums = [[p.sum().item() for p in values.split(counts)] for values in (losses_N, right_N)]
        return list(zip(*sums, counts, strict=True))

    def measure(self, clips: Sequence[LabelledClip], predicted: Sequence[Any]) -> Metrics:
        loss, right, count = np.sum(predicted, axis=0)
        return {"loss": float(loss / count), "accuracy": float(right / count)}

    def judge(self, clips: Sequence[LabelledClip], predicted: Sequence[Any], seed: int) -> Result:
        """Cross-entropy and accuracy; speakers are drawn."""
        sums_R3 = draws(groups_of(clips), seed) @ np.array(predicted, np.float64)
        drawn_R2 = sums_R3[:, :2] / sums_R3[:, 2:]
        values = self.measure(clips, predicted)
        figures = zip(values.items(), drawn_R2.T, strict=True)
        return {name: interval(value, values_R) for (name, value), values_R in figures}
