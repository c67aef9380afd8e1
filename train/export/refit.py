"""Convolutions made ready for int8: channels evened out, then refitted to what int8 leaves of them.

A u8 activation has one step for the whole map, set by its rare peaks. LeakyReLU shrinks what is
negative tenfold, so most of it rounds to zero, always upwards: an error that does not average out
and that grows from layer to layer (the published network scores some clips wrong by more than 0.2).
The sums that it shifts are linear in the input, so each convolution's weights and biases are moved,
by regularised least squares over real clips, to where its sums are again those of the float
network. Before that, channels are scaled towards one peak, so that each has more of the steps, and
the next layer's weights back: LeakyReLU lets any positive scale through, so the float network stays
the same. The graph and its cost stay as they are.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from train.models.student import KERNEL, LEAK

LEVELS = 255

CROP_FRAMES = 96
"""Frames of each clip that are looked at: an eighth of it, elsewhere in every clip."""

POSITIONS = 300
"""Sums of each clip and layer that the fit is made on."""

RANGE_SAMPLES = 4000
"""Values of each clip and layer that its range is found from."""

OUTSIDE = 1e-5
"""Share of the values that a range may cut off at either end."""

RIDGE = 1e-3
"""Of the mean squared input: how much is left where clips say nothing."""

EVENNESS = 0.75
"""Exponent of the channels' peaks that is taken out of them: 1 would make them alike."""

FURTHEST_SCALE = 30.0
"""No channel is scaled further than that, up or down."""

Range = tuple[float, float]


@dataclass
class Int8Convolution:
    """A convolution as int8 will have it: its moved weights, and the ranges around its LeakyReLU.

    ``before`` is None for the first: it reads the spectrum and stays in float. ``after`` is None
    for the last: what reads its maps is in float.
    """

    weight: Tensor
    bias: Tensor
    before: Range | None
    after: Range | None


def rounded(x: Tensor, limits: Range) -> Tensor:
    """Values as u8 between limits that hold zero represents them."""
    low, high = limits
    step = max((high - low) / LEVELS, 1e-12)
    zero = round(-low / step)
    return ((x / step).round() + zero).clamp(0, LEVELS).sub(zero).mul(step)


def rounded_weight(weight: Tensor) -> Tensor:
    """Weights (out, in, height, width) as s8, a scale for every output, represents them."""
    step = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12) / 127
    return (weight / step).round().mul(step)


def prepare(convolutions: nn.Sequential, spectra: Sequence[Tensor]) -> list[Int8Convolution]:
    """The convolutions for int8, from crops (1, 2, 161, F) of real clips' spectra.

    Deterministic: the positions that are looked at are drawn with a fixed seed.
    """
    return refit(evened(convolutions, spectra), spectra)


def convolutions_of(layers: nn.Sequential) -> list[nn.Conv2d]:
    """Without what is between them."""
    return [layer for layer in layers if isinstance(layer, nn.Conv2d)]


@torch.no_grad()
def evened(convolutions: nn.Sequential, spectra: Sequence[Tensor]) -> nn.Sequential:
    """A copy that gives the same, its channels (but the last layer's) brought to one peak."""
    convolutions = copy.deepcopy(convolutions)
    layers, inputs = convolutions_of(convolutions), list(spectra)
    for layer, after in itertools.pairwise(layers):
        maps = [functional.leaky_relu(layer(x), LEAK) for x in inputs]
        peak_C = torch.stack([x.abs().amax(dim=(0, 2, 3)) for x in maps]).amax(0).clamp_min(1e-12)
        scale_C = (peak_C.mean() / peak_C) ** EVENNESS
        scale_C11 = scale_C.clamp(1 / FURTHEST_SCALE, FURTHEST_SCALE)[:, None, None]
        layer.weight *= scale_C11[..., None]
        layer.bias *= scale_C11[:, 0, 0]  # type: ignore[operator]
        after.weight /= scale_C11
        inputs = [x * scale_C11 for x in maps]
    return convolutions


def refit(convolutions: nn.Sequential, spectra: Sequence[Tensor]) -> list[Int8Convolution]:
    """Weights moved to what int8 leaves of their input, and the ranges; see ``prepare``."""
    layers = convolutions_of(convolutions)
    generator = torch.Generator().manual_seed(0)
    exact, coarse = list(spectra), list(spectra)
    found = []
    for number, layer in enumerate(layers):
        sums = [layer(x) for x in exact]
        if number == 0:
            weight, bias = layer.weight.detach(), layer.bias.detach()  # type: ignore[union-attr]
        else:
            weight, bias = _fitted(layer, coarse, sums, generator)
        maps = [functional.leaky_relu(x, LEAK) for x in sums]
        before = _limits(sums, generator) if number else None
        after = _limits(maps, generator) if number < len(layers) - 1 else None
        found.append(Int8Convolution(weight, bias, before, after))
        coarse = [as_int8(found[-1], layer, x) for x in coarse]
        exact = maps
    return found


def as_int8(made: Int8Convolution, layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What int8 makes of an input of the layer."""
    weight = rounded_weight(made.weight) if made.before else made.weight
    sums = functional.conv2d(x, weight, made.bias, layer.stride, layer.padding)
    if made.before:
        sums = rounded(sums, made.before)
    maps = functional.leaky_relu(sums, LEAK)
    return rounded(maps, made.after) if made.after else maps


def _fitted(
    layer: nn.Conv2d,
    inputs: Sequence[Tensor],
    sums: Sequence[Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Weights and bias with which these inputs give these sums, near the layer's own."""
    assert layer.bias is not None
    own_OK = torch.cat((layer.weight.flatten(1), layer.bias[:, None]), 1)
    size = own_OK.shape[1]
    gram_KK, product_KO = torch.zeros(size, size), torch.zeros(size, len(own_OK))
    for patches_NK, sums_NO in _rows(layer, inputs, sums, generator):
        gram_KK += patches_NK.T @ patches_NK
        product_KO += patches_NK.T @ (sums_NO - patches_NK @ own_OK.T)
    ridge = RIDGE * gram_KK.diagonal().mean() * torch.eye(size)
    moved_KO = torch.linalg.solve((gram_KK + ridge).double(), product_KO.double()).float()
    fitted_OK = own_OK + moved_KO.T
    return fitted_OK[:, :-1].reshape(layer.weight.shape), fitted_OK[:, -1].contiguous()


def _rows(
    layer: nn.Conv2d,
    inputs: Sequence[Tensor],
    sums: Sequence[Tensor],
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(patches and a one (N, C*9 + 1), their sums (N, O)) of every clip, away from its ends."""
    (down, along), reach = layer.stride, range(KERNEL)
    for x_1CFT, y_1OFT in zip(inputs, sums, strict=True):
        bins, steps = y_1OFT.shape[2:]
        f = torch.randint(0, bins, (POSITIONS,), generator=generator)
        t = torch.randint(1, max(2, steps - 1), (POSITIONS,), generator=generator)
        padded_CFT = functional.pad(x_1CFT[0], (1, 1))
        patches_CNK = torch.stack(
            [padded_CFT[:, f * down + u, t * along + v] for u in reach for v in reach], -1
        )
        patches_NK = patches_CNK.transpose(0, 1).flatten(1)
        yield torch.cat((patches_NK, torch.ones(POSITIONS, 1)), 1), y_1OFT[0][:, f, t].T


def _limits(maps: Sequence[Tensor], generator: torch.Generator) -> Range:
    indices = [torch.randint(0, x.numel(), (RANGE_SAMPLES,), generator=generator) for x in maps]
    values = torch.cat([x.flatten()[index] for x, index in zip(maps, indices, strict=True)])
    low, high = np.quantile(values.numpy(), (OUTSIDE, 1 - OUTSIDE))
    return float(min(low, 0)), float(max(high, 0))


def crops(spectra: Iterator[Tensor]) -> list[Tensor]:
    """A crop (1, 2, 161, at most 96) of every spectrum, each elsewhere: golden-ratio steps."""
    found = []
    for number, spectrum in enumerate(spectra):
        spare = max(0, spectrum.shape[-1] - CROP_FRAMES)
        start = round((number * 0.618034) % 1 * spare)
        found.append(spectrum[..., start : start + CROP_FRAMES].contiguous())
    return found
