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
    """``device`` as torch names it; ``precision`` is fp32 or bf16."""

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
def inference() -> Iterator[Any]:
    """Inference mode; gives the torch device that tensors belong on. Layers have a precision."""
    import torch

    with torch.inference_mode():
        yield torch.device(current().device)
