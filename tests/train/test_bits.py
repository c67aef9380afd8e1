"""Weights of few bits against closed forms, and int8 linear layers against float ones."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import nn

from train.models.bits import (
    Int8Linear,
    int8_linears_,
    matrices,
    megabytes,
    most_code,
    quantise_,
    quantised,
)


def gaussian_error(step: float, most: int) -> float:
    """Mean squared error of a normal variable rounded to ``-most..most`` steps: an integral."""
    x = np.linspace(-9, 9, 200_001)
    made = np.clip(np.round(x / step), -most, most) * step
    return float(np.trapezoid((x - made) ** 2 * scipy.stats.norm.pdf(x), x))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_error_is_that_of_the_best_uniform_quantiser(bits):
    most = 2 ** (bits - 1) - 1
    best = scipy.optimize.minimize_scalar(
        lambda step: gaussian_error(step, most), bounds=(0.005, 2), method="bounded"
    ).fun
    weight = torch.randn(4, 1 << 15, generator=torch.Generator().manual_seed(0))
    error = float((weight - quantised(weight, bits)).square().mean())
    # 131072 draws: their mean square is 1 +- .4 %; the scales tried are 1/64 apart, which at the
    # flat bottom of the curve costs less than a percent more.
    assert 0.98 * best < error < 1.03 * best


def test_two_bits_are_the_best_ternary_weights():
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    sizes = weight.abs().sort(dim=1, descending=True).values.double()
    count = torch.arange(1, 25)
    # With the k largest at one scale the error is |w|^2 - (their sum)^2 / k: at its best over k.
    exact = sizes.square().sum(1) - (sizes.cumsum(1).square() / count).max(1).values
    made = quantised(weight, 2)
    error = (weight - made).double().square().sum(1)
    assert all(len(row.abs().unique()) <= 2 for row in made)
    assert (error >= exact - 1e-5).all() and error.sum() < 1.02 * exact.sum()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_on_the_grid_stays_and_nothing_is_left_along_the_codes(bits):
    most = 2 ** (bits - 1) - 1
    codes = torch.randint(-most, most + 1, (5, 3, 7), generator=torch.Generator().manual_seed(2))
    codes[:, 0, 0] = most
    weight = codes * torch.tensor([0.1, 1, 3e-4, 7, 0]).reshape(5, 1, 1)
    assert torch.allclose(quantised(weight, bits), weight, rtol=1e-5, atol=0)
    other = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(3))
    made = quantised(other, bits)
    left = ((other - made) * made).flatten(1).sum(1)  # <w - s q, s q> = 0 at the best s
    assert left.abs().max() < 1e-5 * float(other.square().sum())
    other[:, 1] = 0
    assert not quantised(other, bits)[:, 1].any()


class Tied(nn.Module):
    """Tokens in, tokens out by the same table; positions are looked up alone."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 6), nn.Embedding(4, 6)
        self.mix, self.norm = nn.Conv1d(6, 6, 3), nn.LayerNorm(6)
        self.attend = nn.MultiheadAttention(6, 2)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.tokens.weight


def test_matrices_are_what_is_multiplied_and_each_once():
    network = Tied()
    names = matrices(network)
    assert names == [
        *("tokens.weight", "mix.weight", "attend.in_proj_weight", "attend.out_proj.weight")
    ]
    places = network.places.weight.detach().clone()
    quantise_(network, names, 2)
    assert all(len(row.abs().unique()) <= 2 for row in network.out.weight)
    assert torch.equal(network.places.weight, places)


@pytest.mark.parametrize("bias", [True, False])
def test_an_int8_layer_is_within_what_rounding_allows(bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    x = 3 * torch.randn(2, 5, 96)
    with torch.inference_mode():
        found = Int8Linear(linear)(x) - linear(x)
    step = float(x.max() - x.min()) / 255
    coarse_O = linear.weight.abs().amax(1) / most_code()
    # Each factor is off by half a step at most, an activation by one where zero was rounded too.
    allowed = step * (linear.weight.abs() + coarse_O[:, None] / 2).sum(1)
    allowed = allowed + x.abs().sum(-1, keepdim=True) * coarse_O / 2
    assert found.shape == (2, 5, 40) and (found.abs() <= allowed + 1e-4).all()
    assert found.norm() > 0


def test_linear_layers_are_replaced_and_take_a_byte_a_weight():
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.MultiheadAttention(8, 2))
    before = megabytes(network)
    int8_linears_(network)
    assert type(network[0]) is Int8Linear
    assert type(network[2].out_proj) is not Int8Linear
    scales = 128 * (4 + 8)  # scales and zero points
    assert megabytes(network) == pytest.approx(before - (3 * 64 * 128 - scales) / 1e6)
