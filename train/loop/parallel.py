"""Training on several devices and nodes: Fabric, and the one thing that it leaves to us.

A batch is one batch whatever the number of processes: each takes its rows of it, and the
batch norm's statistics are those of all rows. So the gradients are those of one process, and a run
may go on with another number of processes.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed.nn.functional
from lightning_fabric import Fabric
from torch import Tensor, nn

from data_specs.io.errors import UserError

STOP_EVERY = 10
"""Steps between two looks at whether a signal came to another process."""


def make_fabric(
    device: str = "cpu", devices: int = 1, nodes: int = 1, bf16: bool = False
) -> Fabric:
    """Fabric for ``devices`` processes on each of ``nodes`` machines, launched.

    Under ``torchrun`` its own numbers are taken. ``ValueError`` where a device was numbered and
    several are asked for.
    """
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    asked = torch.device(device)
    several = devices * nodes > 1
    if several and asked.index is not None:
        raise UserError(f"--device {device} is one device: write {asked.type} with --devices")
    which = [asked.index] if asked.index is not None and asked.type != "cpu" else devices
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # its precision is no news
    fabric = Fabric(
        accelerator=asked.type,
        devices=which,
        num_nodes=nodes,
        strategy="ddp" if several else "auto",
        precision="bf16-mixed" if bf16 else "32-true",
    )
    if several:
        fabric.launch()
    return fabric


class SyncBatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all processes: (B, C, L) or (B, C).

    ``torch.nn.SyncBatchNorm`` refuses a CPU's tensors; this one runs, and is tested, anywhere.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalised by the joint batch in training, by the running statistics otherwise."""
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        over = [dim for dim in range(x.ndim) if dim != 1]
        count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
        mean_C = _over_ranks(x.sum(over, dtype=torch.float64)).div(count).to(x.dtype)
        centred = x - _along(mean_C, x)
        squares_C = centred.square().sum(over, dtype=torch.float64)
        variance_C = _over_ranks(squares_C).div(count).to(x.dtype)
        self._follow(mean_C.detach(), variance_C.detach() * count / (count - 1))
        normal = centred * _along(torch.rsqrt(variance_C + self.eps), x)
        return (normal * _along(self.weight, x) + _along(self.bias, x)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C, self.momentum)
        self.num_batches_tracked.add_(1)


def _over_ranks(values_C: Tensor) -> Tensor:
    total: Tensor = torch.distributed.nn.functional.all_reduce(values_C)
    return total


def _along(values_C: Tensor, x: Tensor) -> Tensor:
    return values_C.reshape(1, -1, *([1] * (x.ndim - 2)))


def synchronise_batch_norm(module: nn.Module) -> None:
    """Replace every batch norm in a module by one over all processes, weights kept."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d):
            synced = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(module, name, synced)
        else:
            synchronise_batch_norm(child)


def joint_means(fabric: Fabric | None, values: list[float]) -> list[float]:
    """The mean of every number over the processes; all must ask."""
    if fabric is None or fabric.world_size == 1 or not values:
        return values
    joint: Any = fabric.all_reduce(torch.tensor(values), reduce_op="mean")
    return [float(value) for value in joint]


def largest(fabric: Fabric, number: int) -> int:
    """The largest of the processes' numbers; all must ask."""
    joint: Any = fabric.all_gather(torch.tensor(number))
    return int(joint.max())


def whole(fabric: Fabric, rows: range, values: Tensor, length: int) -> Tensor:
    """One vector (length,) of the values that every process has for its own ``rows``."""
    joint = torch.zeros(length, dtype=values.dtype, device=values.device)
    joint[list(rows)] = values
    if fabric.world_size > 1:
        torch.distributed.all_reduce(joint)
    return joint
