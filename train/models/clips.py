"""Batches of clips as every model takes them: 7.68 s, 16 kHz, float32."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_specs.sample import CROP_SAMPLES

Floats = NDArray[np.float32]
Waves = NDArray[np.float32] | Tensor


def checked_waves(waves_BT: Waves) -> Tensor:
    """The batch as a float32 tensor; ``ValueError`` for a wrong shape or non-finite values."""
    waves = torch.as_tensor(waves_BT, dtype=torch.float32)
    if waves.ndim != 2 or waves.shape[1] != CROP_SAMPLES:
        raise ValueError(f"waves of shape {tuple(waves.shape)}: need (B, {CROP_SAMPLES})")
    bad = torch.nonzero(~torch.isfinite(waves).all(dim=1)).flatten().tolist()
    if bad:
        raise ValueError(f"waves {bad} of the batch hold values that are not finite")
    return waves
