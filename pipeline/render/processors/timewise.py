"""Layers over time as a CPU runs them fastest: channels last, every stride turned into channels.

Networks of one-dimensional convolutions are slow in torch as they are written: (B, C, T) is copied
into oneDNN's own layout and back around every layer, autocast converts weights at every call, and
strided and transposed convolutions take slow paths. Here tensors are (B, T, C) throughout, which
oneDNN takes as they lie (as images one pixel high), in the precision that the weights were given
once. Where a kernel is two strides long, as all strided ones of our networks are, a strided
convolution is a plain one of two taps over (T / stride, stride * C), and a transposed one gives
that shape: both reshapes are free. One core of an AMD EPYC with AVX-512 BF16 comes to about 100
GFLOP/s in fp32 and 200 in bf16 so, of 110 and 220 at best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Layer = Callable[[Any], Any]
"""(B, T, C) to (B, T', C')."""


def taps(weight_OIK: Any, bias_O: Any, dtype: Any, dilation: int = 1, padding: int = 0) -> Layer:
    """A kernel of stride 1; ``padding`` zeros at both ends."""
    import torch
    from torch.nn import functional

    weight = weight_OIK.detach().unsqueeze(2).to(dtype, memory_format=torch.channels_last)
    bias_O = None if bias_O is None else bias_O.detach().to(dtype)

    def run(x_BTC: Any) -> Any:
        image_BC1T = x_BTC.transpose(1, 2).unsqueeze(2)
        out = functional.conv2d(
            image_BC1T, weight, bias_O, padding=(0, padding), dilation=(1, dilation)
        )
        return out.squeeze(2).transpose(1, 2)

    return run


def conv(layer: Any, dtype: Any) -> Layer:
    """``torch.nn.Conv1d`` of stride 1 with its own zeros, or of a kernel twice its stride.

    The latter takes whole strides only.
    """
    from torch.nn import functional

    stride, (outputs, inputs, kernel) = layer.stride[0], layer.weight.shape
    if kernel == 1:  # 2 to 4 times as fast as a matrix product
        weight_OI, bias_O = (p.detach().to(dtype) for p in (layer.weight[:, :, 0], layer.bias))
        return lambda x_BTC: functional.linear(x_BTC, weight_OI, bias_O)
    if stride == 1:
        return taps(layer.weight, layer.bias, dtype, layer.dilation[0], layer.padding[0])
    weight_OI2S = layer.weight.reshape(outputs, inputs, 2, stride)
    weight_OK2 = weight_OI2S.permute(0, 3, 1, 2).reshape(outputs, stride * inputs, 2)
    run = taps(weight_OK2, layer.bias, dtype)
    return lambda x_BTC: run(x_BTC.reshape(len(x_BTC), -1, stride * inputs))


def transposed(layer: Any, dtype: Any) -> Layer:
    """``torch.nn.ConvTranspose1d`` of a kernel twice its stride; its padding is cut off."""
    stride, cut, (inputs, outputs, _) = layer.stride[0], layer.padding[0], layer.weight.shape
    weight_IO2S = layer.weight.reshape(inputs, outputs, 2, stride).flip(2)  # the older tap first
    weight_KI2 = weight_IO2S.permute(3, 1, 0, 2).reshape(stride * outputs, inputs, 2)
    run = taps(weight_KI2, layer.bias.repeat(stride), dtype, padding=1)

    def spread(x_BTC: Any) -> Any:
        out_BTC = run(x_BTC).reshape(len(x_BTC), -1, outputs)
        return out_BTC[:, cut : out_BTC.shape[1] - cut]

    return spread


def lstm(layer: Any, dtype: Any) -> Layer:
    """``torch.nn.LSTM`` from a state of zeros."""
    import torch

    sizes = layer.input_size, layer.hidden_size, layer.num_layers
    with torch.random.fork_rng(devices=[]):  # it draws weights, which are then replaced
        own = torch.nn.LSTM(*sizes, batch_first=True)
    own.load_state_dict(layer.state_dict())
    own.eval().to(next(layer.parameters()).device, dtype)
    return lambda x_BTC: own(x_BTC)[0]
