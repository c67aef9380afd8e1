"""Fewer bits: weights of 8 to 2 bits, for accuracy; linear layers in int8 by oneDNN, for speed.

Weights are rounded as they lie in any network, a scale for every output (the first axis) and
``2^bits - 1`` levels around zero, so that a weight that is zero stays zero. The network then
computes in float what so many bits could hold: that says what they cost in accuracy, and nothing
of time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

SCALES = 64
"""Scales that are tried for every output, up to the one that cuts nothing off."""

CODES = 255
"""Largest code of an activation: u8."""


def most_code() -> int:
    """Largest code of a weight: s8; half of it where sums of two products saturate at 16 bits.

    Processors without VNNI: twice 255 x 127 is beyond 32767, twice 255 x 63 is not.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63


def matrices(network: nn.Module) -> list[str]:
    """Names of the weights of two axes or more, a shared one once; embeddings are left alone."""
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    multiplied = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear)}
    return [
        name
        for name, weight in network.named_parameters()
        if weight.ndim >= 2 and (id(weight) not in tables or id(weight) in multiplied)
    ]


@torch.no_grad()
def quantised(weight: Tensor, bits: int) -> Tensor:
    """A weight (O, ...) as ``bits`` can hold it: whole multiples of one scale for each output.

    Of ``SCALES`` steps up to the largest weight's, each gives whole numbers q; the scale that fits
    them best is <w, q> / <q, q>. That of the least squared error is taken.
    """
    most = 2 ** (bits - 1) - 1
    rows_OK = weight.detach().float().flatten(1)
    peak_O1 = rows_OK.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    least_O1 = torch.full_like(peak_O1, torch.inf)
    best_OK = torch.zeros_like(rows_OK)
    for part in range(1, SCALES + 1):
        codes_OK = (rows_OK / (peak_O1 * part / SCALES / most)).round_().clamp_(-most, most)
        energy_O1 = codes_OK.square().sum(1, keepdim=True).clamp_min_(1)
        scale_O1 = (rows_OK * codes_OK).sum(1, keepdim=True) / energy_O1
        made_OK = codes_OK.mul_(scale_O1)
        error_O1 = (rows_OK - made_OK).square().sum(1, keepdim=True)
        better_O1 = error_O1 < least_O1
        best_OK = torch.where(better_O1, made_OK, best_OK)
        least_O1 = torch.where(better_O1, error_O1, least_O1)
    return best_OK.reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def quantise_(network: nn.Module, names: Iterable[str], bits: int) -> None:
    """Round weights of a network in place; see ``quantised``."""
    for name in names:
        weight = network.get_parameter(name)
        weight.copy_(quantised(weight, bits))


# --- int8 -----------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer in u8 x s8, by oneDNN: (..., I) -> (..., O), float32 in and out.

    Weights have a scale for every output; activations one of their own at every call, from their
    extremes. Not for training.
    """

    packed: Tensor
    scale_O: Tensor
    zero_O: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O = weight_OI.abs().amax(1).clamp_min(1e-12) / most_code()
        codes_OI = (weight_OI / scale_O[:, None]).round().to(torch.int8)
        # oneDNN's own layout is no dense tensor: no state dict holds it.
        self.packed = torch.ops.onednn.qlinear_prepack(codes_OI, None)
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("scale_O", scale_O)
        self.register_buffer("zero_O", torch.zeros_like(scale_O, dtype=torch.int64))
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        low, high = (float(end) for end in x.aminmax())
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / CODES, 1e-12)
        zero = round(-low / step)
        codes = torch.quantize_per_tensor(x, step, zero, torch.quint8).int_repr()
        made: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, step, zero, self.packed, self.scale_O, self.zero_O, self.bias,
            1.0, 0, torch.float32, "none", [], "none",
        )  # fmt: skip
        return made


def int8_linears_(network: nn.Module) -> nn.Module:
    """Put ``Int8Linear`` in the place of every linear layer; returns the network.

    The products inside ``nn.MultiheadAttention`` stay: PyTorch reads its weights past the layer.
    """
    for module in list(network.modules()):
        for part, child in list(module.named_children()):
            if type(child) is nn.Linear and not isinstance(module, nn.MultiheadAttention):
                setattr(module, part, Int8Linear(child))
    return network


def megabytes(network: nn.Module) -> float:
    """What the weights take: a byte for each of int8, the bytes that they are for the others."""
    stored = {id(t): t.nbytes for t in (*network.parameters(), *network.buffers())}
    packed = (m for m in network.modules() if isinstance(m, Int8Linear))
    extra = sum(m.in_features * m.out_features + 4 * m.out_features for m in packed)
    return (sum(stored.values()) + extra) / 1e6
