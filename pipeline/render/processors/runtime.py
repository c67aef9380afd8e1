"""Where and how precisely the neural processors of this process run: set once by the worker.

The device is how the data is made and never hashed; the precision is part of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Runtime:
    """``device`` as torch names it; ``precision`` is fp32, or bf16 (mixed, by autocast)."""

    device: str = "cpu"
    precision: str = "fp32"


_CURRENT = Runtime()


def current() -> Runtime:
    """What the neural processors of this process run on."""
    return _CURRENT


def use(runtime: Runtime) -> None:
    """Set it for this process."""
    global _CURRENT
    _CURRENT = runtime


@contextmanager
def inference(precision: str | None = None) -> Iterator[Any]:
    """Inference mode, with autocast where the recipe asks for bf16.

    A processor whose output would move too far in bf16 passes ``precision="fp32"``. Gives the torch
    device that its tensors belong on.
    """
    import torch

    runtime = current()
    device = torch.device(runtime.device)
    half = (precision or runtime.precision) == "bf16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        yield device
