"""Correlation and error between predicted and true scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Agreement:
    """How well predictions agree with the truth over one set of clips.

    ``pcc`` and ``spearman`` are None where they are not defined; ``reason`` then says why.
    """

    clips: int
    pcc: float | None
    spearman: float | None
    rmse: float | None
    reason: str | None = None


def agreement(truth: ArrayLike, predicted: ArrayLike) -> Agreement:
    """Pearson and Spearman correlation and root mean squared error; MOS units.

    ``ValueError`` for different lengths. Non-finite values are a fault of the caller.
    """
    truth_B = np.asarray(truth, np.float64)
    predicted_B = np.asarray(predicted, np.float64)
    if truth_B.shape != predicted_B.shape:
        raise ValueError(f"{len(predicted_B)} predictions for {len(truth_B)} true scores")
    clips = len(truth_B)
    if not clips:
        return Agreement(0, None, None, None, "no clips")
    rmse = float(np.sqrt(np.mean((truth_B - predicted_B) ** 2)))
    reason = _undefined(truth_B, predicted_B)
    if reason:
        return Agreement(clips, None, None, rmse, reason)
    pcc = float(scipy.stats.pearsonr(truth_B, predicted_B).statistic)
    spearman = float(scipy.stats.spearmanr(truth_B, predicted_B).statistic)
    return Agreement(clips, pcc, spearman, rmse)


def _undefined(truth_B: NDArray[np.float64], predicted_B: NDArray[np.float64]) -> str | None:
    if len(truth_B) < 2:
        return "fewer than two clips"
    if np.ptp(truth_B) == 0:
        return "the true scores are all equal"
    if np.ptp(predicted_B) == 0:
        return "the predictions are all equal"
    return None
