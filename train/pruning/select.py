"""Which weights go: exact selection of the smallest of many scores, and how many go each round.

Scores that tie at the threshold go in a fixed order (the tensors' order, then row-major), so that
the count is exact. Memory beside the scores is one more float32 for each living weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from train.pruning.masks import Masks
from train.pruning.scores import unit_norms, units_alive

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


class Threshold(NamedTuple):
    """The largest score that goes, and how many that equal it go."""

    value: float
    ties: int


def find_threshold(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], count: int
) -> Threshold:
    """The ``count``-th smallest (from 1) of the living scores, over all tensors.

    ``scores`` are float32, ``alive`` bool of the same shapes. ``UserError`` for a living score
    that is NaN or negative, naming its tensor; ``ValueError`` for a count that is not there.
    """
    living = [_living(name, score, alive[name]) for name, score in scores.items()]
    found_M = np.concatenate(living)
    if not 1 <= count <= len(found_M):
        raise ValueError(f"{count} of {len(found_M)} living weights cannot be selected")
    found_M.partition(count - 1)
    value = found_M[count - 1]
    return Threshold(float(value), count - int(np.count_nonzero(found_M < value)))


def _living(
    name: str, score: Tensor, alive: Tensor
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The scores (M,) of living weights, held to what can be put in order."""
    if score.dtype != torch.float32 or score.shape != alive.shape:
        raise ValueError(f"{name}: scores must be float32 in the shape of the mask")
    living_M = score[alive]
    if len(living_M) and not (lowest := float(living_M.aminmax().min)) >= 0:  # NaN where one is
        what = "NaN" if lowest != lowest else f"{lowest:g}, negative"
        raise UserError(f"{name}: a score is {what}: the loss or its gradients went wrong")
    return living_M.cpu().numpy()


def remove_smallest(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], count: int
) -> Threshold | None:
    """Clear ``alive``, in place, at the ``count`` living weights with the lowest scores.

    Those that tie at the threshold go in the tensors' order, then row-major. None for a count of 0.
    Masks must be contiguous. Errors as of ``find_threshold``; nothing is cleared then.
    """
    if not count:
        return None
    threshold = find_threshold(scores, alive, count)
    left = threshold.ties
    for name, score in scores.items():
        score_N, alive_N = score.reshape(-1), alive[name].view(-1)
        goes_N = score_N < threshold.value
        if left:
            ties_M = (alive_N & (score_N == threshold.value)).nonzero().flatten()[:left]
            goes_N[ties_M] = True
            left -= len(ties_M)
        alive_N &= ~goes_N
    return threshold


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
