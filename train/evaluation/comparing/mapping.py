"""RMSE after a monotone third-order map of the scores (ITU-T P.1401).

A scorer may be right up to its scale: before the error is taken, its scores go through the
polynomial of third order that fits the ratings best and never falls between the lowest and the
highest score. The error is divided by N - 4, for the map has four coefficients (P.1401, equation
7-29).

The fit is exact, without an iterative solver. With scores t on -1 to 1, the polynomial's slope is a
quadratic that must not be negative there. Least squares under that condition has its minimum where
the unconstrained one is, if that rises everywhere, or on the border: slopes that touch zero at an
end (sums of (1+t)^2 or (1-t)^2 with 1-t^2) or inside, at r (multiples of (t-r)^2). Each of these
is linear least squares, the last one over r in addition. All of them depend on the clips through a
few moments alone, so 2000 resamples cost little more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_specs.io.errors import UserError

Doubles = NDArray[np.float64]

FREEDOM = 4
"""Coefficients of the map."""

ROOTS = np.linspace(-1, 1, 129)
NARROWINGS = 60
"""Steps of the search for r inside a cell of ``ROOTS``, each by a third: to rounding."""

ROUNDING = 1e-12

# Slopes that touch zero at an end, by what they integrate to: coefficients of t, t^2, t^3.
_FROM_LOW = (1.0, 1.0, 1 / 3)  # (1 + t)^2
_FROM_HIGH = (1.0, -1.0, 1 / 3)  # (1 - t)^2
_BOTH = (1.0, 0.0, -1 / 3)  # (1 + t)(1 - t)
_CONES = (
    np.array([_FROM_LOW, _BOTH]),
    np.array([_FROM_HIGH, _BOTH]),
    np.array([_FROM_LOW]),
    np.array([_FROM_HIGH]),
    np.array([_BOTH]),
)


@dataclass(frozen=True)
class _Moments:
    """Of the resamples: means (R, 3) and covariances (R, 3, 3) of t, t^2, t^3; with y (R, 3)."""

    powers_R3: Doubles
    covariance_R33: Doubles
    with_truth_R3: Doubles
    truth_R: Doubles
    variance_R: Doubles
    clips_R: Doubles


@dataclass(frozen=True)
class CubicMap:
    """A third-order polynomial of scores between ``low`` and ``high``; coefficients (4,) of t."""

    low: float
    high: float
    coefficients: Doubles

    def __call__(self, scores: ArrayLike) -> Doubles:
        """Mapped scores, of the same shape; meant for scores between ``low`` and ``high``."""
        t = _scaled(np.asarray(scores, np.float64), self.low, self.high)
        return np.asarray(np.polynomial.polynomial.polyval(t, self.coefficients), np.float64)


def fit_map(truth: ArrayLike, score: ArrayLike) -> CubicMap:
    """The best monotone third-order map of scores (N,) to ratings (N,).

    ``ValueError`` for fewer than four different scores: they do not say what the map is.
    """
    truth_N, score_N = np.asarray(truth, np.float64), np.asarray(score, np.float64)
    if len(np.unique(score_N)) < FREEDOM:
        raise UserError("fewer than four different scores: a third-order map needs four")
    moments = _moments(np.ones((1, len(truth_N))), truth_N, score_N)
    slopes_R3, _ = _best(moments)
    constant = moments.truth_R[0] - moments.powers_R3[0] @ slopes_R3[0]
    coefficients = np.array([constant, *slopes_R3[0]])
    return CubicMap(float(score_N.min()), float(score_N.max()), coefficients)


def rmse_mapped(truth: ArrayLike, score: ArrayLike) -> float | None:
    """RMSE after the map, over N - 4; None for N below 5 or fewer than four different scores."""
    truth_N, score_N = np.asarray(truth, np.float64), np.asarray(score, np.float64)
    if len(truth_N) <= FREEDOM or len(np.unique(score_N)) < FREEDOM:
        return None
    errors_N = truth_N - fit_map(truth_N, score_N)(score_N)
    return float(np.sqrt(np.sum(errors_N**2) / (len(truth_N) - FREEDOM)))


def resampled_rmse_mapped(counts_RN: Doubles, truth: ArrayLike, score: ArrayLike) -> Doubles:
    """``rmse_mapped`` in every resample (R,), fitted anew; NaN where it is not defined.

    The map has to rise between the lowest and highest score of all clips, also of those that a
    resample lacks.
    """
    truth_N, score_N = np.asarray(truth, np.float64), np.asarray(score, np.float64)
    _, place_N = np.unique(score_N, return_inverse=True)
    if place_N.max(initial=0) < FREEDOM - 1:
        return np.full(len(counts_RN), np.nan)
    order_N = np.argsort(place_N, kind="stable")
    first = np.searchsorted(place_N[order_N], np.arange(place_N.max() + 1))
    different_R = np.sum(np.add.reduceat(counts_RN[:, order_N], first, axis=1) > 0, axis=1)
    moments = _moments(counts_RN, truth_N, score_N)
    _, gain_R = _best(moments)
    left_R = np.maximum(moments.variance_R - gain_R, 0) * moments.clips_R
    free_R = moments.clips_R - FREEDOM
    defined_R = (different_R >= FREEDOM) & (free_R > 0)
    return np.where(defined_R, np.sqrt(left_R / np.where(defined_R, free_R, 1)), np.nan)


def _scaled(score: Doubles, low: float, high: float) -> Doubles:
    return 2 * (score - low) / (high - low) - 1


def _moments(counts_RN: Doubles, truth_N: Doubles, score_N: Doubles) -> _Moments:
    t_N = _scaled(score_N, float(score_N.min()), float(score_N.max()))
    powers_N3 = np.stack([t_N, t_N**2, t_N**3], axis=1)
    clips_R = counts_RN.sum(axis=1)
    weights_RN = counts_RN / clips_R[:, None]
    # About the whole set's means: little is lost when the resample's own are taken off.
    powers_N3 = powers_N3 - (centre_3 := powers_N3.mean(axis=0))
    truth_N = truth_N - (level := float(truth_N.mean()))
    products_N33 = powers_N3[:, :, None] * powers_N3[:, None, :]
    means_R3, truth_R = weights_RN @ powers_N3, weights_RN @ truth_N
    squares_R33 = (weights_RN @ products_N33.reshape(-1, 9)).reshape(-1, 3, 3)
    return _Moments(
        means_R3 + centre_3,
        squares_R33 - means_R3[:, :, None] * means_R3[:, None, :],
        weights_RN @ (powers_N3 * truth_N[:, None]) - means_R3 * truth_R[:, None],
        truth_R + level,
        weights_RN @ truth_N**2 - truth_R**2,
        clips_R,
    )


def _best(moments: _Moments) -> tuple[Doubles, Doubles]:
    """Coefficients of t, t^2, t^3 (R, 3), and by how much they lower the mean square error (R,)."""
    slopes_R3 = np.zeros_like(moments.with_truth_R3)  # a constant: always allowed
    gain_R = np.zeros(len(slopes_R3))
    for candidate_R3 in _candidates(moments):
        found_R = _gain(moments, candidate_R3)
        better_R = found_R > gain_R
        slopes_R3[better_R], gain_R[better_R] = candidate_R3[better_R], found_R[better_R]
    return slopes_R3, gain_R


def _candidates(moments: _Moments) -> list[Doubles]:
    """Polynomials that rise; those that do not are replaced by zero."""
    free_R3 = _least_squares(moments, np.eye(3))
    found = [np.where(_rises(free_R3)[:, None], free_R3, 0.0)]
    for basis_K3 in _CONES:
        weights_RK = _least_squares(moments, basis_K3)
        inside_R = np.all(weights_RK >= 0, axis=1)
        found.append(np.where(inside_R[:, None], weights_RK @ basis_K3, 0.0))
    return [*found, _touching_inside(moments)]


def _least_squares(moments: _Moments, basis_K3: Doubles) -> Doubles:
    """Weights (R, K) of the basis' polynomials."""
    normal_RKK = basis_K3 @ moments.covariance_R33 @ basis_K3.T
    right_RK = moments.with_truth_R3 @ basis_K3.T
    inverse_RKK = np.linalg.pinv(normal_RKK, rcond=1e-13, hermitian=True)
    weights_RK: Doubles = np.einsum("rij,rj->ri", inverse_RKK, right_RK)
    return weights_RK


def _rises(slopes_R3: Doubles) -> NDArray[np.bool_]:
    """Whether the derivative a + 2 b t + 3 c t^2 is at least zero everywhere on -1 to 1."""
    a_R, b_R, c_R = slopes_R3.T
    ends_R = np.minimum(a_R + 3 * c_R - 2 * b_R, a_R + 3 * c_R + 2 * b_R)
    bowl_R = 3 * c_R > np.abs(b_R)  # its lowest point lies inside
    bottom_R = a_R - b_R**2 / np.where(bowl_R, 3 * c_R, 1.0)
    lowest_R = np.where(bowl_R, np.minimum(ends_R, bottom_R), ends_R)
    rises: NDArray[np.bool_] = lowest_R >= -ROUNDING * np.abs(slopes_R3).max(axis=1)
    return rises


def _touching_inside(moments: _Moments) -> Doubles:
    """The best multiple of the polynomial whose slope is (t - r)^2, over r."""
    tried = np.stack([_gain(moments, _multiple(moments, root)) for root in ROOTS], axis=1)
    middle_R = ROOTS[np.argmax(tried, axis=1)]
    step = ROOTS[1] - ROOTS[0]
    low_R, high_R = np.maximum(middle_R - step, -1), np.minimum(middle_R + step, 1)
    for _ in range(NARROWINGS):
        one_R, two_R = (2 * low_R + high_R) / 3, (low_R + 2 * high_R) / 3
        left_R = _gain(moments, _multiple(moments, one_R))
        right_R = _gain(moments, _multiple(moments, two_R))
        low_R, high_R = (
            np.where(left_R < right_R, one_R, low_R),
            np.where(left_R < right_R, high_R, two_R),
        )
    return _multiple(moments, (low_R + high_R) / 2)


def _multiple(moments: _Moments, root: ArrayLike) -> Doubles:
    root_R = np.broadcast_to(np.asarray(root, np.float64), moments.truth_R.shape)
    basis_R3 = np.stack([root_R**2, -root_R, np.full_like(root_R, 1 / 3)], axis=1)
    spread_R = np.einsum("ri,rij,rj->r", basis_R3, moments.covariance_R33, basis_R3)
    along_R = np.einsum("ri,ri->r", basis_R3, moments.with_truth_R3)
    usable_R = (along_R > 0) & (spread_R > 0)
    times_R = np.where(usable_R, along_R / np.where(usable_R, spread_R, 1), 0.0)
    return times_R[:, None] * basis_R3


def _gain(moments: _Moments, slopes_R3: Doubles) -> Doubles:
    """By how much a polynomial lowers the mean square error, against the mean rating (R,)."""
    spread_R = np.einsum("ri,rij,rj->r", slopes_R3, moments.covariance_R33, slopes_R3)
    gain_R: Doubles = 2 * np.einsum("ri,ri->r", slopes_R3, moments.with_truth_R3) - spread_R
    return gain_R
