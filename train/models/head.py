"""The Transformer head with attention pooling that teacher and students share.

As published in xls-r-sqa (``sqa_model.py``, ``transformer_wrapper.py``, ``pool_att_ff.py``);
only the sigmoid at its end is left to the caller, because calibration and distillation of the
label map work on the logit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.errors import UserError
from data_specs.strict import Strict

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

    def __init__(self, dim: int, dropout: float = 0.0, hidden: int | None = None) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden or 2 * dim)
        self.weight = nn.Linear(self.hidden.out_features, 1)
        self.output = nn.Linear(dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        scores_BL1 = self.weight(self.dropout(functional.relu(self.hidden(tokens_BLD))))
        weights_B1L = functional.softmax(scores_BL1.transpose(2, 1), dim=2)
        pooled_BD = torch.bmm(weights_B1L.to(tokens_BLD.dtype), tokens_BLD).squeeze(1)
        logits_B: Tensor = self.output(pooled_BD).squeeze(-1)
        return logits_B


@dataclass(frozen=True)
class Slim:
    """The encoder of a head that parts were removed from: its layers need not be alike.

    ``heads`` and ``feedforward`` have one entry a layer; a head is ``head_dim`` wide whatever the
    tokens' width is. Layer norms count ``norm_width`` coordinates: those that are gone are zeros.
    """

    heads: tuple[int, ...]
    head_dim: int
    feedforward: tuple[int, ...]
    norm_width: int
    pool: int
    """Hidden units of the attention pooling."""


class SlimNorm(nn.LayerNorm):
    """A layer norm over ``width`` coordinates, of which only those that are not zero are here."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__(dim)
        self.width = width

    def forward(self, input: Tensor) -> Tensor:
        gone = self.width - input.shape[-1]
        if not gone:
            return super().forward(input)
        x_BLD = input.float()
        mean_BL1 = x_BLD.sum(-1, keepdim=True) / self.width
        centred_BLD = x_BLD - mean_BL1
        squares_BL1 = centred_BLD.square().sum(-1, keepdim=True) + gone * mean_BL1.square()
        normal_BLD = centred_BLD * torch.rsqrt(squares_BL1 / self.width + self.eps)
        return (normal_BLD * self.weight + self.bias).to(input.dtype)


class SlimAttention(nn.Module):
    """Self-attention whose heads together may be narrower than the tokens: (B, L, D) -> same.

    ``nn.MultiheadAttention`` cannot be that. The tensors have its names and its order: queries,
    keys, values, each head by head.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = head_dim
        self.dropout = dropout
        inner = heads * head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner))
        self.out_proj = nn.Linear(inner, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x_BLD: Tensor) -> Tensor:
        joint_BLE = functional.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        joint_BL3HK = joint_BLE.unflatten(-1, (3, self.num_heads, self.head_dim))
        queries, keys, values = joint_BL3HK.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed_BHLK = functional.scaled_dot_product_attention(
            queries, keys, values, dropout_p=dropout
        )
        mixed_BLD: Tensor = self.out_proj(mixed_BHLK.transpose(1, 2).flatten(2))
        return mixed_BLD


class SlimLayer(nn.Module):
    """What ``nn.TransformerEncoderLayer`` (post-norm, ReLU) is, tensor for tensor, but slimmer."""

    def __init__(self, dim: int, slim: Slim, number: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SlimAttention(dim, slim.heads[number], slim.head_dim, dropout)
        self.linear1 = nn.Linear(dim, slim.feedforward[number])
        self.linear2 = nn.Linear(slim.feedforward[number], dim)
        self.norm1 = SlimNorm(dim, slim.norm_width)
        self.norm2 = SlimNorm(dim, slim.norm_width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = self.norm1(x_BLD + self.dropout(self.self_attn(x_BLD)))
        hidden_BLF = self.dropout(functional.relu(self.linear1(x_BLD)))
        normal_BLD: Tensor = self.norm2(x_BLD + self.dropout(self.linear2(hidden_BLF)))
        return normal_BLD


class SlimEncoder(nn.Module):
    """``nn.TransformerEncoder`` of such layers."""

    def __init__(self, dim: int, slim: Slim, dropout: float) -> None:
        super().__init__()
        self.num_layers = len(slim.heads)
        self.layers = nn.ModuleList(
            SlimLayer(dim, slim, number, dropout) for number in range(self.num_layers)
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return x_BLD


def _encoder(
    dim: int, heads: int, layers: int, feedforward: int | None, dropout: float
) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        dim, heads, feedforward or 2 * dim, dropout=dropout, batch_first=True
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


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
        slim: Slim | None = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.norm_input = nn.BatchNorm1d(features)
        self.norm_projection = nn.BatchNorm1d(features)
        self.projection = nn.Linear(features, dim)
        self.register_buffer("positions", sinusoidal_positions(tokens, dim))
        self.encoder: nn.TransformerEncoder | SlimEncoder = (
            SlimEncoder(dim, slim, dropout)
            if slim
            else _encoder(dim, heads, layers, feedforward, dropout)
        )
        self.norm_output = nn.BatchNorm1d(dim)
        self.pool = AttentionPool(dim, dropout, slim.pool if slim else None)

    def forward(self, features_BLC: Tensor) -> Tensor:
        """Logits (B,); ``ValueError`` where the sequence is longer than ``tokens``."""
        length = features_BLC.shape[1]
        if length > self.tokens:
            raise ValueError(f"sequence of {length} tokens: this head takes at most {self.tokens}")
        x_BLD = self.encoder(self.embedded(features_BLC))
        x_BLD = self.norm_output(x_BLD.transpose(-1, -2)).transpose(-1, -2)
        logits_B: Tensor = self.pool(x_BLD)
        return logits_B

    def embedded(self, features_BLC: Tensor) -> Tensor:
        """What the Transformer hears (B, L, D): features in the tokens' width, with positions."""
        x_BCL = self.norm_projection(self.norm_input(features_BLC.transpose(-1, -2)))
        x_BLD: Tensor = self.projection(x_BCL.transpose(-1, -2))
        return x_BLD + self.positions[:, : x_BLD.shape[1]]


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
        normed = [
            norm(features_BLC2[..., which].transpose(-1, -2)).transpose(-1, -2)
            for which, norm in enumerate(self.norm_inputs)
        ]
        return super().forward(self.mix(torch.stack(normed, dim=-1)).squeeze(-1))


Positive = Annotated[int, Field(ge=1, le=1 << 16)]
"""A dimension: no network of this kind comes near the limit."""

MOST_LAYERS = 256


class HeadConfig(Strict):
    """Dimensions of a teacher's head; the defaults are the published ones (32 wide, 4 layers)."""

    features: Positive
    tokens: Positive = TEACHER_TOKENS
    dim: Annotated[int, Field(ge=2, le=1 << 16, multiple_of=2)] = 32
    heads: Positive = 4
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)] = 4
    feedforward: Positive | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


def build_head(config: HeadConfig) -> TransformerHead:
    """A head with fresh weights: (B, tokens, features) -> logits (B,)."""
    return TransformerHead(**config.model_dump())


def config_of(head: TransformerHead) -> HeadConfig:
    """The dimensions of a head whose layers are all alike."""
    if isinstance(head.encoder, SlimEncoder):
        raise ValueError("a head that parts were removed from has no HeadConfig")
    first: Any = head.encoder.layers[0]
    return HeadConfig(
        features=head.projection.in_features,
        tokens=head.tokens,
        dim=head.projection.out_features,
        heads=first.self_attn.num_heads,
        layers=len(head.encoder.layers),
        feedforward=first.linear1.out_features,
        dropout=head.pool.dropout.p,
    )


def head_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published head's state dict (xls-r-sqa's names) under the names of ``TransformerHead``.

    ``ValueError`` for a name that the published head does not have.
    """
    found = {}
    for name, tensor in published.items():
        prefixes = (pair for pair in PUBLISHED_NAMES if name.startswith(pair[0]))
        theirs, ours = next(prefixes, ("", ""))
        if not theirs:
            raise UserError(f"tensor {name!r} is not part of a published xls-r-sqa head")
        found[ours + name.removeprefix(theirs)] = tensor
    return found
