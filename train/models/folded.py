"""The Transformer head as it is run when it does not learn: batch norms folded, precision chosen.

One forward pass for scoring (``train.scoring.engine``) and for export (``train.export.network``);
that of training is ``train.models.head``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.models.head import TransformerHead


class FoldedLayer(nn.Module):
    """One post-norm encoder layer: linear layers in ``dtype``, norms and their sums in float32."""

    joint_ED: Tensor
    """Queries (already divided by the root of the head's width), keys, values."""
    joint_E: Tensor

    def __init__(self, layer: Any, dtype: torch.dtype, fused: bool) -> None:
        super().__init__()
        attention = layer.self_attn
        self.heads, self.dtype, self.fused = int(attention.num_heads), dtype, fused
        inner = len(attention.in_proj_bias) // 3
        scale_E = torch.ones_like(attention.in_proj_bias)
        scale_E[:inner] = (inner // self.heads) ** -0.5
        self.register_buffer("joint_ED", (attention.in_proj_weight * scale_E[:, None]).to(dtype))
        self.register_buffer("joint_E", (attention.in_proj_bias * scale_E).to(dtype))
        self.mixed = attention.out_proj.to(dtype)
        self.wide, self.narrow = layer.linear1.to(dtype), layer.linear2.to(dtype)
        self.norms = nn.ModuleList((layer.norm1, layer.norm2))

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = self.norms[0](x_BLD + self.mixed(self._attend(x_BLD)).float())
        hidden_BLF = functional.relu_(self.wide(x_BLD.to(self.dtype)))
        normal_BLD: Tensor = self.norms[1](x_BLD + self.narrow(hidden_BLF).float())
        return normal_BLD

    def _attend(self, x_BLD: Tensor) -> Tensor:
        joint_BLE = functional.linear(x_BLD.to(self.dtype), self.joint_ED, self.joint_E)
        joint_BL3HK = joint_BLE.unflatten(-1, (3, self.heads, -1))
        queries, keys, values = joint_BL3HK.permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed_BHLK = functional.scaled_dot_product_attention(queries, keys, values, scale=1.0)
        else:
            mixed_BHLK = (queries @ keys.transpose(-1, -2)).softmax(-1) @ values
        return mixed_BHLK.transpose(1, 2).flatten(2)


class FoldedHead(nn.Module):
    """A copy of a head: ``project`` makes tokens of features, the call logits of tokens."""

    weight_DC: Tensor
    start_1LD: Tensor
    scale_D: Tensor
    shift_D: Tensor

    def __init__(
        self, head: TransformerHead, dtype: torch.dtype, device: torch.device, fused: bool
    ) -> None:
        """``fused``: attention by PyTorch's fused kernel, else written out as plain products."""
        super().__init__()
        head = copy.deepcopy(head).to(device).requires_grad_(False)
        self.dtype = dtype
        weight_DC, bias_D = _folded_projection(head, dtype)
        self.register_buffer("weight_DC", weight_DC)
        self.register_buffer("start_1LD", head.positions + bias_D)
        self.layers = nn.ModuleList(FoldedLayer(one, dtype, fused) for one in head.encoder.layers)
        last: Any = head.norm_output
        self.register_buffer("scale_D", last.weight / torch.sqrt(last.running_var + last.eps))
        self.register_buffer("shift_D", last.bias - last.running_mean * self.scale_D)
        self.hidden, self.weigh = head.pool.hidden.to(dtype), head.pool.weight.to(dtype)
        self.output = head.pool.output

    def project(self, maps_BCFL: Tensor) -> Tensor:
        """Make tokens (B, L, D), float32, of maps, before their positions are added."""
        features_BLC = torch.flatten(maps_BCFL, 1, -2).permute(0, 2, 1)
        return functional.linear(features_BLC, self.weight_DC).float()

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Logits (B,) of projected tokens; the stream between the layers is float32."""
        x_BLD = tokens_BLD + self.start_1LD
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        x_BLD = x_BLD * self.scale_D + self.shift_D
        hidden_BLP = functional.relu_(self.hidden(x_BLD.to(self.dtype)))
        weights_B1L = self.weigh(hidden_BLP).float().transpose(1, 2).softmax(-1)
        logits_B: Tensor = self.output(torch.bmm(weights_B1L, x_BLD).squeeze(1)).squeeze(-1)
        return logits_B


def _folded_projection(head: TransformerHead, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both batch norms and the projection as one weight (D, C) and one float32 bias (D,).

    The features' mean is subtracted through the rounded weight: what rounding does to the large
    mean cancels.
    """
    first: Any = head.norm_input
    second: Any = head.norm_projection
    gains = [norm.weight / torch.sqrt(norm.running_var + norm.eps) for norm in (first, second)]
    after_C = gains[1] * (first.bias - second.running_mean) + second.bias
    weight_DC = (head.projection.weight * (gains[0] * gains[1])).to(dtype)
    bias_D = head.projection.bias + head.projection.weight @ after_C
    return weight_DC, bias_D - weight_DC.float() @ first.running_mean
