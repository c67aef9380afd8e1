"""Which weights go: what each is worth, how many go each round, and the exact selection.

Scores that tie at the threshold go in a fixed order (the tensors' order, then row-major), so that
the count is exact. Memory beside the scores is one more float32 for each living weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from math import floor, prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from train.pruning.masks import Masks

RateOf = Literal["living", "start"]

DECAY = 0.9
"""Of the scores' recursive average (section IV-C)."""


# --- what they are worth --------------------------------------------------------------------------


class TaylorScores:
    """Importance of weights by their names, averaged over the steps: ``s = 0.9 s + 0.1 (g w)^2``.

    Of a weight w with gradient g: by how much the loss would change if w were zero, to first order,
    squared (Molchanov et al. 2019, equation 8; section IV-C). The average begins at zero: after t
    steps all lack the same factor ``1 - 0.9^t``, which changes no order. It goes on over the
    rounds. Memory: one number a weight, and the largest weight once more while gathering.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], decay: float = DECAY) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        for name in names:
            weight, layout = module.get_parameter(name), torch.contiguous_format
            self.averages[name] = torch.zeros_like(weight, memory_format=layout)

    @torch.no_grad()
    def gather(self, module: nn.Module) -> None:
        """Take in the gradients of a step: after backward, before the optimiser's step.

        A dead weight is zero, and so is what it adds. ``ValueError`` for a weight that has no
        gradient.
        """
        for name, average in self.averages.items():
            weight = module.get_parameter(name)
            if weight.grad is None:
                raise ValueError(f"{name} has no gradient: scores are gathered after backward")
            change = weight.grad * weight
            average.mul_(self.decay).addcmul_(change, change, value=1 - self.decay)

    def forget(self, masks: Masks) -> None:
        """Set the scores of dead weights to zero."""
        for name, average in self.averages.items():
            average.masked_fill_(~masks[name], 0.0)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        for name, average in self.averages.items():
            average.copy_(averages[name])


# --- how many -------------------------------------------------------------------------------------


def schedule(total: int, rate: float, rate_of: RateOf, smallest: int) -> list[int]:
    """Weights left after round 0 (all), 1, 2, ... up to the first with at most ``smallest``.

    A round of "living" removes ``floor(rate x left)``, at least one weight, so that about
    ``(1 - rate)^n`` of them are left after n; after round n of "start" ``total - floor(n x rate x
    total)`` are. The rate is taken as the decimal number that it prints as: counts are exact.
    """
    share, left = Fraction(str(rate)), [total]
    while left[-1] > smallest:
        if rate_of == "living":
            left.append(left[-1] - max(1, floor(share * left[-1])))
        else:
            left.append(max(0, total - floor(share * total * len(left))))
    return left


def weights_at(size: float, total: int) -> int:
    """The most weights that a size in percent may have: ``floor(size x total / 100)``."""
    return floor(Fraction(str(size)) * total / 100)


# --- which ----------------------------------------------------------------------------------------


def remove_smallest(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], count: int) -> None:
    """Clear ``alive``, in place, at the ``count`` living weights with the lowest scores.

    Those that tie at the threshold go in the tensors' order, then row-major. ``scores`` are
    float32, ``alive`` bool of the same shapes and contiguous. ``UserError`` for a living score that
    is NaN or negative, naming its tensor; ``ValueError`` for a count that is not there; nothing is
    cleared then.
    """
    if not count:
        return
    found_M = np.concatenate([_living(name, score, alive[name]) for name, score in scores.items()])
    if not 1 <= count <= len(found_M):
        raise ValueError(f"{count} of {len(found_M)} living weights cannot be selected")
    found_M.partition(count - 1)
    threshold = float(found_M[count - 1])
    ties = count - int(np.count_nonzero(found_M < threshold))
    for name, score in scores.items():
        score_N, alive_N = score.reshape(-1), alive[name].view(-1)
        goes_N = score_N < threshold
        if ties:
            ties_M = (alive_N & (score_N == threshold)).nonzero().flatten()[:ties]
            goes_N[ties_M] = True
            ties -= len(ties_M)
        alive_N &= ~goes_N


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


@torch.no_grad()
def remove_by_magnitude(module: nn.Module, masks: Masks, target: int) -> None:
    """Clear masks in place so that of every weight the same share is left: that of ``target``.

    Per matrix (O, I) the weights with the lowest absolute value go, per convolution (O, I, taps...)
    the kernels with the lowest L1 norm (section V-B). Of a tensor with U units
    ``floor(target / total x U)`` are left, so that all in all at most ``target`` weights are, fewer
    by less than one unit a tensor.
    """
    total = masks.total()
    for name, mask in masks.items():
        mask_UK = mask.view(prod(mask.shape[:2]), -1)
        alive_U = mask_UK.any(-1)
        gone = int(alive_U.count_nonzero()) - target * len(alive_U) // total
        if gone > 0:
            norms_U = module.get_parameter(name).abs().float().reshape(mask_UK.shape).sum(-1)
            remove_smallest({name: norms_U}, {name: alive_U}, gone)
            mask_UK &= alive_U[:, None]
