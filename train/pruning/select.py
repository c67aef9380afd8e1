"""Which weights go: exact selection of the smallest of many scores, and how many go each round.

The k-th smallest of 478 million scores is found without sorting or joining them. Bits of float32
numbers that are not negative are in the order of the numbers: two passes of histograms (the upper
16 bits, then the lower 16 of those in the bin where the k-th is) give its exact bits, whatever the
number of tensors. Ties at that value go in a fixed order (the tensors' order, then row-major), so
that the count is exact. Time is three passes over the scores; memory beside them is some tens of
bytes for each of ``CHUNK`` scores, and two histograms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Literal

import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from train.pruning.masks import Masks
from train.pruning.scores import unit_norms, units_alive

CHUNK = 1 << 20
"""Scores that are looked at at a time: what is made of them stays in a CPU's cache."""

LOW_BITS, LOW, SIGN_OFF = 16, 0xFFFF, 0x7FFFFFFF
HIGH_BINS = 1 << 15
"""Values of the upper half of a float32's bits, without its sign."""

RateOf = Literal["living", "start"]


# --- how many -------------------------------------------------------------------------------------


def schedule(total: int, rate: float, rate_of: RateOf, smallest: int) -> list[int]:
    """Weights left after round 0 (all), 1, 2, ... up to the first with at most ``smallest``.

    A round of "living" removes ``floor(rate x left)``, at least one weight, so that about
    ``(1 - rate)^n`` of them are left after n; after round n of "start" ``total - floor(n x rate x
    total)`` are. The rate is taken as the decimal number that it prints as: counts are exact.
    """
    share, left = Fraction(str(rate)), [total]
    while left[-1] > max(smallest, 0):
        if rate_of == "living":
            left.append(left[-1] - max(1, floor(share * left[-1])))
        else:
            left.append(max(0, total - floor(share * total * len(left))))
    return left


def weights_at(size: float, total: int) -> int:
    """The most weights that a size in percent may have: ``floor(size x total / 100)``."""
    return floor(Fraction(str(size)) * total / 100)


# --- which ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """The largest score that goes, as the bits of its float32, and how many that equal it go."""

    bits: int
    ties: int


def find_threshold(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], count: int
) -> Threshold:
    """The ``count``-th smallest (from 1) of the living scores, over all tensors.

    ``scores`` are float32, ``alive`` bool of the same shapes. ``ValueError`` for a living score
    that is NaN or negative, naming its tensor, and for a count that is not there.
    """
    found = torch.zeros(HIGH_BINS, dtype=torch.int64)
    for name, score_N, alive_N in _chunks(scores, alive):
        living_M = score_N[alive_N]
        _require_order(living_M, name)
        found += _histogram(_bits(living_M) >> LOW_BITS, HIGH_BINS)
    living = int(found.sum())
    if not 1 <= count <= living:
        raise ValueError(f"{count} of {living} living weights cannot be selected")
    high, before = _bin_of(found, count)
    found = torch.zeros(LOW + 1, dtype=torch.int64)
    for _, score_N, alive_N in _chunks(scores, alive):
        bits_N = _bits(score_N)
        inside_M = bits_N[alive_N & (bits_N >> LOW_BITS == high)]
        found += _histogram(inside_M & LOW, LOW + 1)
    low, smaller = _bin_of(found, count - before)
    return Threshold((high << LOW_BITS) | low, count - before - smaller)


def remove_smallest(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], count: int
) -> Threshold | None:
    """Clear ``alive``, in place, at the ``count`` living weights with the lowest scores.

    Those that tie at the threshold go in the tensors' order, then row-major. None for a count of 0.
    Masks must be contiguous. ``ValueError`` as in ``find_threshold``; nothing is cleared then.
    """
    if not count:
        return None
    threshold = find_threshold(scores, alive, count)
    left = threshold.ties
    for _, score_N, alive_N in _chunks(scores, alive):
        bits_N = _bits(score_N)
        goes_N = bits_N < threshold.bits
        if left:
            ties_M = (alive_N & (bits_N == threshold.bits)).nonzero().flatten()[:left]
            goes_N[ties_M] = True
            left -= len(ties_M)
        alive_N &= ~goes_N
    return threshold


def _chunks(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, scores (N,) and mask (N,), a view, of at most ``CHUNK`` weights at a time."""
    for name, score in scores.items():
        if score.dtype != torch.float32 or score.shape != alive[name].shape:
            raise ValueError(f"{name}: scores must be float32 in the shape of the mask")
        score_N, alive_N = score.reshape(-1), alive[name].view(-1)
        for start in range(0, len(score_N), CHUNK):
            part = slice(start, start + CHUNK)
            yield name, score_N[part], alive_N[part]


def _require_order(living_M: Tensor, name: str) -> None:
    if not len(living_M):
        return
    lowest = float(living_M.aminmax().min)  # NaN where there is one
    if not lowest >= 0:
        what = "NaN" if lowest != lowest else f"{lowest:g}, negative"
        raise UserError(f"{name}: a score is {what}: the loss or its gradients went wrong")


def _bits(score_N: Tensor) -> Tensor:
    return score_N.view(torch.int32) & SIGN_OFF  # -0 is 0


def _histogram(values_M: Tensor, bins: int) -> Tensor:
    return torch.bincount(values_M, minlength=bins).cpu()


def _bin_of(found: Tensor, count: int) -> tuple[int, int]:
    """The bin where the ``count``-th (from 1) is, and how many are in the bins before it."""
    up_to = found.cumsum(0)
    place = int(torch.searchsorted(up_to, count))
    return place, int(up_to[place] - found[place])


@torch.no_grad()
def remove_by_magnitude(module: nn.Module, masks: Masks, target: int) -> None:
    """Clear masks in place so that of every weight the same share is left: that of ``target``.

    Per matrix the weights with the lowest absolute value go, per convolution the kernels with the
    lowest L1 norm. Of a tensor with U units ``floor(target / total x U)`` are left, so that all in
    all at most ``target`` weights are, fewer by less than one unit a tensor.
    """
    parameters, total = dict(module.named_parameters()), masks.total()
    for name, mask in masks.masks.items():
        alive_U = units_alive(mask).clone()
        kept = target * len(alive_U) // total
        gone = int(alive_U.count_nonzero()) - kept
        if gone > 0:
            norms = {name: unit_norms(parameters[name])}
            remove_smallest(norms, {name: alive_U}, gone)
            shape = mask.shape if mask.ndim < 3 else (*mask.shape[:2], *(1,) * (mask.ndim - 2))
            mask &= alive_U.view(shape)
