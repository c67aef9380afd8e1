"""One update in each of two processes; keeps the gradients. Run by ``torchrun`` in a test.

In float64: what differs is then what is computed, not the order in which float32 adds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from train.data.order import Order
from train.data.sources import open_sources
from train.data.stream import Batch, Batches
from train.files import save_checkpoint
from train.student.fit import Trainer
from train.student.presets import FitConfig, make_config


def config_of(folder: Path) -> FitConfig:
    """A tiny run with everything that depends on the batch: batch norm, crops."""
    return make_config(
        "v1",
        open_sources(folder),
        "fast",
        steps=6,
        batch=6,
        validate_every=2,
        warmup=2,
        precision="fp32",
        crops=0.5,
    )


def joint_batch(folder: Path, config: FitConfig, rank: int = 0, world: int = 1) -> Batch:
    """A process's rows of the first batch."""
    sources = open_sources(folder)
    order = Order(tuple(shard.samples for shard in sources.shards), 0, 0, config.batch)
    return Batches(sources.samples(0.0)[0], order, (), rank, world)[0]


def gradients(folder: Path, processes: int) -> tuple[int, dict[str, Tensor]]:
    """(rank, gradients of one update by name) of this process, one of so many."""
    strategy = "ddp" if processes > 1 else "auto"
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=processes, precision="64-true")
    fabric.launch()
    config = config_of(folder)
    trainer = Trainer(config, fabric)
    trainer.average.double()
    trainer.update(joint_batch(folder, config, fabric.global_rank, fabric.world_size))
    found = {name: p.grad for name, p in trainer.student.named_parameters() if p.grad is not None}
    assert all(gradient.dtype == torch.float64 for gradient in found.values())
    return fabric.global_rank, found


if __name__ == "__main__":
    shards, out = map(Path, sys.argv[1:])
    rank, ours = gradients(shards, 2)
    save_checkpoint(out / f"gradients-{rank}.pt", ours)
