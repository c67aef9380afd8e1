"""Which weights of a network are alive, and how the dead ones stay exactly zero.

A dead weight is kept from moving, not put back after it has moved (``Masks.hold``): once it, and
what the optimiser remembers of it, are zero, a zero gradient is all that SGD with momentum, Adam or
AdamW need to leave it at exactly zero; weight decay is a multiple of the weight, which is zero too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from data_specs.io.errors import UserError
from train.models.student import Student
from train.pruning.subject import TeacherNetwork

STUDENT_PARTS = {
    "all": ("convolutions.", "head.projection.", "head.encoder."),
    "convolutions": ("convolutions.",),
}
"""What of a student may be pruned, by the beginning of the weights' names; the first is default.

The attention pool is left alone: it holds some percent, and every score goes through it.
"""


def prunable(network: Student | TeacherNetwork, what: str | None = None) -> list[str]:
    """Names of the weights that may be pruned, in the network's order.

    Matrices and convolution kernels: never a bias or a norm, which have one axis. ``what`` is
    "encoder" of a teacher, else one of ``STUDENT_PARTS``. ``UserError`` naming the known parts.
    """
    parts = STUDENT_PARTS if isinstance(network, Student) else {"encoder": ("encoder.",)}
    what = what or next(iter(parts))
    if what not in parts:
        raise UserError(
            f"{type(network).__name__} has no part {what!r} to prune: known are {', '.join(parts)}"
        )
    return [
        name
        for name, parameter in network.named_parameters()
        if parameter.ndim >= 2 and name.startswith(parts[what])
    ]


class Masks(dict[str, Tensor]):
    """Which weights are alive: a bool tensor of a weight's shape by its name, True where alive."""

    @classmethod
    def full(cls, module: nn.Module, names: Iterable[str]) -> Masks:
        """All alive, on the weights' device."""
        masks = cls()
        for name in names:
            weight = module.get_parameter(name)
            masks[name] = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        return masks

    def alive(self) -> int:
        return sum(int(mask.count_nonzero()) for mask in self.values())

    def total(self) -> int:
        return sum(mask.numel() for mask in self.values())

    @torch.no_grad()
    def apply_(self, module: nn.Module) -> None:
        """Set the dead weights of a module to zero, in place."""
        for weight, mask in self._pairs(module):
            weight.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def hold(self, optimizer: Optimizer, module: nn.Module) -> RemovableHandle:
        """Keep the dead weights, which ``apply_`` has set to zero, from moving.

        Sets what the optimiser remembers of them to zero now, and their gradients before every
        step from now on. When more weights have died: ``remove()`` the handle, ``apply_`` and hold
        again.
        """
        pairs = list(self._pairs(module))
        for weight, mask in pairs:
            for memory in optimizer.state.get(weight, {}).values():
                if isinstance(memory, Tensor) and memory.shape == mask.shape:
                    memory.masked_fill_(~mask, 0.0)

        def still(*_: Any) -> None:
            for weight, mask in pairs:
                if weight.grad is not None:  # filled, not multiplied: an infinity times 0 is NaN
                    weight.grad.masked_fill_(~mask, 0.0)

        return optimizer.register_step_pre_hook(still)

    def _pairs(self, module: nn.Module) -> Iterator[tuple[Parameter, Tensor]]:
        parameters = dict(module.named_parameters())
        for name, mask in self.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                owner = type(module).__name__
                raise ValueError(f"{owner} has no weight {name!r} of the mask's shape")
            yield parameters[name], mask
