"""Task ``quality``: a student's scores against people's, or against its own before compression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from data_specs.io.errors import UserError
from train.audio import Wave
from train.bootstrap import Doubles, pearson, rmse
from train.export.int8 import calibrated, write_int8
from train.export.onnx_file import require_packages, write_onnx
from train.files import version
from train.models.bits import megabytes
from train.models.loading import find_student
from train.models.student import Student
from train.pruning.masks import prunable
from train.robustness.interface import Clip, Judged, Metric, Values
from train.scoring.base import Scorer
from train.scoring.onnx_scorer import Facts, OnnxScorer
from train.scoring.scorer import StudentScorer

FEWEST = 3
"""Clips of which a correlation says anything: two are always on a line."""


def _pcc(counts_RN: Doubles, truth_N: Doubles, values: Values) -> Doubles:
    found_R = pearson(counts_RN, truth_N, values["mos"])
    return np.where((counts_RN > 0).sum(1) < FEWEST, np.nan, found_R)


def _rmse(counts_RN: Doubles, truth_N: Doubles, values: Values) -> Doubles:
    return rmse(counts_RN, truth_N, values["mos"])


class Quality(Judged):
    """A student; RMSE in MOS."""

    metrics: ClassVar = {"PCC": Metric(-1, _pcc), "RMSE": Metric(1, _rmse)}
    columns: ClassVar = ("mos",)
    network: Student

    def __init__(self, model: str, device: str) -> None:
        self.network, self.weights_sha256 = find_student(model)
        self.network.requires_grad_(True)
        self.names, self.resampler = prunable(self.network), self.network.config.resampler
        self.name, self.device = model, device
        self._scored_by(StudentScorer(self.network, model, self.weights_sha256, device))
        self.megabytes = megabytes(self.network)

    def _scored_by(self, scorer: Scorer) -> None:
        self.scorer, self.version = scorer, scorer.version

    def prepare(self, clips: Sequence[Clip]) -> None:
        """Nothing: a score needs the clip alone."""

    def judge(self, clips: Sequence[Clip]) -> Iterator[dict[str, float]]:
        for found in self.scorer.score_files([clip.path for clip in clips]):
            if found.mos is None:
                raise UserError(found.error)
            yield {"mos": found.mos}

    def influence(self, wave_T: Wave) -> Tensor:
        logit: Tensor = self.network.logits(torch.from_numpy(wave_T)[None].to(self.device)).sum()
        return logit

    def hear(self, wave_T: Wave) -> None:
        self.scorer.score_windows([wave_T])

    def int8(self, waves: Sequence[Wave], folder: Path) -> Judged:
        """The student as ``python -m train export --int8`` writes it: its convolutions in int8."""
        require_packages()
        made = Quality(self.name, "cpu")
        files = [folder / "model.onnx", folder / "model.int8.onnx"]
        facts = Facts(
            model=Path(self.name).name,
            weights_sha256=self.weights_sha256,
            version=version(),
            precision="int8",
            padding=self.network.config.padding,
            resampler=self.resampler,
        )
        write_onnx(files[0], made.network, facts)
        self.megabytes = files[0].stat().st_size / 1e6
        write_int8(files[1], files[0], calibrated(made.network, waves), waves[0], facts)
        made._scored_by(OnnxScorer(files[1], torch.get_num_threads()))
        made.megabytes = files[1].stat().st_size / 1e6
        return made
