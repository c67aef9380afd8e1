"""The Transformer head with attention pooling that teacher and students share.

As published in xls-r-sqa (``sqa_model.py``, ``transformer_wrapper.py``, ``pool_att_ff.py``);
only the sigmoid at its end is left to the caller, because calibration and distillation of the
label map work on the logit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

TEACHER_TOKENS = 384
"""Frames that a teacher's head reads: 7.68 s of XLS-R's 20 ms."""

PUBLISHED_NAMES = (
    ("transformer.norm.", "norm_projection."),
    ("transformer.linear_proj.", "projection."),
    ("transformer.position_encoding.pe", "positions"),
    ("transformer.transformer_encoder.", "encoder."),
    ("norm_input.", "norm_input."),
    ("norm_inputs.", "norm_inputs."),
    ("lin_infusion.", "mix."),
    ("norm_trans.", "norm_output."),
    ("pool.linear1.", "pool.hidden."),
    ("pool.linear2.", "pool.weight."),
    ("pool.linear3.", "pool.output."),
)
"""(xls-r-sqa's name, ours), by prefix."""


def sinusoidal_positions(tokens: int, dim: int) -> Tensor:
    """Sine and cosine position codes (1, tokens, dim), wavelengths up to 2 * tokens."""
    position_L1 = torch.arange(tokens).unsqueeze(1)
    rate_D = torch.exp(torch.arange(0, dim, 2) * (-math.log(2 * tokens) / dim))
    codes_1LD = torch.zeros(1, tokens, dim)
    codes_1LD[0, :, 0::2] = torch.sin(position_L1 * rate_D)
    codes_1LD[0, :, 1::2] = torch.cos(position_L1 * rate_D)
    return codes_1LD


class AttentionPool(nn.Module):
    """Weighted mean over the tokens, the weights from a small network, then one linear unit.

    (B, L, D) -> (B,). From NISQA's PoolAttFF, which the published head uses.
    """

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, 2 * dim)
        self.weight = nn.Linear(2 * dim, 1)
        self.output = nn.Linear(dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        scores_BL1 = self.weight(self.dropout(functional.relu(self.hidden(tokens_BLD))))
        weights_B1L = functional.softmax(scores_BL1.transpose(2, 1), dim=2)
        pooled_BD = torch.bmm(weights_B1L.to(tokens_BLD.dtype), tokens_BLD).squeeze(1)
        logits_B: Tensor = self.output(pooled_BD).squeeze(-1)
        return logits_B


class TransformerHead(nn.Module):
    """Features to one logit a clip: (B, L, C) -> (B,), L at most ``tokens``.

    Batch norm twice over the features (once in the head, once in the published wrapper: both
    are in the published weights), linear to ``dim``, positions, Transformer encoder (post-norm),
    batch norm, attention pooling. MOS is ``1 + 4 * sigmoid(logit)``.
    """

    positions: Tensor

    def __init__(
        self,
        features: int,
        tokens: int,
        dim: int,
        heads: int,
        layers: int,
        feedforward: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.norm_input = nn.BatchNorm1d(features)
        self.norm_projection = nn.BatchNorm1d(features)
        self.projection = nn.Linear(features, dim)
        self.register_buffer("positions", sinusoidal_positions(tokens, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, feedforward or 2 * dim, dropout=dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm_output = nn.BatchNorm1d(dim)
        self.pool = AttentionPool(dim, dropout)

    def forward(self, features_BLC: Tensor) -> Tensor:
        """Logits (B,); ``ValueError`` where the sequence is longer than ``tokens``."""
        length = features_BLC.shape[1]
        if length > self.tokens:
            raise ValueError(f"sequence of {length} tokens: this head takes at most {self.tokens}")
        x_BCL = self.norm_projection(self.norm_input(features_BLC.transpose(-1, -2)))
        x_BLD = self.projection(x_BCL.transpose(-1, -2)) + self.positions[:, :length]
        x_BLD = self.encoder(x_BLD)
        x_BLD = self.norm_output(x_BLD.transpose(-1, -2)).transpose(-1, -2)
        logits_B: Tensor = self.pool(x_BLD)
        return logits_B


class FusionHead(TransformerHead):
    """The published head over two layers: each has its batch norm, then they are mixed into one.

    (B, L, C, 2) -> (B,).
    """

    def __init__(self, features: int, tokens: int, dim: int, heads: int, layers: int) -> None:
        super().__init__(features, tokens, dim, heads, layers)
        self.norm_input = nn.Identity()  # type: ignore[assignment]
        self.norm_inputs = nn.ModuleList(nn.BatchNorm1d(features) for _ in range(2))
        self.mix = nn.Linear(2, 1)

    def forward(self, features_BLC2: Tensor) -> Tensor:
        """Logits (B,)."""
        normed = [
            norm(features_BLC2[..., which].transpose(-1, -2)).transpose(-1, -2)
            for which, norm in enumerate(self.norm_inputs)
        ]
        return super().forward(self.mix(torch.stack(normed, dim=-1)).squeeze(-1))


Positive = Annotated[int, Field(ge=1)]


class HeadConfig(BaseModel):
    """Dimensions of a teacher's head; the defaults are the published ones (32 wide, 4 layers)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: Positive
    tokens: Positive = TEACHER_TOKENS
    dim: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    heads: Positive = 4
    layers: Positive = 4
    feedforward: Positive | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


def build_head(config: HeadConfig) -> TransformerHead:
    """A head with fresh weights: (B, tokens, features) -> logits (B,)."""
    return TransformerHead(**config.model_dump())


def head_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published head's state dict (xls-r-sqa's names) under the names of ``TransformerHead``.

    ``ValueError`` for a name that the published head does not have.
    """
    return {_our_name(name): tensor for name, tensor in published.items()}


def _our_name(name: str) -> str:
    for theirs, ours in PUBLISHED_NAMES:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    raise ValueError(f"tensor {name!r} is not part of a published xls-r-sqa head")
