"""A student small enough to export in a test, whose every part changes the score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.files import write_weights
from train.models.student import Student, StudentConfig
from train.models.tensors import write_about

TINY = StudentConfig(channels=(4, 4, 6), strides=((4, 2), (2, 2), (4, 2)), dim=8, heads=2, layers=2)


def lively(student: Student) -> Student:
    """Random statistics in the batch norms, and larger weights at the end: scores that differ."""
    torch.manual_seed(5)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    nn.init.normal_(student.head.pool.output.weight, 0, student.config.dim**-0.5)
    nn.init.zeros_(student.head.pool.output.bias)
    for layer in student.convolutions:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= 2
    return student.eval()


def tiny() -> Student:
    """The same student every time."""
    torch.manual_seed(1)
    return lively(Student(TINY))


def write_run(folder: Path, network: Student | None = None, **about: Any) -> Path:
    """The folder of a trained student, and what else its description says."""
    folder.mkdir(parents=True)
    network = network or tiny()
    write_weights(folder / "model.safetensors", network.state_dict())
    config = network.config.model_dump(mode="json")
    write_about(folder / "model.json", {"config": config, **about})
    return folder
