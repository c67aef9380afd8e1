"""The importance of a weight: first-order Taylor scores, gathered while the network is fine-tuned.

Importance of a weight w with gradient g of the loss: by how much the loss would change if w were
zero, to first order, squared: ``(L(w) - L(0))^2 ~ (g w)^2`` (Molchanov et al. 2019, equation 8;
section IV-C of the paper). Averaged recursively over the steps: ``s = 0.9 s + 0.1 (g w)^2``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from train.pruning.masks import Masks

DECAY = 0.9
"""Of the recursive average (section IV-C)."""


class TaylorScores:
    """The recursive average of (gradient x weight)^2, by the weights' names.

    It begins at zero: after t steps all averages lack the same factor ``1 - 0.9^t``, which
    changes no order. It goes on over the rounds. Memory: one number a weight, and the largest
    weight once more while gathering.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], decay: float = DECAY) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"decay {decay}: must be at least 0 and below 1")
        self.decay = decay
        parameters = dict(module.named_parameters())
        self.averages: dict[str, Tensor] = {
            name: torch.zeros(
                parameters[name].shape, dtype=parameters[name].dtype, device=parameters[name].device
            )
            for name in names
        }

    @torch.no_grad()
    def gather(self, module: nn.Module) -> None:
        """Take in the gradients of a step: after backward, before the optimiser's step.

        A dead weight is zero, and so is what it adds. ``ValueError`` for a weight that has no
        gradient.
        """
        parameters = dict(module.named_parameters())
        for name, average in self.averages.items():
            weight = parameters[name]
            if weight.grad is None:
                raise ValueError(f"{name} has no gradient: scores are gathered after backward")
            change = weight.grad * weight
            average.mul_(self.decay).addcmul_(change, change, value=1 - self.decay)

    def forget(self, masks: Masks) -> None:
        """Set the scores of dead weights to zero."""
        for name, average in self.averages.items():
            average.masked_fill_(~masks.masks[name], 0.0)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take over averages that were saved."""
        for name, average in self.averages.items():
            average.copy_(averages[name])


def unit_norms(weight: Tensor) -> Tensor:
    """L1 norms (N,), float32, of what magnitude pruning removes at a time.

    Of a matrix (O, I) its weights one by one; of a convolution (O, I, taps...) its O x I kernels
    (section V-B: "the L1 norm of kernels").
    """
    norms = weight.detach().abs().float()
    return norms.flatten() if weight.ndim < 3 else norms.flatten(2).sum(-1).flatten()


def units_alive(mask: Tensor) -> Tensor:
    """Which of those units are alive, bool (N,); a kernel is while any of its weights is."""
    return mask.flatten() if mask.ndim < 3 else mask.flatten(2).any(-1).flatten()
