"""Speakers: clips to embeddings, trials scored by cosine. Layers mixed, mean and deviation over
time, batch norm, one linear layer, additive-margin softmax over the training speakers (s3prl,
``sv_voxceleb1``: scale 30, margin .4; the norm is ECAPA-TDNN's)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.errors import UserError
from data_specs.labelled import LabelledClip
from train.bootstrap import Doubles, interval
from train.finetune.tasks.task import LayerMix, Result, SpeechTask, mean_over
from train.finetune.tasks.trials import Trials, drawn, errors, trials_of
from train.loop.loop import Metrics
from train.models.encoders.interface import SpeechEncoder, States

SCALE, MARGIN = 30.0, 0.4
WIDTH = 192
"""Of an embedding."""

VARIANCE_FLOOR = 1e-5


class Speakers(SpeechTask):
    """See the module."""

    name, column = "speakers", "speaker"

    def __init__(self, layers: int, dim: int, speakers: Sequence[str]) -> None:
        super().__init__(layers=layers, dim=dim, speakers=speakers)
        self.speakers = {speaker: number for number, speaker in enumerate(speakers)}
        self.mix = LayerMix(layers)
        # All clips have most of their mean in common: without the norm 200 steps over Whisper's
        # states leave an equal error rate of .28, with it .06.
        self.output = nn.Sequential(nn.BatchNorm1d(2 * dim), nn.Linear(2 * dim, WIDTH))
        # Short: only their direction counts, and a step of Adam turns a long one by little.
        self.centres_SE = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(speakers), WIDTH)))
        self.pairs: Sequence[tuple[Path, Path]] | None = None
        """Of the test split (``read_trials``); without them every pair is a trial."""

    @classmethod
    def new(cls, encoder: SpeechEncoder, training: Sequence[LabelledClip]) -> Self:
        speakers = sorted({str(clip.speaker) for clip in training})
        if len(speakers) < 2:
            raise UserError(f"speakers: the training clips have one alone, {speakers[0]!r}")
        return cls(len(encoder.dims), encoder.dims[-1], speakers)

    def require(self, clips: Sequence[LabelledClip]) -> None:
        """``UserError`` where clips make no trials, or a list names others than the test clips."""
        if clips[0].split != "test":
            trials_of(clips)
            return
        known = {clip.path for clip in clips}
        for path in {path for pair in self.pairs or () for path in pair} - known:
            raise UserError(f"a trial names {path}, which is no clip of the split 'test'")
        for dataset in {clip.dataset for clip in clips}:
            trials_of([clip for clip in clips if clip.dataset == dataset], self.pairs)

    def embeddings(self, states: States) -> Tensor:
        """(B, E), of length 1."""
        mixed_BFD = self.mix(states)
        mean_BD = mean_over(mixed_BFD, states)
        variance_BD = mean_over((mixed_BFD - mean_BD[:, None]).square(), states)
        deviation_BD = (variance_BD + VARIANCE_FLOOR).sqrt()
        return functional.normalize(self.output(torch.cat([mean_BD, deviation_BD], 1)), dim=1)

    def loss(self, states: States, clips: Sequence[LabelledClip]) -> Tensor:
        """Cross-entropy of 30 (cosine - .4 for a clip's own speaker), nats."""
        if len(clips) < 2:
            raise UserError("speakers: --batch must be 2 or more: a batch is normalised by itself")
        cosines_BS = self.embeddings(states) @ functional.normalize(self.centres_SE, dim=1).T
        own_B = torch.tensor([self.speakers[str(clip.speaker)] for clip in clips])
        own_B = own_B.to(cosines_BS.device)
        margins_BS = MARGIN * functional.one_hot(own_B, len(self.speakers))
        return functional.cross_entropy(SCALE * (cosines_BS - margins_BS), own_B)

    def predict(self, states: States) -> list[Any]:
        """An embedding (E,) of each clip."""
        return list(self.embeddings(states).double().cpu().numpy())

    def measure(self, clips: Sequence[LabelledClip], predicted: Sequence[Any]) -> Metrics:
        """Equal error rate (also the loss) and smallest cost over every pair."""
        trials = trials_of(clips)
        once = np.ones((1, len(trials.first)))
        rate_1, cost_1 = errors(_cosines(trials, predicted), trials.is_target, once)
        return {"loss": float(rate_1[0]), "eer": float(rate_1[0]), "min_dcf": float(cost_1[0])}

    def judge(self, clips: Sequence[LabelledClip], predicted: Sequence[Any], seed: int) -> Result:
        """Equal error rate and smallest cost of the trials; speakers are drawn."""
        trials = trials_of(clips, self.pairs)
        scores_N, counts_RN = _cosines(trials, predicted), drawn(trials, clips, seed)
        values = errors(scores_N, trials.is_target, np.ones((1, len(scores_N))))
        resampled = errors(scores_N, trials.is_target, counts_RN)
        figures = zip(("eer", "min_dcf"), values, resampled, strict=True)
        return {name: interval(float(value[0]), drawn_R) for name, value, drawn_R in figures}


def _cosines(trials: Trials, embeddings: Sequence[Any]) -> Doubles:
    table_CE = np.stack(embeddings)
    cosines_N: Doubles = np.einsum("ne,ne->n", table_CE[trials.first], table_CE[trials.second])
    return cosines_N
