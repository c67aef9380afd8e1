"""Samples in memory as scoring takes them: float32 of one channel, and a rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_specs.io.errors import UserError
from train.audio import Wave

Samples = NDArray[Any] | Tensor

FULL_SCALE = {np.dtype(np.int16): 2.0**15, np.dtype(np.int32): 2.0**31}
"""What whole numbers are divided by."""


def as_wave(wave: Samples, where: str = "wave") -> Wave:
    """Return samples (T,) as float32: floats as they are, int16 and int32 divided by full scale.

    Of any byte order and, of a tensor, on any device. ``UserError`` naming ``where`` for other
    types. Shape and values are for ``train.audio.check_wave``.
    """
    array = _array(wave, where)
    dtype = array.dtype.newbyteorder("=")
    if dtype in FULL_SCALE:
        return (array / FULL_SCALE[dtype]).astype(np.float32)
    if dtype.kind != "f" and dtype.name != "bfloat16":  # which NumPy knows from other packages
        raise UserError(f"{where}: samples of type {dtype}: give floats, int16 or int32")
    with np.errstate(over="ignore"):  # what is too large for float32 is then not finite
        return np.asarray(array, np.float32, order="C")


def _array(wave: Samples, where: str) -> NDArray[Any]:
    try:
        if not isinstance(wave, Tensor):
            return np.asarray(wave)
        floats = wave.is_floating_point() and wave.dtype != torch.float64
        return (wave.float() if floats else wave).numpy(force=True)  # NumPy has no bfloat16
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        kind = f"{wave.dtype} ({wave.layout})" if isinstance(wave, Tensor) else type(wave).__name__
        raise UserError(
            f"{where}: samples of type {kind}: give floats, int16 or int32: {error}"
        ) from error


def checked_rate(sample_rate: float, where: str = "wave") -> int:
    """Return a sample rate in Hz; ``ValueError`` if it is not a positive whole number."""
    if not math.isfinite(sample_rate) or int(sample_rate) != sample_rate or sample_rate <= 0:
        raise UserError(f"{where}: sample rate {sample_rate} Hz: must be positive and whole")
    return int(sample_rate)


def rates_of(sample_rate: float | Sequence[float], count: int) -> list[float]:
    """Return a rate for each of ``count`` waves; ``ValueError`` for another number of rates."""
    given: Any = sample_rate
    rates = [given] * count if np.ndim(given) == 0 else list(given)
    if len(rates) != count:
        raise UserError(f"{len(rates)} sample rates for {count} waves")
    return rates
