"""The universal scale of a bias-aware teacher: found here, applied by ``Calibration``.

During training every dataset has its own scale and shift of the logit z. Afterwards one scale and
shift for all is chosen, so that ``1 + 4 * sigmoid(scale * z + shift)`` errs least over the clips of
all validation sets (section IV-A: grid search; here the best grid point is refined).
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from data_specs.io.errors import UserError
from train.models.calibration import Affine, Doubles

GRID_SCALES = np.geomspace(0.05, 10, 47)
GRID_SHIFTS = np.linspace(-5, 5, 41)
"""Of logits brought to mean 0 and variance 1. A scale of 10 is a step from 1 to 5."""


def squared_error(affine: Affine, logits_N: ArrayLike, mos_N: ArrayLike) -> float:
    """Mean squared error in MOS over clips, of raw logits under an affine map."""
    return float(np.mean((affine.mos(logits_N) - np.asarray(mos_N, np.float64)) ** 2))


def fit_universal(logits_N: ArrayLike, mos_N: ArrayLike) -> Affine:
    """The one scale and shift under which raw logits err least over all these clips.

    Every clip counts the same, whichever set it is from. ``logits_N`` (N,) are those before any
    dataset's scale; ``mos_N`` (N,) are ratings, 1 to 5. ``ValueError`` for different lengths, for
    values not finite, or if all logits are the same.
    """
    logits, mos = np.asarray(logits_N, np.float64), np.asarray(mos_N, np.float64)
    if logits.shape != mos.shape or logits.ndim != 1:
        raise ValueError(f"logits of shape {logits.shape} for ratings of shape {mos.shape}")
    if not np.isfinite(logits).all() or not np.isfinite(mos).all():
        raise ValueError("a universal scale needs logits and ratings that are finite")
    if not len(logits) or np.ptp(logits) == 0:
        raise UserError("a universal scale needs clips with at least two different logits")
    centre, spread = float(logits.mean()), float(logits.std())
    scale, shift = _least_error((logits - centre) / spread, mos)
    return Affine(scale=scale / spread, shift=shift - scale * centre / spread)


def _least_error(standard_N: Doubles, mos_N: Doubles) -> tuple[float, float]:
    """The best point of the grid, refined downhill in (log scale, shift): scales stay positive."""

    def error(scale: float, shift: float) -> float:
        return squared_error(Affine(scale=scale, shift=shift), standard_N, mos_N)

    scale, shift = min(product(GRID_SCALES, GRID_SHIFTS), key=lambda point: error(*point))
    # Ratings against the logits' order drive the scale to 0 without end: it stops at e^-10.
    found = minimize(
        lambda point: error(np.exp(point[0]), point[1]),
        np.array([np.log(scale), shift]),
        method="Nelder-Mead",
        bounds=[(-10, 10), (-50, 50)],
        options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 2000},
    )
    return float(np.exp(found.x[0])), float(found.x[1])
