"""BEST-RQ: a conformer learns to name what it did not hear (Chiu et al. 2022, arXiv 2202.01855).

What it is to name are codes: four frames of log-mels, normalised over their clip, go through a
random projection, and the nearest of random unit vectors is the code. Neither is ever trained.
Sizes and masks are SpeechBrain's (``lobes/models/BESTRQ.py``): of all frames 15 % begin a mask of
four that lies on one code's frames, so 60 % of the codes are masked.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.rng import spelled_out
from train.models.encoders.interface import valid_frames

STACK, CODES, CODE_SIZE = 4, 8192, 16
MASKED = 0.15 * STACK
"""Share of a clip's codes."""

NOISE = 0.1
"""Standard deviation of what fills a mask, of features with about 1."""


class Masked(NamedTuple):
    """Log-mels (B, M, K) with noise in the masks, which codes (B, S) are masked, all codes."""

    mels_BMK: Tensor
    masked_BS: Tensor
    codes_BS: Tensor


class BestRq(nn.Module):
    """The fixed codes, and the linear layer that names them from last states of ``width``."""

    projection_KC: Tensor
    codes_NC: Tensor

    def __init__(self, width: int, mels: int, seed: int = 0) -> None:
        super().__init__()
        draw, size = spelled_out(seed), STACK * mels
        bound = (6 / (size + CODE_SIZE)) ** 0.5  # Xavier's, uniform
        projection = draw.uniform(-bound, bound, (size, CODE_SIZE)).astype(np.float32)
        codes = torch.from_numpy(draw.standard_normal((CODES, CODE_SIZE)).astype(np.float32))
        self.register_buffer("projection_KC", torch.from_numpy(projection))
        self.register_buffer("codes_NC", functional.normalize(codes, dim=1))
        self.names = nn.Linear(width, CODES)

    def targets(self, mels_BMK: Tensor, lengths_B: Tensor) -> Tensor:
        """Codes (B, S) of log-mels (B, M, K), S = M // 4; of frames behind a clip: any."""
        valid_BM1 = valid_frames(lengths_B, mels_BMK.shape[1])[..., None]
        count_B11 = lengths_B.view(-1, 1, 1)
        mean_B1K = (mels_BMK * valid_BM1).sum(1, keepdim=True) / count_B11
        centred_BMK = (mels_BMK - mean_B1K) * valid_BM1
        spread_B1K = (centred_BMK.square().sum(1, keepdim=True) / count_B11).sqrt()
        normal_BMK = centred_BMK / (spread_B1K + 1e-5)
        stacks = mels_BMK.shape[1] // STACK
        stacked_BSK = normal_BMK[:, : stacks * STACK].reshape(len(mels_BMK), stacks, -1)
        # Of unit vectors the nearest is the one with the largest product, at any length.
        return (stacked_BSK @ self.projection_KC @ self.codes_NC.T).argmax(-1)

    def forward(self, states_BFD: Tensor, masked: Masked) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats) and whether the right code is named, (N,) each, of all masked."""
        stacks = masked.codes_BS.shape[1]
        named_NC = self.names(states_BFD[:, :stacks][masked.masked_BS])
        wanted_N = masked.codes_BS[masked.masked_BS]
        losses_N = functional.cross_entropy(named_NC, wanted_N, reduction="none")
        return losses_N, named_NC.argmax(1) == wanted_N

    def mask(self, mels_BMK: Tensor, lengths_B: Tensor, draw: torch.Generator) -> Masked:
        """What ``draw`` (on the CPU) masks of log-mels with so many frames (B)."""
        codes_BS = self.targets(mels_BMK, lengths_B)
        masked_BS = draw_masks(lengths_B.cpu() // STACK, codes_BS.shape[1], draw)
        noise_BMK = NOISE * torch.randn(mels_BMK.shape, generator=draw).to(mels_BMK.device)
        hidden_BM = masked_BS.repeat_interleave(STACK, 1).to(mels_BMK.device)
        hidden_BM = functional.pad(hidden_BM, (0, mels_BMK.shape[1] - hidden_BM.shape[1]))
        heard_BMK = torch.where(hidden_BM[..., None], noise_BMK, mels_BMK)
        return Masked(heard_BMK, masked_BS.to(mels_BMK.device), codes_BS)


def draw_masks(stacks_B: Tensor, stacks: int, draw: torch.Generator) -> Tensor:
    """Which of (B, ``stacks``) codes are masked: the same share of each clip's, at least one."""
    order_BS = torch.rand(len(stacks_B), stacks, generator=draw)
    order_BS[torch.arange(stacks) >= stacks_B[:, None]] = 2.0
    wanted_B = (stacks_B * MASKED).round().clamp(min=1).minimum(stacks_B)
    return order_BS.argsort(1).argsort(1) < wanted_B[:, None]
