"""Keywords: which of the words of the training clips is said. Layers mixed, mean pool, one linear
layer, cross-entropy (s3prl, ``downstream/speech_commands``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.errors import UserError
from data_specs.labelled import LabelledClip
from data_specs.strict import unknown
from train.bootstrap import draws, interval
from train.finetune.tasks.task import LayerMix, Result, SpeechTask, groups_of, mean_over
from train.loop.loop import Metrics
from train.models.encoders.interface import SpeechEncoder, States


class Keywords(SpeechTask):
    """See the module."""

    name, column = "keywords", "keyword"

    def __init__(self, layers: int, dim: int, words: Sequence[str]) -> None:
        super().__init__(layers=layers, dim=dim, words=words)
        self.words = {word: number for number, word in enumerate(words)}
        self.mix, self.output = LayerMix(layers), nn.Linear(dim, len(words))

    @classmethod
    def new(cls, encoder: SpeechEncoder, training: Sequence[LabelledClip]) -> Self:
        words = sorted({str(clip.keyword) for clip in training})
        if len(words) < 2:
            raise UserError(f"keywords: the training clips have one word alone, {words[0]!r}")
        return cls(len(encoder.dims), encoder.dims[-1], words)

    def require(self, clips: Sequence[LabelledClip]) -> None:
        for clip in clips:
            if clip.keyword not in self.words:
                raise UserError(
                    f"{clip.where}: {unknown('keyword', str(clip.keyword), self.words)}"
                )

    def loss(self, states: States, clips: Sequence[LabelledClip]) -> Tensor:
        """Cross-entropy, nats."""
        logits_BW = self._logits(states)
        targets_B = torch.tensor([self.words[str(clip.keyword)] for clip in clips])
        return functional.cross_entropy(logits_BW, targets_B.to(logits_BW.device))

    def _logits(self, states: States) -> Tensor:
        logits_BW: Tensor = self.output(mean_over(self.mix(states), states))
        return logits_BW

    def predict(self, states: States) -> list[Any]:
        """Log-probabilities (W,) of each clip."""
        return list(self._logits(states).log_softmax(1).double().cpu().numpy())

    def measure(self, clips: Sequence[LabelledClip], predicted: Sequence[Any]) -> Metrics:
        right_N, said_N = self._right(clips, predicted)
        return {"loss": float(-said_N.mean()), "accuracy": float(right_N.mean())}

    def judge(self, clips: Sequence[LabelledClip], predicted: Sequence[Any], seed: int) -> Result:
        """Accuracy; speakers are drawn."""
        right_N, _ = self._right(clips, predicted)
        counts_RN = draws(groups_of(clips), seed)
        drawn_R = counts_RN @ right_N / counts_RN.sum(axis=1)
        return {"accuracy": interval(float(right_N.mean()), drawn_R)}

    def _right(self, clips: Sequence[LabelledClip], predicted: Sequence[Any]) -> Any:
        """Which clips are right (N,), and the log-probability of each one's word (N,)."""
        logs_NW = np.stack(predicted)
        words_N = np.array([self.words[str(clip.keyword)] for clip in clips])
        said_N = logs_NW[np.arange(len(clips)), words_N]
        return (logs_NW.argmax(1) == words_N).astype(np.float64), said_N
