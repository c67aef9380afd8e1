"""How far two right computations may differ: from the arithmetic, not from one machine's run.

Another make of processor, another library or another size of batch adds the same products in
another order. Each addition rounds by half a unit in the last place; as the signs are random, n of
them leave about sqrt(n) half units, and so do layers that follow each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.models.features import COMPRESSION, WINDOW_SAMPLES

MARGIN = 8
"""Half units: a maximum over many values, and partial sums that exceed their result."""


def rounding(terms: int, magnitude: float | Tensor = 1.0, layers: int = 1) -> float:
    """Of values up to ``magnitude`` that passed ``layers`` sums of up to ``terms`` products."""
    half_unit = torch.finfo(torch.float32).eps / 2
    return MARGIN * half_unit * float(magnitude) * float(terms * layers) ** 0.5


STUDENT = rounding(9 * 128, layers=40)
"""Of a MOS in fp32 (1e-4): 3 x 3 kernels over 128 channels, 40 sums behind each other; the slope of
1 + 4 sigmoid(x) is at most 1."""

HALF_PRECISION = 0.03
"""Of a MOS in bf16 or int8: 2^-8 of every activation, sqrt(40) layers: .025."""


def spectrum_rounding(own_B2FT: Tensor) -> Tensor:
    """Of each bin of a compressed spectrum, (B, 1, F, T).

    A bin is a sum over the window: it rounds by the length of the whole frame, which the bin itself
    may be far below. Dividing by magnitude^0.7 lifts that where the bin is quiet.
    """
    magnitude = own_B2FT.double().norm(dim=1, keepdim=True) ** (1 / COMPRESSION)
    length = (2 * magnitude.square().sum(dim=2, keepdim=True) / WINDOW_SAMPLES).sqrt()
    return rounding(WINDOW_SAMPLES) * length * magnitude.clamp_min(1e-12) ** (COMPRESSION - 1)
