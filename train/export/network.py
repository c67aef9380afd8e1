"""A student as a graph of plain operations, for ONNX: the same numbers, nothing complex.

What differs from ``train.models.student.Student``: the short-time spectrum is a convolution with
the windowed sines and cosines; batch norms are folded into the linear layers beside them, the
projection is a convolution over the bins that are left; attention is written out, because
PyTorch's fused layers have no ONNX form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.models.features import (
    COMPRESSION,
    FREQUENCIES,
    HOP_SAMPLES,
    MAGNITUDE_FLOOR,
    PEAK_FLOOR,
    WINDOW_SAMPLES,
)
from train.models.head import AttentionPool, SlimNorm, TransformerHead
from train.models.student import Student, mos_of

EDGE_SAMPLES = (WINDOW_SAMPLES - HOP_SAMPLES) // 2


def fourier_kernels() -> Tensor:
    """(322, 1, 320): 161 windowed cosines, then 161 windowed negative sines, as convolutions."""
    time_T = torch.arange(WINDOW_SAMPLES, dtype=torch.float64)
    turns_FT = torch.outer(torch.arange(FREQUENCIES, dtype=torch.float64), time_T) / WINDOW_SAMPLES
    phase_FT = 2 * math.pi * (turns_FT % 1)
    window_T = torch.hann_window(WINDOW_SAMPLES).double()  # the model's own, with its rounding
    kernels_CT = torch.cat((phase_FT.cos(), -phase_FT.sin())) * window_T
    kernels_CT[kernels_CT.abs() < 1e-12] = 0  # sines of whole turns
    return kernels_CT.float().unsqueeze(1)


class PlainSpectrum(nn.Module):
    """``compressed_spectrum(peak_normalise(waves))`` in real numbers: (B, T) -> (B, 2, 161, F)."""

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernels", fourier_kernels())

    def forward(self, waves_BT: Tensor) -> Tensor:
        peaks_B1 = waves_BT.abs().amax(dim=1, keepdim=True)
        waves_B1T = (waves_BT / (peaks_B1 + PEAK_FLOOR)).unsqueeze(1)
        padded_B1T = functional.pad(waves_B1T, (EDGE_SAMPLES, EDGE_SAMPLES), mode="reflect")
        parts_BCF = functional.conv1d(padded_B1T, self.kernels, stride=HOP_SAMPLES)
        parts_B2FT = parts_BCF.unflatten(1, (2, FREQUENCIES))
        power_B1FT = parts_B2FT.square().sum(1, keepdim=True).clamp_min(MAGNITUDE_FLOOR**2)
        return parts_B2FT * power_B1FT ** ((COMPRESSION - 1) / 2)


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm in eval mode, float64."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale_C = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale_C, norm.bias.double() - norm.running_mean.double() * scale_C


def _after(linear: nn.Linear, scale_C: Tensor, shift_C: Tensor) -> nn.Linear:
    """A linear layer that does ``x * scale + shift`` first."""
    folded = nn.Linear(linear.in_features, linear.out_features)
    weight_DC, bias_D = linear.weight.double(), linear.bias.double()
    folded.weight.data = (weight_DC * scale_C).float()
    folded.bias.data = (bias_D + weight_DC @ shift_C).float()
    return folded


class PlainProjection(nn.Module):
    """Both batch norms and the linear layer over the maps' channels and bins, and the positions.

    (B, C, F, L) -> (B, L, D); one convolution as high as the bins that are left.
    """

    positions: Tensor

    def __init__(self, head: TransformerHead, channels: int) -> None:
        super().__init__()
        first, second = _affine(head.norm_input), _affine(head.norm_projection)
        scale_C = first[0] * second[0]
        folded = _after(head.projection, scale_C, first[1] * second[0] + second[1])
        bins = folded.in_features // channels
        self.reduce = nn.Conv2d(channels, folded.out_features, (bins, 1))
        self.reduce.weight.data = folded.weight.data.unflatten(1, (channels, bins, 1))
        self.reduce.bias = folded.bias
        self.register_buffer("positions", head.positions.clone())

    def forward(self, maps_BCFL: Tensor) -> Tensor:
        tokens_BLD: Tensor = self.reduce(maps_BCFL).squeeze(2).transpose(1, 2)
        return tokens_BLD + self.positions


class PlainAttention(nn.Module):
    """Self-attention written out, its scale folded into the queries: (B, L, D) -> same."""

    def __init__(self, attention: Any, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = attention.num_heads, head_dim
        weights = attention.in_proj_weight.detach().chunk(3)
        biases = attention.in_proj_bias.detach().chunk(3)
        scales = (1 / math.sqrt(head_dim), 1.0, 1.0)
        self.parts = nn.ModuleList(
            _linear(weight * scale, bias * scale)
            for weight, bias, scale in zip(weights, biases, scales, strict=True)
        )
        self.out = _linear(attention.out_proj.weight.detach(), attention.out_proj.bias.detach())

    def forward(self, x_BLD: Tensor) -> Tensor:
        queries, keys, values = (
            part(x_BLD).unflatten(-1, (self.heads, self.head_dim)) for part in self.parts
        )
        products_BHLL = queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1)
        mixed_BHLK = functional.softmax(products_BHLL, dim=-1) @ values.transpose(1, 2)
        mixed_BLD: Tensor = self.out(mixed_BHLK.transpose(1, 2).flatten(2))
        return mixed_BLD


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
    return linear


def _norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """The layer's norm; PyTorch's own where a slim one counts no coordinate that is gone."""
    if isinstance(norm, SlimNorm) and norm.width == norm.normalized_shape[0]:
        plain = nn.LayerNorm(norm.width, eps=norm.eps)
        plain.load_state_dict(norm.state_dict())
        return plain
    return norm


class PlainLayer(nn.Module):
    """A Transformer layer (post-norm, ReLU) in eval mode."""

    def __init__(self, layer: Any, head_dim: int) -> None:
        super().__init__()
        self.attention = PlainAttention(layer.self_attn, head_dim)
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.norm1, self.norm2 = _norm(layer.norm1), _norm(layer.norm2)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = self.norm1(x_BLD + self.attention(x_BLD))
        hidden_BLF = functional.relu(self.linear1(x_BLD))
        normal_BLD: Tensor = self.norm2(x_BLD + self.linear2(hidden_BLF))
        return normal_BLD


class PlainPool(nn.Module):
    """The last batch norm and the attention pooling, folded: (B, L, D) -> logits (B,)."""

    def __init__(self, pool: AttentionPool, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        affine = _affine(norm)
        self.hidden, self.output = _after(pool.hidden, *affine), _after(pool.output, *affine)
        self.weight = pool.weight

    def forward(self, x_BLD: Tensor) -> Tensor:
        scores_BL1 = self.weight(functional.relu(self.hidden(x_BLD)))
        weights_BL1 = functional.softmax(scores_BL1, dim=1)
        pooled_BD = (weights_BL1 * x_BLD).sum(dim=1)  # weights sum to one: shifts pass through
        logits_B: Tensor = self.output(pooled_BD).squeeze(-1)
        return logits_B


class PlainStudent(nn.Module):
    """A student for export: waves (B, 122880) to mean opinion scores (B,)."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        head = student.head
        self.spectrum = PlainSpectrum()
        self.convolutions = student.convolutions
        self.projection = PlainProjection(head, student.config.channels[-1])
        encoder: Any = head.encoder
        head_dim = student.config.slim.head_dim
        self.layers = nn.ModuleList(PlainLayer(layer, head_dim) for layer in encoder.layers)
        self.pool = PlainPool(head.pool, head.norm_output)

    def forward(self, waves_BT: Tensor) -> Tensor:
        x_BLD = self.projection(self.convolutions(self.spectrum(waves_BT)))
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return mos_of(self.pool(x_BLD))
