"""RMSE after a monotone third-order map of the scores (ITU-T P.1401).

A scorer may be right up to its scale: before the error is taken, its scores go through the
polynomial of third order that fits the ratings best and never falls between the lowest and the
highest score. The error is divided by N - 4, for the map has four coefficients (equation 7-29).

With scores t on -1 to 1 a polynomial rises where its slope is a sum, with weights of zero or more,
of 1 - t^2 and of squares (t - r)^2 with r on -1 to 1: non-negative least squares
(``scipy.optimize.nnls``) over such slopes, r on a grid that is made finer where weights are. SLSQP
takes some five times as long, and every interval asks for 2000 maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.optimize
from numpy.typing import ArrayLike

from train.bootstrap import VALUES_AT_ONCE, Doubles, tied

FREEDOM = 4
"""Coefficients of the map."""

GRID = np.linspace(-1, 1, 33)
FINER = np.linspace(-1, 1, 9)
"""Steps of the last grid around every r with a weight, which the next grid tries."""

SEARCHES = 4
"""Grids in all: the last one's r is right to about 1e-3, and the error to about 1e-7 MOS."""

EXACT = 1e-12
"""What a fit may leave, relative to the ratings, and be called the unconstrained optimum."""


@dataclass(frozen=True)
class CubicMap:
    """A third-order polynomial of scores between ``low`` and ``high``; coefficients (4,) of t."""

    low: float
    high: float
    coefficients: Doubles

    def __call__(self, scores: ArrayLike) -> Doubles:
        """Mapped scores, of the same shape; meant for scores between ``low`` and ``high``."""
        t = 2 * (np.asarray(scores, np.float64) - self.low) / (self.high - self.low) - 1
        return np.asarray(np.polynomial.polynomial.polyval(t, self.coefficients), np.float64)


def fit_map(truth: ArrayLike, score: ArrayLike) -> CubicMap | None:
    """The best monotone third-order map of scores (N,) to ratings (N,).

    None for less than five points or four different scores: they do not say what the map is.
    """
    score_N = np.asarray(score, np.float64)
    if len(score_N) <= FREEDOM or len(np.unique(score_N)) < FREEDOM:
        return None
    table_N4 = _powers(np.asarray(truth, np.float64), score_N)
    means_4 = table_N4.mean(axis=0)
    slopes_3, _ = _rising(_triangles(np.ones((1, len(score_N))), table_N4)[0])
    coefficients = np.array([means_4[3] - means_4[:3] @ slopes_3, *slopes_3])
    return CubicMap(float(score_N.min()), float(score_N.max()), coefficients)


def rmse_mapped(truth: ArrayLike, score: ArrayLike) -> float | None:
    """RMSE after the map, over N - 4; None where there is none."""
    mapped = fit_map(truth, score)
    if mapped is None:
        return None
    errors_N = np.asarray(truth, np.float64) - mapped(score)
    return float(np.sqrt(np.sum(errors_N**2) / (len(errors_N) - FREEDOM)))


def resampled_rmse_mapped(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    """``rmse_mapped`` in every resample (R,), fitted anew; NaN where it is not defined.

    The map has to rise between the lowest and highest score of all clips, also of those that a
    resample lacks.
    """
    different_R = np.sum(tied(counts_RN, score)[0] > 0, axis=1)
    free_R = counts_RN.sum(axis=1) - FREEDOM
    defined_R = (different_R >= FREEDOM) & (free_R > 0)
    found_R = np.full(len(counts_RN), np.nan)
    if not defined_R.any():
        return found_R
    table_N4 = _powers(np.asarray(truth, np.float64), np.asarray(score, np.float64))
    kept_RN = counts_RN[defined_R]
    left = [
        _rising(triangle_44)[1]
        for part_RN in np.array_split(kept_RN, 1 + 4 * kept_RN.size // VALUES_AT_ONCE)
        for triangle_44 in _triangles(part_RN, table_N4)
    ]
    found_R[defined_R] = np.array(left) / np.sqrt(free_R[defined_R])
    return found_R


def _powers(truth_N: Doubles, score_N: Doubles) -> Doubles:
    """t, t^2, t^3 and the rating of every clip (N, 4)."""
    t_N = 2 * (score_N - score_N.min()) / np.ptp(score_N) - 1
    return np.stack([t_N, t_N**2, t_N**3, truth_N], axis=1)


def _triangles(counts_RN: Doubles, table_N4: Doubles) -> Doubles:
    """The table of every resample about its means, as the triangle of its QR (R, 4, 4)."""
    means_R4 = counts_RN @ table_N4 / counts_RN.sum(axis=1, keepdims=True)
    centred_RN4 = np.sqrt(counts_RN)[:, :, None] * (table_N4 - means_R4[:, None, :])
    return np.asarray(np.linalg.qr(centred_RN4, mode="r"), np.float64)


def _rising(triangle_44: Doubles) -> tuple[Doubles, float]:
    """Coefficients of t, t^2, t^3 (3,) of the best map, and the root of its squared errors."""
    least = EXACT * float(np.abs(triangle_44[:, 3]).max()) + abs(float(triangle_44[3, 3]))
    roots, step = GRID, float(GRID[1] - GRID[0])
    for search in range(SEARCHES):
        basis_3K = np.stack([roots**2, -roots, np.full_like(roots, 1 / 3)])
        basis_3K = np.column_stack([(1, 0, -1 / 3), basis_3K])
        weights_K, left = scipy.optimize.nnls(triangle_44[:, :3] @ basis_3K, triangle_44[:, 3])
        used = roots[weights_K[1:] > 0]
        if left <= least * (1 + EXACT) or not len(used) or search == SEARCHES - 1:
            break
        roots = np.clip(used[:, None] + step * FINER, -1, 1).ravel()
        step *= float(FINER[1] - FINER[0])
    return basis_3K @ weights_K, float(left)
