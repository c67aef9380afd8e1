"""Turn uniform numbers into what a recipe's distributions ask for, a whole range at a time."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from data_specs.distributions import Choice, Constant, Distribution, LogUniform, Normal
from data_specs.io.rng import Floats, stream, unit

DECIMALS = 4
"""Drawn values are rounded so that a libm that differs in the last bit gives the same plan."""


def sample(distribution: Distribution, uniform: Floats) -> Floats:
    """One value of ``distribution`` for each number in [0, 1)."""
    if isinstance(distribution, Constant):
        return np.full(uniform.shape, float(distribution.value))
    if isinstance(distribution, Choice):
        weights = distribution.weights or (1.0,) * len(distribution.values)
        return np.asarray(distribution.values, dtype=np.float64)[pick(weights, uniform)]
    if isinstance(distribution, Normal):
        # The middle of a cell of 2**-53, so that ndtri is never asked for 0.
        return np.round(
            distribution.mean + distribution.sigma * ndtri(uniform + 2.0**-54), DECIMALS
        )
    if isinstance(distribution, LogUniform):
        low, high = np.log(distribution.low), np.log(distribution.high)
        return _significant(np.exp(low + (high - low) * uniform))
    return np.round(distribution.low + (distribution.high - distribution.low) * uniform, DECIMALS)


def pick(weights: tuple[float, ...], uniform: Floats) -> np.ndarray:
    """Index of one of ``weights`` for each number, with probability proportional to the weight."""
    edges = np.cumsum(np.asarray(weights, dtype=np.float64))
    return np.minimum(np.searchsorted(edges, uniform * edges[-1], side="right"), len(weights) - 1)


def number(seed: int, name: str, place: int) -> float:
    """One number in [0, 1), drawn for decision ``name`` of sample ``place``."""
    return float(unit(stream(seed, name, place, 1)[0, :1])[0])


def index(seed: int, name: str, place: int, size: int) -> int:
    """One of ``size``, drawn for decision ``name`` of sample ``place``."""
    return int(number(seed, name, place) * size)


def _significant(values: Floats, digits: int = 6) -> Floats:
    scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values))))
    return np.round(values * scale) / scale
