"""BEST-RQ: a conformer learns to name what it did not hear (Chiu et al. 2022, arXiv 2202.01855).

What it is to name are codes: four frames of log-mels, normalised over their clip, go through a
random projection, and the nearest of random unit vectors is the code. Neither is ever trained.
Sizes and masks are SpeechBrain's (``lobes/models/BESTRQ.py``): of all frames 15 % begin a mask of
four that lies on one code's frames, so 60 % of the codes are masked.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.errors import UserError
from data_specs.io.rng import spelled_out
from train.models.encoders.conformer import Conformer

STACK, CODES, CODE_SIZE = 4, 8192, 16
MASKED = 0.15 * STACK
"""Share of a clip's codes."""

NOISE = 0.1
"""Standard deviation of what fills a mask, of features with about 1."""


class BestRq(nn.Module):
    """The fixed codes, and the linear layer that names them from a conformer's last states."""

    projection_KC: Tensor
    codes_NC: Tensor

    def __init__(self, conformer: Conformer, seed: int) -> None:
        super().__init__()
        config = conformer.config
        if config.factor != STACK:
            raise UserError(
                f"codes are of {STACK} frames: the conformer's states of {config.factor}"
            )
        draw, size = spelled_out(seed), STACK * config.mels
        bound = (6 / (size + CODE_SIZE)) ** 0.5  # Xavier's, uniform
        projection = draw.uniform(-bound, bound, (size, CODE_SIZE)).astype(np.float32)
        codes = torch.from_numpy(draw.standard_normal((CODES, CODE_SIZE)).astype(np.float32))
        self.register_buffer("projection_KC", torch.from_numpy(projection))
        self.register_buffer("codes_NC", functional.normalize(codes, dim=1))
        self.names = nn.Linear(config.width, CODES)

    def targets(self, mels_BMK: Tensor, lengths_B: Tensor) -> Tensor:
        """Codes (B, S) of log-mels (B, M, K), S = M // 4; of frames behind a clip: any."""
        valid_BM1 = (torch.arange(mels_BMK.shape[1]) < lengths_B.cpu()[:, None])[..., None]
        valid_BM1 = valid_BM1.to(mels_BMK.device)
        count_B11 = lengths_B.view(-1, 1, 1).to(mels_BMK.device)
        mean_B1K = (mels_BMK * valid_BM1).sum(1, keepdim=True) / count_B11
        centred_BMK = (mels_BMK - mean_B1K) * valid_BM1
        spread_B1K = (centred_BMK.square().sum(1, keepdim=True) / count_B11).sqrt()
        normal_BMK = centred_BMK / (spread_B1K + 1e-5)
        stacks = mels_BMK.shape[1] // STACK
        stacked_BSK = normal_BMK[:, : stacks * STACK].reshape(len(mels_BMK), stacks, -1)
        # Of unit vectors the nearest is the one with the largest product, at any length.
        return (stacked_BSK @ self.projection_KC @ self.codes_NC.T).argmax(-1)

    def forward(
        self, conformer: Conformer, waves_BT: Tensor, lengths_B: Tensor, draw: torch.Generator
    ) -> Mapping[str, Tensor]:
        """``loss`` (nats) and ``accuracy`` on the codes that ``draw`` (on the CPU) masks."""
        mels_BMK, frames_B = conformer.features(waves_BT, lengths_B)
        codes_BS = self.targets(mels_BMK, frames_B)
        masked_BS = draw_masks(frames_B.cpu() // STACK, codes_BS.shape[1], draw).to(codes_BS.device)
        hidden_BM1 = masked_BS.repeat_interleave(STACK, 1)[..., None]
        noise_BMK = NOISE * torch.randn(*hidden_BM1.shape[:2], mels_BMK.shape[2], generator=draw)
        heard_BMK = mels_BMK[:, : hidden_BM1.shape[1]]
        heard_BMK = torch.where(hidden_BM1, noise_BMK.to(heard_BMK.device), heard_BMK)
        frames_B = frames_B.clamp(max=heard_BMK.shape[1])
        states_BSD = conformer.states(heard_BMK, frames_B).layers[-1]
        named_NV, wanted_N = self.names(states_BSD[masked_BS]), codes_BS[masked_BS]
        loss = functional.cross_entropy(named_NV, wanted_N)
        return {"loss": loss, "accuracy": (named_NV.argmax(1) == wanted_N).float().mean()}


def draw_masks(stacks_B: Tensor, stacks: int, draw: torch.Generator) -> Tensor:
    """Which of (B, ``stacks``) codes are masked: the same share of each clip's, at least one."""
    order_BS = torch.rand(len(stacks_B), stacks, generator=draw)
    order_BS[torch.arange(stacks) >= stacks_B[:, None]] = 2.0
    rank_BS = order_BS.argsort(1).argsort(1)
    return rank_BS < (stacks_B * MASKED).round().clamp(min=1)[:, None]
